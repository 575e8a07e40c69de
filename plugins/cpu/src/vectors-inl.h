// Vectors of floats turned about, for each instruction set that includes this.
#if defined(INGOT_VECTORS_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef INGOT_VECTORS_INL_H_
#undef INGOT_VECTORS_INL_H_
#else
#define INGOT_VECTORS_INL_H_
#endif

#include <cstddef>

#include "hwy/highway.h"
#include "work.h"

HWY_BEFORE_NAMESPACE();
namespace ingot::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using Four = hn::FixedTag<float, 4>;
using V4 = hn::Vec<Four>;

// Four vectors of four as columns.
HWY_INLINE void transpose(V4 (&v)[4]) {
    const Four d;
    const hn::RepartitionToWide<hn::RebindToUnsigned<Four>> pairs;
    const auto a = hn::BitCast(pairs, hn::InterleaveLower(d, v[0], v[1]));
    const auto b = hn::BitCast(pairs, hn::InterleaveLower(d, v[2], v[3]));
    const auto e = hn::BitCast(pairs, hn::InterleaveUpper(d, v[0], v[1]));
    const auto f = hn::BitCast(pairs, hn::InterleaveUpper(d, v[2], v[3]));
    v[0] = hn::BitCast(d, hn::InterleaveLower(pairs, a, b));
    v[1] = hn::BitCast(d, hn::InterleaveUpper(pairs, a, b));
    v[2] = hn::BitCast(d, hn::InterleaveLower(pairs, e, f));
    v[3] = hn::BitCast(d, hn::InterleaveUpper(pairs, e, f));
}

// Rows of `size` numbers, each `stride` behind the other, side by side: [size][width].
HWY_INLINE void columns_of(const float *from, size_t stride, size_t rows, size_t size, float *to, size_t width) {
    const Four d;
    size_t i = 0;
    for (; i + 4 <= size; i += 4) {
        size_t r = 0;
        for (; r + 4 <= rows; r += 4) {
            V4 v[4];
            INGOT_UNROLL
            for (size_t j = 0; j < 4; ++j) v[j] = hn::LoadU(d, from + (r + j) * stride + i);
            transpose(v);
            INGOT_UNROLL
            for (size_t j = 0; j < 4; ++j) hn::StoreU(v[j], d, to + (i + j) * width + r);
        }
        for (; r < rows; ++r)
            for (size_t j = 0; j < 4; ++j) to[(i + j) * width + r] = from[r * stride + i + j];
    }
    for (; i < size; ++i)
        for (size_t r = 0; r < rows; ++r) to[i * width + r] = from[r * stride + i];
}

template <class D, class V = hn::Vec<D>>
HWY_INLINE V4 folded(D, V v) {
    if constexpr (HWY_MAX_LANES_D(D) == 4) {
        return v;
    } else {
        const hn::Half<D> half;
        return folded(half, hn::Add(hn::LowerHalf(half, v), hn::UpperHalf(half, v)));
    }
}

// The sums of four vectors.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V4 sums_of(D d, const V (&v)[4]) {
    const hn::RepartitionToWide<hn::RebindToUnsigned<D>> pairs;
    const V a = hn::Add(hn::InterleaveLower(d, v[0], v[1]), hn::InterleaveUpper(d, v[0], v[1]));
    const V b = hn::Add(hn::InterleaveLower(d, v[2], v[3]), hn::InterleaveUpper(d, v[2], v[3]));
    const auto a2 = hn::BitCast(pairs, a), b2 = hn::BitCast(pairs, b);
    return folded(d, hn::Add(hn::BitCast(d, hn::InterleaveLower(pairs, a2, b2)),
                             hn::BitCast(d, hn::InterleaveUpper(pairs, a2, b2))));
}

}  // namespace HWY_NAMESPACE
}  // namespace ingot::cpu
HWY_AFTER_NAMESPACE();

#endif
