// ingot_cpu_causal_conv: channels in a vector, a piece of work some channels of one row over all
// tokens.
#include <algorithm>
#include <vector>

#include "reference.h"
#include "refuse.h"
#include "targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "conv.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "activation-inl.h"

#ifndef INGOT_CPU_CONV
#define INGOT_CPU_CONV
namespace ingot::cpu {

// Channels of a piece of work, and the tokens that are computed one behind the other for a vector
// of them.
constexpr size_t kChannels = 128;
constexpr size_t kTokens = 16;

}  // namespace ingot::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace ingot::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;
constexpr size_t kLanes = HWY_MAX_LANES_D(D);

// One piece's memory: [kChannels] for each tap and for each column of the state, and the bias.
struct Piece {
    size_t first, count;  // channels
    const float *taps, *past, *bias, *mask;  // the mask [T] of the row, or null
};

// [count][each] as [each][kChannels].
void columns(const float *from, size_t count, size_t each, float *to) {
    const D d;
    size_t c = 0;
    if (each == 4) {
        for (; c + kLanes <= count; c += kLanes) {
            V v0, v1, v2, v3;
            hn::LoadInterleaved4(d, from + c * 4, v0, v1, v2, v3);
            hn::StoreU(v0, d, to + c);
            hn::StoreU(v1, d, to + kChannels + c);
            hn::StoreU(v2, d, to + 2 * kChannels + c);
            hn::StoreU(v3, d, to + 3 * kChannels + c);
        }
    } else if (each == 3) {
        for (; c + kLanes <= count; c += kLanes) {
            V v0, v1, v2;
            hn::LoadInterleaved3(d, from + c * 3, v0, v1, v2);
            hn::StoreU(v0, d, to + c);
            hn::StoreU(v1, d, to + kChannels + c);
            hn::StoreU(v2, d, to + 2 * kChannels + c);
        }
    }
    for (; c < count; ++c)
        for (size_t w = 0; w < each; ++w) to[w * kChannels + c] = from[c * each + w];
}

// A vector of channels, tokens [begin, end). kWidth is W, or 0 where it is another.
template <size_t kWidth>
HWY_INLINE void tokens_of(const ingot_cpu_causal_conv_params &p, const Piece &piece, const float *x, float *y,
                          size_t c, size_t begin, size_t end) {
    const D d;
    const size_t left = piece.count - c, stride = size_t(p.channels), width = size_t(p.width);
    const size_t x_stride = size_t(p.x_stride);
    const bool whole = left >= kLanes;
    const V bias = hn::LoadU(d, piece.bias + c);
    // Column t of the window, which begins width - 1 before the first token.
    const auto column = [&](size_t t) HWY_ATTR {
        if (t + 1 < width) return hn::LoadU(d, piece.past + t * kChannels + c);
        const size_t token = t + 1 - width;
        const float *from = x + token * x_stride + c;
        const V loaded = whole ? hn::LoadU(d, from) : hn::LoadN(d, from, left);
        return piece.mask ? hn::Mul(loaded, hn::Set(d, piece.mask[token])) : loaded;
    };
    const auto store = [&](size_t t, V sum) HWY_ATTR {
        if (whole)
            hn::StoreU(sum, d, y + t * stride + c);
        else
            hn::StoreN(sum, d, y + t * stride + c, left);
    };
    if constexpr (kWidth == 4) {
        const V w0 = hn::LoadU(d, piece.taps + c), w1 = hn::LoadU(d, piece.taps + kChannels + c),
                w2 = hn::LoadU(d, piece.taps + 2 * kChannels + c),
                w3 = hn::LoadU(d, piece.taps + 3 * kChannels + c);
        V v0 = column(begin), v1 = column(begin + 1), v2 = column(begin + 2);
        for (size_t t = begin; t < end; ++t) {
            const V v3 = column(t + 3);
            store(t, hn::MulAdd(w3, v3, hn::MulAdd(w2, v2, hn::MulAdd(w1, v1, hn::MulAdd(w0, v0, bias)))));
            v0 = v1, v1 = v2, v2 = v3;
        }
    } else {
        for (size_t t = begin; t < end; ++t) {
            V sum = bias;
            for (size_t w = 0; w < width; ++w)
                sum = hn::MulAdd(hn::LoadU(d, piece.taps + w * kChannels + c), column(t + w), sum);
            store(t, sum);
        }
    }
}

// The activation of [rows][count] numbers, rows `stride` apart.
void activated(int32_t activation, float *y, size_t rows, size_t stride, size_t count) {
    const D d;
    // Nearly always it is this; without the others in it the loop keeps its constants in registers.
    const auto each = [&](const auto &of) HWY_ATTR {
        for (float *row = y; row < y + rows * stride; row += stride) {
            size_t c = 0;
            for (; c + kLanes <= count; c += kLanes) hn::StoreU(of(hn::LoadU(d, row + c)), d, row + c);
            if (c < count) hn::StoreN(of(hn::LoadN(d, row + c, count - c)), d, row + c, count - c);
        }
    };
    if (activation == INGOT_CPU_SILU)
        each([&](V v) HWY_ATTR { return silu(d, v); });
    else if (activation != INGOT_CPU_IDENTITY)
        each([&](V v) HWY_ATTR { return activate(d, activation, v); });
}

// Channels [first, first + count) of one row.
void Channels(const ingot_cpu_causal_conv_params &p, size_t row, size_t first, size_t count) {
    const auto tokens = size_t(p.tokens), channels = size_t(p.channels), width = size_t(p.width);
    const Buffer<float> memory(2 * width * kChannels);
    float *taps = memory.get(), *past = taps + width * kChannels, *bias = past + (width - 1) * kChannels;
    // Lanes past the last channel compute something too.
    std::fill_n(taps, 2 * width * kChannels, 0.0f);
    columns(p.weight + first * width, count, width, taps);
    columns(p.state + (row * channels + first) * (width - 1), count, width - 1, past);
    if (p.bias) std::copy_n(p.bias + first, count, bias);
    const size_t x_stride = size_t(p.x_stride);
    const Piece piece{first, count, taps, past, bias, p.mask ? p.mask + row * tokens : nullptr};
    const float *x = p.x + row * tokens * x_stride + first;
    float *y = p.y + row * tokens * channels + first;
    for (size_t begin = 0; begin < tokens; begin += kTokens) {
        const size_t end = std::min(begin + kTokens, tokens);
        for (size_t c = 0; c < count; c += kLanes)
            if (width == 4)
                tokens_of<4>(p, piece, x, y, c, begin, end);
            else
                tokens_of<0>(p, piece, x, y, c, begin, end);
        activated(p.activation, y + begin * channels, end - begin, channels, count);
    }
    float *to = p.new_state + (row * channels + first) * (width - 1);
    for (size_t w = 0; w + 1 < width; ++w) {
        // The window is the state, then x.
        const size_t t = tokens + w;
        const bool new_one = t + 1 >= width;
        const float *from = new_one ? x + (t + 1 - width) * x_stride : past + t * kChannels;
        const float factor = new_one && piece.mask ? piece.mask[t + 1 - width] : 1.0f;
        for (size_t c = 0; c < count; ++c) to[c * (width - 1) + w] = from[c] * factor;
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace ingot::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ingot::cpu {
namespace {

HWY_EXPORT(Channels);

// Numbers that a piece computes, at least.
constexpr size_t kPieceNumbers = size_t(1) << 13;

void compute(const ingot_cpu_causal_conv_params &p, const ingot_cpu_threads &threads) {
    const auto channels_of = HWY_DYNAMIC_POINTER(Channels);
    const size_t channels = size_t(p.channels), blocks = (channels + kChannels - 1) / kChannels;
    const size_t all = size_t(p.batch) * blocks;
    const size_t numbers = (size_t(p.tokens) + size_t(p.width)) * kChannels;
    const size_t pieces = std::min(all, all * numbers / kPieceNumbers + 1);
    run(threads, pieces, [&](size_t piece) {
        for (size_t i = all * piece / pieces; i < all * (piece + 1) / pieces; ++i) {
            const size_t first = i % blocks * kChannels;
            channels_of(p, i / blocks, first, std::min(kChannels, channels - first));
        }
    });
}

// Tap by tap, in float64.
void reference_conv(const ingot_cpu_causal_conv_params &p) {
    const auto tokens = size_t(p.tokens), channels = size_t(p.channels), width = size_t(p.width);
    for (size_t row = 0; row < size_t(p.batch) * channels; ++row) {
        const size_t batch = row / channels, c = row % channels;
        std::vector<float> window(p.state + row * (width - 1), p.state + (row + 1) * (width - 1));
        for (size_t t = 0; t < tokens; ++t) {
            const float x = p.x[(batch * tokens + t) * size_t(p.x_stride) + c];
            window.push_back(p.mask ? x * p.mask[batch * tokens + t] : x);
            double sum = p.bias ? p.bias[c] : 0.0;
            for (size_t w = 0; w < width; ++w) sum += double(p.weight[c * width + w]) * window[t + w];
            p.y[(batch * tokens + t) * channels + c] = float(reference_activation(p.activation, sum));
        }
        std::copy(window.begin() + ptrdiff_t(tokens), window.end(), p.new_state + row * (width - 1));
    }
}

}  // namespace
}  // namespace ingot::cpu

using namespace ingot::cpu;

int ingot_cpu_causal_conv(const ingot_cpu_causal_conv_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_causal_conv_params &p = *params;
        check_activation(p.activation);
        check_size("batch", p.batch, 0);
        check_size("tokens", p.tokens, 0);
        check_size("channels", p.channels);
        check_size("width", p.width);
        require(p.x_stride >= p.channels, "x_stride is shorter than a token");
        if (use_reference()) return reference_conv(p);
        compute(p, *threads);
    });
}
#endif  // HWY_ONCE
