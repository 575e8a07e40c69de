// What the kernels compute, in plain loops and float64: what they are compared with, and what runs
// where INGOT_CPU says "reference".
#pragma once

#include <vector>

#include "panels.h"

namespace ingot::cpu {

// Row `row` of a weight, [columns].
std::vector<double> reference_row(const ingot_cpu_format &format, const void *weight, size_t columns,
                                  size_t row);

void reference_linear(const ingot_cpu_linear_params &params);
void reference_mlp(const ingot_cpu_mlp_params &params);

// x [columns] W^T for one weight, [rows]; rounded as `rounding` says, of ingot_cpu_rounding.
std::vector<double> reference_product(const ingot_cpu_format &format, const void *weight,
                                      std::vector<double> x, size_t rows, int32_t rounding);

double reference_activation(int32_t activation, double x);

}  // namespace ingot::cpu
