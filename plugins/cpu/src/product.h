// Products of activations with weights in panels, for the operators that are made of them.
//
// A product is jobs, each with some rows of x and a weight of its own: a linear layer has one, layers
// that read the same x one each, a mixture of experts one an expert. All weights have one format and
// the same columns. First pack() lays the rows of all jobs side by side in tiles, as the kernels read
// them; then multiply() computes the panels of all of them, in pieces.
#pragma once

#include "work.h"

namespace ingot::cpu {

// Where products go: y = residual + scale * (x W^T + bias), for all rows of a product.
struct Target {
    size_t out;
    float *y;               // [rows, out]
    const float *bias;      // [out], or null
    const float *residual;  // [rows, out] apart from y, or null: then scale is not read
    float scale;
};

struct Job {
    const uint8_t *weight;
    size_t first;  // of the rows of all jobs
    size_t rows;   // jobs one behind the other may have the same
    const Target *target;
};

class Product {
   public:
    // Where a row of x begins, by its number among the rows of all jobs.
    using Row = const float *(*)(const void *self, size_t row);

    // rounding: of ingot_cpu_rounding.
    Product(const ingot_cpu_format &format, size_t columns, int32_t rounding, const Job *jobs,
            size_t count);

    void pack(const ingot_cpu_threads &threads, Row row, const void *self) const;

    void multiply(const ingot_cpu_threads &threads) const;

    ingot_cpu_format format;
    Layout layout;
    size_t columns;
    size_t padded;  // columns with those that fill up the last block
    bool rounded;  // to int8
    bool narrow;   // to bfloat16
    const Job *jobs;
    size_t count, rows;
    size_t tile_rows;  // the most of a tile

    // Tiles of float32, [padded][rows of the tile] one behind the other; or rounded: [padded /
    // 4][rows][4] of int8, and a scale and a sum for each [block][row]. Narrow are tiles of float32
    // as well, or, for kernels that multiply pairs, [padded / 2][rows][2] of bfloat16 in their place.
    Buffer<float> x;
    Buffer<int8_t> numbers;
    Buffer<float> scales;
    Buffer<int32_t> sums;
};

// Tile t of n rows in tiles of at most so many, all about as tall.
struct Tiles {
    Tiles(size_t rows, size_t most) : rows(rows), count((rows + most - 1) / most) {}
    size_t begin(size_t tile) const { return rows * tile / count; }
    size_t rows, count;
};

}  // namespace ingot::cpu
