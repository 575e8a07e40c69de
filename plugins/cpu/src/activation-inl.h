// Activations of vectors of floats, for each instruction set that includes this.
#if defined(INGOT_ACTIVATION_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef INGOT_ACTIVATION_INL_H_
#undef INGOT_ACTIVATION_INL_H_
#else
#define INGOT_ACTIVATION_INL_H_
#endif

#include <cmath>

#include "hwy/contrib/math/math-inl.h"
#include "hwy/highway.h"
#include "panels.h"

HWY_BEFORE_NAMESPACE();
namespace ingot::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// x / (1 + exp(-x)); of -inf that is 0, as it is of all that exp makes infinite.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V silu(D d, V x) {
    // Highway's exp is meant for what is finite.
    const V bounded = hn::Max(hn::Min(x, hn::Set(d, 88.0f)), hn::Set(d, -88.0f));
    const V sigmoid = hn::Div(hn::Set(d, 1.0f), hn::Add(hn::Set(d, 1.0f), hn::Exp(d, hn::Neg(bounded))));
    const V result = hn::Mul(x, sigmoid);
    return hn::IfThenElse(hn::Lt(x, hn::Set(d, -104.0f)), hn::Neg(hn::Zero(d)), result);
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V gelu_tanh(D d, V x) {
    const V cube = hn::Mul(x, hn::Mul(x, x));
    const V inner = hn::Mul(hn::Set(d, 0.7978845608028654f), hn::MulAdd(hn::Set(d, 0.044715f), cube, x));
    const V bounded = hn::Max(hn::Min(inner, hn::Set(d, 20.0f)), hn::Set(d, -20.0f));
    const V tanh = hn::Tanh(d, bounded);
    return hn::Mul(hn::Mul(hn::Set(d, 0.5f), x), hn::Add(hn::Set(d, 1.0f), tanh));
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V gelu(D d, V x) {
    // No vector library here has erf to float32's precision; few models ask for it.
    HWY_ALIGN float values[HWY_MAX_LANES_D(D)];
    hn::Store(x, d, values);
    for (size_t lane = 0; lane < hn::Lanes(d); ++lane)
        values[lane] = float(0.5 * double(values[lane]) * (1 + std::erf(double(values[lane]) * 0.7071067811865476)));
    return hn::Load(d, values);
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V activate(D d, int32_t activation, V x) {
    switch (activation) {
        case INGOT_CPU_SILU: return silu(d, x);
        case INGOT_CPU_GELU: return gelu(d, x);
        case INGOT_CPU_GELU_TANH: return gelu_tanh(d, x);
        case INGOT_CPU_RELU: return hn::IfThenElse(hn::Lt(x, hn::Zero(d)), hn::Zero(d), x);
        default: return x;
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace ingot::cpu
HWY_AFTER_NAMESPACE();

#endif
