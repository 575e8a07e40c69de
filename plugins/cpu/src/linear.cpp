// ingot_cpu_linear and ingot_cpu_embedding.
#include <algorithm>

#include "hwy/base.h"

#include "product.h"
#include "reference.h"
#include "refuse.h"
#include "targets.h"

namespace ingot::cpu {
namespace {

void check_sizes(int64_t tokens, int64_t in_features, int64_t out_features) {
    check_size("tokens", tokens, 0);
    check_size("in_features", in_features);
    check_size("out_features", out_features);
}

// What x is multiplied by in one call.
constexpr int32_t kMostOutputs = 64;

// One row of a table, as floats.
void look_up(const ingot_cpu_format &format, const Layout &layout, const uint8_t *table, size_t row,
             size_t columns, float *y) {
    const uint8_t *panel = table + row / kRows * layout.bytes;
    const size_t lane = row % kRows;
    if (format.numbers == INGOT_CPU_FLOAT32) {
        for (size_t k = 0; k < columns; ++k) y[k] = read<float>(panel, k * kRows + lane);
        return;
    }
    if (format.numbers == INGOT_CPU_BFLOAT16) {
        for (size_t k = 0; k < columns; ++k)
            y[k] = hwy::F32FromBF16(read<hwy::bfloat16_t>(panel, (k / 2 * kRows + lane) * 2 + k % 2));
        return;
    }
    const bool four = format.numbers == INGOT_CPU_INT4;
    const size_t block = size_t(format.block);
    const float factor = read<float>(panel, lane);
    for (size_t b = 0; b < layout.blocks; ++b) {
        const uint8_t *numbers = panel + layout.numbers + b * layout.block_bytes + lane * 4;
        const int middle = four ? 8 : 128;
        const int zero = format.zero_points ? panel[layout.zeros + b * kRows + lane] : middle;
        const float scale = factor * hwy::F32FromF16(
                                         read<hwy::float16_t>(panel + layout.scales, b * kRows + lane));
        const size_t end = std::min(block, columns - b * block);
        for (size_t k = 0; k < end; ++k) {
            const int byte = numbers[(four ? k / 8 : k / 4) * kRows * 4 + k % 4];
            const int number = !four ? byte : k % 8 < 4 ? byte & 15 : byte >> 4;
            y[b * block + k] = float(number - zero) * scale;
        }
    }
}

}  // namespace
}  // namespace ingot::cpu

using namespace ingot::cpu;

size_t ingot_cpu_weight_bytes(const ingot_cpu_format *format, int64_t out_features, int64_t in_features) {
    size_t bytes = 0;
    const int refused = answered([&] {
        check(*format);
        check_sizes(0, in_features, out_features);
        bytes = matrix_bytes(*format, size_t(out_features), size_t(in_features));
    });
    return refused ? 0 : bytes;
}

int ingot_cpu_linear(const ingot_cpu_linear_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_linear_params &p = *params;
        check(p.format);
        require(p.count >= 1 && p.count <= kMostOutputs, "a call has 1 to 64 weights");
        for (int32_t i = 0; i < p.count; ++i) check_sizes(p.tokens, p.in_features, p.outputs[i].out_features);
        if (!p.tokens) return;
        if (use_reference()) return reference_linear(p);
        std::vector<Target> targets;
        for (int32_t i = 0; i < p.count; ++i) {
            const ingot_cpu_linear_output &each = p.outputs[i];
            targets.push_back({size_t(each.out_features), each.y, each.bias, each.residual, each.scale});
        }
        std::vector<Job> jobs;
        for (int32_t i = 0; i < p.count; ++i)
            jobs.push_back({static_cast<const uint8_t *>(p.outputs[i].weight), 0, size_t(p.tokens), &targets[size_t(i)]});
        const Product product(p.format, size_t(p.in_features), p.round_activations, jobs.data(), jobs.size());
        product.pack(
            *threads,
            [](const void *self, size_t row) {
                const auto &given = *static_cast<const ingot_cpu_linear_params *>(self);
                return given.x + row * size_t(given.in_features);
            },
            &p);
        product.multiply(*threads);
    });
}

int ingot_cpu_embedding(const ingot_cpu_embedding_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_embedding_params &p = *params;
        check(p.format);
        check_sizes(p.tokens, p.in_features, p.out_features);
        for (int64_t n = 0; n < p.tokens; ++n)
            require(p.ids[n] >= -p.out_features && p.ids[n] < p.out_features, "an id is no row of the table");
        const size_t columns = size_t(p.in_features);
        const Layout layout(p.format, columns);
        run(*threads, size_t(p.tokens), [&](size_t n) {
            const int64_t id = p.ids[n] < 0 ? p.ids[n] + p.out_features : p.ids[n];
            look_up(p.format, layout, static_cast<const uint8_t *>(p.weight), size_t(id), columns,
                    p.y + n * columns);
        });
    });
}
