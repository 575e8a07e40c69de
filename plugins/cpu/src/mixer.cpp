// ingot_cpu_mamba2_mixer: the convolution and the scan where they lie in what was projected, and the
// gated norm, a token at a time.
#include <algorithm>
#include <cmath>

#include "reference.h"
#include "refuse.h"
#include "targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "mixer.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "activation-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ingot::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// y [I] of tokens [begin, end), gated and normed in place.
void Gate(const ingot_cpu_mamba2_mixer_params &p, size_t begin, size_t end) {
    const hn::CappedTag<float, 16> d;
    using V = hn::Vec<decltype(d)>;
    const size_t lanes = hn::Lanes(d), inner = size_t(p.heads * p.head_size);
    const size_t stride = 2 * inner + size_t(2 * p.groups * p.states + p.heads);
    const size_t groups = p.norm_groups ? size_t(p.norm_groups) : 1, size = inner / groups;
    for (size_t token = begin; token < end; ++token)
        for (size_t group = 0; group < groups; ++group) {
            float *y = p.y + token * inner + group * size;
            const float *gate = p.projected + token * stride + group * size;
            V squares = hn::Zero(d);
            const auto gated = [&](V value, V of) HWY_ATTR {
                const V result = hn::Mul(value, silu(d, of));
                squares = hn::MulAdd(result, result, squares);
                return result;
            };
            size_t i = 0;
            for (; i + lanes <= size; i += lanes) hn::StoreU(gated(hn::LoadU(d, y + i), hn::LoadU(d, gate + i)), d, y + i);
            if (const size_t left = size - i)
                hn::StoreN(gated(hn::LoadN(d, y + i, left), hn::LoadN(d, gate + i, left)), d, y + i, left);
            if (!p.norm_groups) continue;
            const float mean = hn::ReduceSum(d, squares) / float(size);
            const V factor = hn::Set(d, 1.0f / std::sqrt(mean + p.epsilon));
            const float *norm = p.norm + group * size;
            for (i = 0; i < size; i += lanes) {
                const size_t left = size - i;
                const V normed = hn::Mul(hn::LoadN(d, y + i, left), factor);
                hn::StoreN(hn::Mul(normed, hn::LoadN(d, norm + i, left)), d, y + i, left);
            }
        }
}

}  // namespace HWY_NAMESPACE
}  // namespace ingot::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ingot::cpu {
namespace {

HWY_EXPORT(Gate);

// Numbers that a piece gates, at least.
constexpr size_t kPieceNumbers = size_t(1) << 14;

void check_call(int status) {
    if (status) throw Refused(last_error());
}

// In float64.
void reference_gate(const ingot_cpu_mamba2_mixer_params &p) {
    const size_t inner = size_t(p.heads * p.head_size);
    const size_t stride = 2 * inner + size_t(2 * p.groups * p.states + p.heads);
    const size_t groups = p.norm_groups ? size_t(p.norm_groups) : 1, size = inner / groups;
    for (size_t token = 0; token < size_t(p.batch * p.tokens); ++token)
        for (size_t group = 0; group < groups; ++group) {
            float *y = p.y + token * inner + group * size;
            const float *gate = p.projected + token * stride + group * size;
            double squares = 0;
            std::vector<double> gated(size);
            for (size_t i = 0; i < size; ++i) {
                gated[i] = y[i] * reference_activation(INGOT_CPU_SILU, gate[i]);
                squares += gated[i] * gated[i];
            }
            const double factor = 1 / std::sqrt(squares / double(size) + double(p.epsilon));
            for (size_t i = 0; i < size; ++i)
                y[i] = float(p.norm_groups ? gated[i] * factor * p.norm[group * size + i] : gated[i]);
        }
}

void compute(const ingot_cpu_mamba2_mixer_params &p, const ingot_cpu_threads &threads) {
    const int64_t inner = p.heads * p.head_size, channels = inner + 2 * p.groups * p.states;
    const int64_t stride = inner + channels + p.heads;
    const Buffer<float> mixed(size_t(p.batch * p.tokens * channels));
    const ingot_cpu_causal_conv_params conv{p.activation, p.batch, p.tokens, channels, p.width, stride,
                                            p.projected + inner, p.mask, p.conv_state, p.conv_weight, p.conv_bias,
                                            mixed.get(), p.new_conv_state};
    check_call(ingot_cpu_causal_conv(&conv, &threads));
    const ingot_cpu_mamba2_scan_params scan{
        p.batch, p.tokens, p.heads, p.head_size, p.groups, p.states, channels, stride, channels, p.dt_min, p.dt_max,
        mixed.get(), p.projected + inner + channels, p.a, mixed.get() + inner,
        mixed.get() + inner + p.groups * p.states, p.d, p.dt_bias, p.state, p.mask, p.y, p.new_state};
    check_call(ingot_cpu_mamba2_scan(&scan, &threads));
    if (use_reference()) return reference_gate(p);
    const auto gate = HWY_DYNAMIC_POINTER(Gate);
    const size_t tokens = size_t(p.batch * p.tokens);
    const size_t each = std::max<size_t>(1, kPieceNumbers / size_t(inner));
    run(threads, (tokens + each - 1) / each,
        [&](size_t piece) { gate(p, piece * each, std::min(tokens, (piece + 1) * each)); });
}

}  // namespace
}  // namespace ingot::cpu

using namespace ingot::cpu;

int ingot_cpu_mamba2_mixer(const ingot_cpu_mamba2_mixer_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_mamba2_mixer_params &p = *params;
        // What the sizes of the memory in between follow from; the rest is for the parts to refuse.
        check_size("batch", p.batch, 0);
        check_size("tokens", p.tokens, 0);
        check_size("heads", p.heads);
        check_size("head_size", p.head_size);
        check_size("groups", p.groups);
        check_size("states", p.states);
        check_size("norm_groups", p.norm_groups, 0);
        require(!p.norm_groups || p.heads * p.head_size % p.norm_groups == 0,
                "the heads are no multiple of norm_groups");
        compute(p, *threads);
    });
}
#endif  // HWY_ONCE
