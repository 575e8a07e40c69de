#include "reference.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace ingot::cpu {
namespace {

double from_half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const double size = exponent ? std::ldexp(1024 + fraction, exponent - 25) : std::ldexp(fraction, -24);
    return bits >> 15 ? -size : size;
}

float from_bfloat16(uint16_t bits) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
}

// The nearest bfloat16, of two as near the even one.
float to_bfloat16(float value) {
    if (std::isnan(value)) return value;
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
    std::memcpy(&value, &bits, sizeof bits);
    return value;
}

// x rounded to int8, a block at a time.
void round_blocks(std::vector<double> &x, size_t block) {
    for (size_t begin = 0; begin < x.size(); begin += block) {
        const size_t end = std::min(begin + block, x.size());
        float most = 0;
        for (size_t k = begin; k < end; ++k) most = std::max(most, float(std::fabs(x[k])));
        const float scale = most / 127.0f, inverse = most > 0 ? 127.0f / most : 0.0f;
        for (size_t k = begin; k < end; ++k)
            x[k] = double(std::nearbyint(float(x[k]) * inverse)) * double(scale);
    }
}

}  // namespace

std::vector<double> reference_row(const ingot_cpu_format &format, const void *weight, size_t columns,
                                  size_t row) {
    const Layout layout(format, columns);
    const uint8_t *panel = static_cast<const uint8_t *>(weight) + row / kRows * layout.bytes;
    const size_t lane = row % kRows;
    std::vector<double> result(columns);
    for (size_t k = 0; k < columns; ++k) {
        if (format.numbers == INGOT_CPU_FLOAT32) {
            result[k] = read<float>(panel, k * kRows + lane);
        } else if (format.numbers == INGOT_CPU_BFLOAT16) {
            result[k] = from_bfloat16(read<uint16_t>(panel, (k / 2 * kRows + lane) * 2 + k % 2));
        } else {
            const bool four = format.numbers == INGOT_CPU_INT4;
            const size_t block = k / size_t(format.block), at = k % size_t(format.block);
            const uint8_t *numbers = panel + layout.numbers + block * layout.block_bytes;
            const int byte = four ? numbers[(at / 8 * kRows + lane) * 4 + at % 4]
                                  : numbers[(at / 4 * kRows + lane) * 4 + at % 4];
            const int number = !four ? byte : at % 8 < 4 ? byte & 15 : byte >> 4;
            const int zero = format.zero_points ? panel[layout.zeros + block * kRows + lane]
                                                : (four ? 8 : 128);
            const double scale = from_half(read<uint16_t>(panel + layout.scales, block * kRows + lane));
            result[k] = (number - zero) * scale * read<float>(panel, lane);
        }
    }
    return result;
}

std::vector<double> reference_product(const ingot_cpu_format &format, const void *weight,
                                      std::vector<double> x, size_t rows, int32_t rounding) {
    if (rounding == INGOT_CPU_TO_INT8 && is_whole(format)) round_blocks(x, size_t(format.block));
    if (rounding == INGOT_CPU_TO_BFLOAT16 && format.numbers == INGOT_CPU_BFLOAT16)
        for (double &each : x) each = to_bfloat16(float(each));
    std::vector<double> y(rows);
    for (size_t row = 0; row < rows; ++row) {
        const std::vector<double> w = reference_row(format, weight, x.size(), row);
        for (size_t k = 0; k < x.size(); ++k) y[row] += x[k] * w[k];
    }
    return y;
}

double reference_activation(int32_t activation, double x) {
    switch (activation) {
        case INGOT_CPU_SILU: return x / (1 + std::exp(-x));
        case INGOT_CPU_GELU: return x / 2 * (1 + std::erf(x / std::sqrt(2.0)));
        case INGOT_CPU_GELU_TANH:
            return x / 2 * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
        case INGOT_CPU_RELU: return std::max(x, 0.0);
        default: return x;
    }
}

void reference_linear(const ingot_cpu_linear_params &p) {
    const size_t columns = size_t(p.in_features);
    for (int32_t i = 0; i < p.count; ++i) {
        const ingot_cpu_linear_output &to = p.outputs[i];
        const size_t out = size_t(to.out_features);
        for (size_t n = 0; n < size_t(p.tokens); ++n) {
            const auto y = reference_product(p.format, to.weight, {p.x + n * columns, p.x + (n + 1) * columns},
                                             out, p.round_activations);
            for (size_t row = 0; row < out; ++row) {
                const double sum = y[row] + (to.bias ? to.bias[row] : 0.0);
                to.y[n * out + row] = float(to.residual ? to.residual[n * out + row] + to.scale * sum : sum);
            }
        }
    }
}

void reference_mlp(const ingot_cpu_mlp_params &p) {
    const size_t hidden = size_t(p.hidden), inner = size_t(p.intermediate);
    for (size_t n = 0; n < size_t(p.tokens); ++n) {
        const std::vector<double> x(p.x + n * hidden, p.x + (n + 1) * hidden);
        std::vector<double> h = reference_product(p.gate_up_format, p.gate, x, inner, p.round_activations);
        const auto up = reference_product(p.gate_up_format, p.up, x, inner, p.round_activations);
        for (size_t i = 0; i < inner; ++i) h[i] = reference_activation(p.activation, h[i]) * up[i];
        const auto y = reference_product(p.down_format, p.down, h, hidden, p.round_activations);
        for (size_t i = 0; i < hidden; ++i)
            p.y[n * hidden + i] = float(p.residual ? p.residual[n * hidden + i] + p.scale * y[i] : y[i]);
    }
}

}  // namespace ingot::cpu
