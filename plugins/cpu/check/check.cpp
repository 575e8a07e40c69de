// Every kernel on every instruction set that the processor has, against the library's own plain
// loops in float64. A program of its own, so that it runs where Python does not: under emulators of
// other processors, sanitizers and memcheck.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "ingot_cpu.h"
#include "panels.h"

namespace {

using Floats = std::vector<float>;

std::mt19937 generator(0);

float drawn(float low, float high) { return std::uniform_real_distribution<float>(low, high)(generator); }

Floats floats(size_t count, float size = 1) {
    Floats result(count);
    for (float &each : result) each = drawn(-size, size);
    return result;
}

// Weights whose numbers are anything, and whose scales are usual.
std::vector<uint8_t> weight(const ingot_cpu_format &format, size_t rows, size_t columns) {
    const ingot::cpu::Layout layout(format, columns);
    std::vector<uint8_t> result(ingot_cpu_weight_bytes(&format, int64_t(rows), int64_t(columns)));
    for (uint8_t *panel = result.data(); panel < result.data() + result.size(); panel += layout.bytes) {
        if (ingot::cpu::is_whole(format)) {
            for (size_t i = layout.zeros; i < layout.bytes; ++i) panel[i] = uint8_t(generator());
            for (size_t i = 0; i < layout.blocks * 16; ++i) {
                const uint16_t half = uint16_t(0x2000 + generator() % 0x800);
                std::memcpy(panel + layout.scales + i * 2, &half, 2);
                if (format.zero_points && format.numbers == INGOT_CPU_INT4) panel[layout.zeros + i] &= 15;
            }
            const Floats factors(16, 0.5f);
            std::memcpy(panel, factors.data(), 64);
        } else if (format.numbers == INGOT_CPU_FLOAT32) {
            const Floats numbers = floats(layout.bytes / 4);
            std::memcpy(panel, numbers.data(), layout.bytes);
        } else {
            for (size_t i = 0; i < layout.bytes / 2; ++i) {
                const float number = drawn(-1, 1);
                std::memcpy(panel + i * 2, reinterpret_cast<const char *>(&number) + 2, 2);
            }
        }
    }
    return result;
}

struct Pool : ingot_cpu_threads {
    Pool() {
        self = nullptr;
        run = [](void *, size_t count, void (*task)(void *, size_t), void *data) {
            std::thread other([&] {
                for (size_t i = 1; i < count; i += 2) task(data, i);
            });
            for (size_t i = 0; i < count; i += 2) task(data, i);
            other.join();
        };
    }
} pool;

const ingot_cpu_format kFormats[] = {
    {INGOT_CPU_FLOAT32, 0, 0}, {INGOT_CPU_BFLOAT16, 0, 0}, {INGOT_CPU_INT8, 32, 0},
    {INGOT_CPU_INT8, 128, 1},  {INGOT_CPU_INT4, 64, 0},    {INGOT_CPU_INT4, 32, 1},
};

int failures = 0;

// Outputs of a call on one target and by plain loops: equal within `close` of the largest.
template <typename Call>
void compare(const char *target, const std::string &what, size_t outputs, double close, const Call &call) {
    Floats found(outputs, NAN), expected(outputs, NAN);
    const auto checked = [&](int status) {
        if (status) {
            std::printf("%s: %s: refused: %s\n", target, what.c_str(), ingot_cpu_last_error());
            ++failures;
        }
    };
    ingot_cpu_use("reference");
    checked(call(expected.data()));
    ingot_cpu_use(target);
    checked(call(found.data()));
    double most = 0, worst = 0;
    for (size_t i = 0; i < outputs; ++i) {
        most = std::max(most, std::fabs(double(expected[i])));
        const double error = std::fabs(double(found[i]) - double(expected[i]));
        worst = std::isnan(error) ? INFINITY : std::max(worst, error);
    }
    if (!(worst <= close * most)) {
        std::printf("%s: %s: off by %g of %g\n", target, what.c_str(), worst, most);
        ++failures;
    }
}

std::string said(const char *name, std::initializer_list<size_t> sizes) {
    std::ostringstream text;
    text << name << " sizes";
    for (const size_t size : sizes) text << " " << size;
    return text.str();
}

std::string said(const char *name, const ingot_cpu_format &f, std::initializer_list<size_t> sizes) {
    std::ostringstream text;
    text << name << " numbers " << f.numbers << " block " << f.block << " zero points " << f.zero_points;
    return said(text.str().c_str(), sizes);
}

void check_linear(const char *target, const ingot_cpu_format &format, int32_t rounds, size_t n, size_t k, size_t o) {
    const Floats x = floats(n * k), bias = floats(o);
    const auto w = weight(format, o, k);
    compare(target, said("linear", format, {n, k, o, size_t(rounds)}), n * o, 2e-6 * std::sqrt(double(k)), [&](float *y) {
        const ingot_cpu_linear_output to{int64_t(o), w.data(), bias.data(), nullptr, 1, y};
        const ingot_cpu_linear_params p{format, rounds, 1, int64_t(n), int64_t(k), x.data(), &to};
        return ingot_cpu_linear(&p, &pool);
    });
}

void check_embedding(const char *target, const ingot_cpu_format &format, size_t k, size_t o) {
    const auto w = weight(format, o, k);
    const int64_t ids[] = {0, int64_t(o) - 1, -1, int64_t(o) / 2};
    compare(target, said("embedding", format, {k, o}), 4 * k, 0, [&](float *y) {
        const ingot_cpu_embedding_params p{format, 4, int64_t(k), int64_t(o), ids, w.data(), y};
        return ingot_cpu_embedding(&p, &pool);
    });
}

void check_experts(const char *target, const ingot_cpu_format &format, size_t n, size_t h, size_t inner, size_t experts, size_t top_k) {
    const Floats x = floats(n * h, 1.0f / float(h)), logits = floats(n * experts, 3);
    std::vector<uint8_t> gate_up, down;
    for (size_t each = 0; each < experts; ++each) {
        const auto one = weight(format, 2 * inner, h), other = weight(format, h, inner);
        gate_up.insert(gate_up.end(), one.begin(), one.end());
        down.insert(down.end(), other.begin(), other.end());
    }
    for (const int32_t activation : {INGOT_CPU_SILU, INGOT_CPU_GELU, INGOT_CPU_GELU_TANH, INGOT_CPU_RELU, INGOT_CPU_IDENTITY})
        compare(target, said("moe_dispatch", format, {n, h, inner, experts, top_k, size_t(activation)}), n * h, 1e-5, [&](float *y) {
            const ingot_cpu_moe_dispatch_params p{
                format, format, 0, activation, activation % 2, int32_t(top_k), int64_t(n), int64_t(h), int64_t(inner),
                int64_t(experts), x.data(), logits.data(), gate_up.data(), down.data(), y};
            return ingot_cpu_moe_dispatch(&p, &pool);
        });
    std::vector<int64_t> ids(n * top_k);
    for (int64_t &id : ids) id = int64_t(generator() % experts);
    compare(target, said("moe_linear", format, {n, h, 2 * inner, experts, top_k}), n * top_k * 2 * inner, 1e-5, [&](float *y) {
        const ingot_cpu_moe_linear_params p{format, 0, 0, int32_t(top_k), int64_t(n), int64_t(h), int64_t(2 * inner),
                                            int64_t(experts), x.data(), ids.data(), gate_up.data(), y};
        return ingot_cpu_moe_linear(&p, &pool);
    });
}

void check_scan(const char *target, size_t batch, size_t tokens, size_t heads, size_t size, size_t groups, size_t states) {
    const size_t rows = batch * tokens, outputs = rows * heads * size;
    const Floats x = floats(outputs), dt = floats(rows * heads, 3), b = floats(rows * groups * states),
                 c = floats(rows * groups * states, 1 / std::sqrt(float(states))), d = floats(heads), bias = floats(heads, 2),
                 state = floats(batch * heads * size * states);
    Floats a = floats(heads, 4), mask(rows, 1);
    for (float &each : a) each = -std::fabs(each);
    for (size_t i = 0; i < rows; i += 3) mask[i] = 0;
    compare(target, said("mamba2_scan", {batch, tokens, heads, size, groups, states}), outputs + state.size(), 1e-5, [&](float *y) {
        const ingot_cpu_mamba2_scan_params p{
            int64_t(batch), int64_t(tokens), int64_t(heads), int64_t(size), int64_t(groups), int64_t(states), int64_t(heads * size),
            int64_t(heads), int64_t(groups * states), 0.001f, INFINITY,
            x.data(), dt.data(), a.data(), b.data(), c.data(), d.data(), bias.data(), state.data(), mask.data(), y, y + outputs};
        return ingot_cpu_mamba2_scan(&p, &pool);
    });
}

void check_conv(const char *target, size_t batch, size_t tokens, size_t channels, size_t width) {
    const size_t outputs = batch * tokens * channels;
    const Floats x = floats(outputs), state = floats(batch * channels * (width - 1)), weight = floats(channels * width),
                 bias = floats(channels);
    for (const int32_t activation : {INGOT_CPU_SILU, INGOT_CPU_GELU, INGOT_CPU_GELU_TANH, INGOT_CPU_RELU, INGOT_CPU_IDENTITY})
        compare(target, said("causal_conv", {batch, tokens, channels, width, size_t(activation)}), outputs + state.size(), 1e-5,
                [&](float *y) {
                    const ingot_cpu_causal_conv_params p{
                        activation, int64_t(batch), int64_t(tokens), int64_t(channels), int64_t(width), int64_t(channels), x.data(), nullptr, state.data(),
                        weight.data(), activation % 2 ? bias.data() : nullptr, y, y + outputs};
                    return ingot_cpu_causal_conv(&p, &pool);
                });
}

void check_mixer(const char *target, size_t batch, size_t tokens, size_t heads, size_t size, size_t groups, size_t states, size_t norm_groups) {
    const size_t rows = batch * tokens, inner = heads * size, channels = inner + 2 * groups * states, width = 4;
    const Floats projected = floats(rows * (inner + channels + heads)), window = floats(batch * channels * (width - 1)),
                 state = floats(batch * inner * states), taps = floats(channels * width), conv_bias = floats(channels),
                 d = floats(heads), bias = floats(heads, 2), norm = floats(inner);
    Floats a = floats(heads, 4), mask(rows, 1);
    for (float &each : a) each = -std::fabs(each);
    for (size_t i = 0; i < rows; i += 3) mask[i] = 0;
    compare(target, said("mamba2_mixer", {batch, tokens, heads, size, groups, states, norm_groups}),
            rows * inner + window.size() + state.size(), 2e-5, [&](float *y) {
                const ingot_cpu_mamba2_mixer_params p{
                    INGOT_CPU_SILU, int64_t(batch), int64_t(tokens), int64_t(heads), int64_t(size), int64_t(groups),
                    int64_t(states), int64_t(width), int64_t(norm_groups), 1e-5f, 0.001f, INFINITY, projected.data(), mask.data(),
                    window.data(), state.data(), taps.data(), conv_bias.data(), a.data(), d.data(), bias.data(),
                    norm_groups ? norm.data() : nullptr, y, y + rows * inner, y + rows * inner + window.size()};
                return ingot_cpu_mamba2_mixer(&p, &pool);
            });
}

void check_attention(const char *target, size_t batch, size_t tokens, size_t past, size_t heads, size_t shared, size_t size) {
    const size_t total = past + tokens, outputs = batch * tokens * heads * shared * size, room = batch * heads * (total + 1) * size;
    const Floats query = floats(outputs), key = floats(batch * tokens * heads * size), value = floats(batch * tokens * heads * size),
                 keys = floats(batch * heads * past * size), values = floats(batch * heads * past * size);
    const size_t turned = size / 4;
    const Floats cos = floats(batch * tokens * turned), sin = floats(batch * tokens * turned);
    std::vector<uint8_t> visible(batch * tokens * total);
    for (size_t i = 0; i < visible.size(); ++i) {
        const size_t t = i / total % tokens + past, k = i % total;
        visible[i] = k == t || (k < t && generator() % 4);
    }
    compare(target, said("attention", {batch, tokens, past, heads, shared, size}), outputs + 2 * room, 1e-5, [&](float *y) {
        std::fill_n(y + outputs, 2 * room, 0.0f);
        const ingot_cpu_attention_params p{
            int64_t(batch), int64_t(tokens), int64_t(heads * shared), int64_t(heads), int64_t(size), int64_t(past), int64_t(past),
            int64_t(total + 1), int64_t(2 * turned), 0.3f, query.data(), key.data(), value.data(), cos.data(), sin.data(),
            visible.data(), keys.data(), values.data(), y + outputs, y + outputs + room, y};
        return ingot_cpu_attention(&p, &pool);
    });
}

}  // namespace

int main() {
    std::stringstream all(ingot_cpu_targets());
    for (std::string target; std::getline(all, target, ',');) {
        const int before = failures;
        generator.seed(0);
        for (const auto &format : kFormats) {
            for (const auto &[n, k, o] : {std::tuple<size_t, size_t, size_t>{1, 7, 5}, {3, 64, 40}, {4, 300, 33}, {7, 129, 50}, {26, 600, 70}})
                for (const int32_t rounds : {0, 1, 2}) check_linear(target.c_str(), format, rounds, n, k, o);
            check_embedding(target.c_str(), format, 75, 37);
            check_experts(target.c_str(), format, 1, 40, 24, 3, 2);
            check_experts(target.c_str(), format, 9, 70, 33, 4, 3);
        }
        check_scan(target.c_str(), 1, 1, 24, 64, 1, 128);
        check_scan(target.c_str(), 2, 33, 6, 5, 3, 7);
        check_scan(target.c_str(), 3, 40, 3, 37, 1, 50);
        check_scan(target.c_str(), 1, 70, 64, 66, 2, 20);
        for (const size_t width : {1, 2, 3, 4, 7}) {
            check_conv(target.c_str(), 1, 1, 300, width);
            check_conv(target.c_str(), 2, 20, 133, width);
        }
        check_mixer(target.c_str(), 2, 1, 6, 5, 3, 7, 0);
        check_mixer(target.c_str(), 1, 37, 4, 16, 2, 20, 2);
        check_attention(target.c_str(), 2, 1, 5, 2, 3, 24);
        check_attention(target.c_str(), 1, 1, 700, 1, 4, 64);
        check_attention(target.c_str(), 1, 70, 0, 2, 1, 40);
        check_attention(target.c_str(), 2, 9, 130, 1, 3, 17);
        std::printf("%s: %s\n", target.c_str(), failures == before ? "right" : "WRONG");
    }
    return failures != 0;
}
