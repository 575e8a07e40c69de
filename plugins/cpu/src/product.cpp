// The kernels of product.h, compiled for every instruction set.
#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "product.cpp"
#include "hwy/foreach_target.h"
#include "hwy/cache_control.h"
#include "hwy/highway.h"
#include "hwy/targets.h"

#ifndef INGOT_CPU_PRODUCT
#define INGOT_CPU_PRODUCT
namespace ingot::cpu {

// Rows of a job that are too few for tiles, and the most panels that they are multiplied with at a time.
constexpr size_t kFewRows = 4;
constexpr size_t kSpread = 4;

}  // namespace ingot::cpu
#endif

HWY_BEFORE_NAMESPACE();
namespace ingot::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::CappedTag<float, kRows>;
using U32 = hn::RebindToUnsigned<F32>;
using I32 = hn::RebindToSigned<F32>;
using U8 = hn::Repartition<uint8_t, F32>;
using I8 = hn::Repartition<int8_t, F32>;
using F16 = hn::Rebind<hwy::float16_t, F32>;
using VF = hn::Vec<F32>;
using VU = hn::Vec<U32>;
using VI = hn::Vec<I32>;

constexpr size_t kLanes = HWY_MAX_LANES_D(F32);
// Vectors of a panel's sixteen rows.
constexpr size_t kVectors = kRows / kLanes;
// Panels of a tile of sums, and the most rows of x: what the registers hold.
constexpr size_t kPanels = kVectors == 1 ? 2 : 1;
constexpr size_t kWide = kPanels * kVectors;
constexpr size_t kTileRows = kVectors == 1 ? 12 : kVectors == 2 ? 5 : HWY_ARCH_ARM ? 6 : 2;
constexpr size_t kRoundedRows = kVectors == 1 ? 6 : 2;
// With so few rows a product waits for memory.
constexpr size_t kStreamedRows = 2;
// Panels that few rows are multiplied with at a time, as many as the registers hold the sums of. Each
// is a stream of its own, of which the next lines are asked for so many bytes ahead: a processor's
// own prefetching ends with a page, and while one stream waits for the address of its next page the
// others go on.
template <size_t kTall>
constexpr size_t kStreams = kTall * kVectors <= 2                   ? kSpread
                            : kTall * kVectors <= 4 && kVectors < 4 ? 2
                                                                    : 1;
constexpr size_t kAhead = 2048;
// Whether products of bfloat16 in pairs may be compiled; HasPairs says whether they run.
#undef INGOT_PAIRS
#if HWY_TARGET == HWY_AVX3_DL && HWY_COMPILER_GCC_ACTUAL >= 1000
#define INGOT_PAIRS 1
#else
#define INGOT_PAIRS 0
#endif
// Columns and panels that are decoded at a time: what a second-level cache holds beside x.
constexpr size_t kDepth = 256;
constexpr size_t kAbreast = 8;

// Columns of a group, which a vector holds of each row.
template <int kNumbers>
constexpr size_t kGroup = kNumbers == INGOT_CPU_FLOAT32    ? 1
                          : kNumbers == INGOT_CPU_BFLOAT16 ? 2
                          : kNumbers == INGOT_CPU_INT8     ? 4
                                                           : 8;

HWY_INLINE VU load(const uint8_t *from) {
    return hn::LoadU(U32(), reinterpret_cast<const uint32_t *>(from));
}

// Column `at` of a group as floats; whole numbers without their zero points.
template <int kNumbers, int kAt>
HWY_INLINE VF column(VU group) {
    if constexpr (kNumbers == INGOT_CPU_FLOAT32) {
        return hn::BitCast(F32(), group);
    } else if constexpr (kNumbers == INGOT_CPU_BFLOAT16) {
        if constexpr (kAt == 0) return hn::BitCast(F32(), hn::ShiftLeft<16>(group));
        return hn::BitCast(F32(), hn::And(group, hn::Set(U32(), 0xffff0000u)));
    } else {
        constexpr int kShift = kNumbers == INGOT_CPU_INT8 ? 8 * kAt : 8 * (kAt % 4) + 4 * (kAt / 4);
        constexpr uint32_t kMask = kNumbers == INGOT_CPU_INT8 ? 255 : 15;
        VU number = kShift ? hn::ShiftRight<kShift>(group) : group;
        if constexpr (kShift < (kNumbers == INGOT_CPU_INT8 ? 24 : 28))
            number = hn::And(number, hn::Set(U32(), kMask));
        return hn::ConvertTo(F32(), hn::BitCast(I32(), number));
    }
}

template <int kNumbers>
constexpr float kMiddle = kNumbers == INGOT_CPU_INT8 ? 128.0f : 8.0f;

// The scales and zero points of one block.
template <int kNumbers>
struct Scales {
    HWY_INLINE Scales(const uint8_t *panel, const Layout &layout, bool zero_points, size_t block) {
        const auto *scales =
            reinterpret_cast<const hwy::float16_t *>(panel + layout.scales) + block * kRows;
        const uint8_t *zeros = panel + layout.zeros + block * kRows;
        const hn::Rebind<uint8_t, F32> bytes;
        INGOT_UNROLL
        for (size_t v = 0; v < kVectors; ++v) {
            scale[v] = hn::PromoteTo(F32(), hn::LoadU(F16(), scales + v * kLanes));
            zero[v] = zero_points ? hn::ConvertTo(F32(), hn::PromoteTo(I32(), hn::LoadU(bytes, zeros + v * kLanes)))
                                  : hn::Set(F32(), kMiddle<kNumbers>);
        }
    }
    VF scale[kVectors], zero[kVectors];
};

template <int kNumbers, size_t kAt = 0, typename Use>
HWY_INLINE void each_column(VU group, const Use &use) {
    if constexpr (kAt < kGroup<kNumbers>) {
        use(kAt, column<kNumbers, int(kAt)>(group));
        each_column<kNumbers, kAt + 1>(group, use);
    }
}

// Where the sums of a tile go: columns from `column` on, of rows from `row` on.
struct Ends {
    Ends(const Target &target, size_t row, size_t column)
        : y(target.y + row * target.out),
          bias(target.bias),
          residual(target.residual ? target.residual + row * target.out : nullptr),
          scale(target.scale),
          column(column),
          out(target.out) {}

    // Sums of row m, of the vector at `at`.
    HWY_INLINE void store(VF sum, size_t m, size_t at) const { store(sum, m, at, bias, residual); }

    // The same of a part of the columns of x: y has the sums of those before but of the first.
    HWY_INLINE void store_part(VF sum, size_t m, size_t at, bool first, bool last) const {
        store(sum, m, at, first ? bias : y + m * out, last ? residual : nullptr);
    }

   private:
    HWY_INLINE void store(VF sum, size_t m, size_t at, const float *add, const float *rest) const {
        const F32 d;
        const size_t here = column + at;
        if (here + kLanes <= out) {
            if (add) sum = hn::Add(sum, hn::LoadU(d, add + here));
            if (rest) sum = hn::MulAdd(sum, hn::Set(d, scale), hn::LoadU(d, rest + m * out + here));
            hn::StoreU(sum, d, y + m * out + here);
        } else if (here < out) {
            const size_t left = out - here;
            if (add) sum = hn::Add(sum, hn::LoadN(d, add + here, left));
            if (rest) sum = hn::MulAdd(sum, hn::Set(d, scale), hn::LoadN(d, rest + m * out + here, left));
            hn::StoreN(sum, d, y + m * out + here, left);
        }
    }

    float *y;
    const float *bias, *residual;
    float scale;
    size_t column, out;
};

// Few rows, float32 and bfloat16: panels side by side, their sums in registers to the end.
template <int kNumbers, size_t kTall, size_t kSpan>
HWY_INLINE void few_floats(const Product &p, const float *x, const uint8_t *const (&panels)[kSpan],
                           const Ends &to) {
    // Sums beside each other, since one chain of additions would wait for itself; as many for one
    // panel as for several, so that a sum does not depend on the panels it is computed with.
    constexpr size_t kAll = kTall * kVectors * kStreams<kTall>;
    constexpr size_t kChains = kAll >= 8 ? 1 : 8 / kAll;
    constexpr size_t kStep = kGroup<kNumbers>;
    const F32 d;
    VF sums[kChains][kTall][kSpan][kVectors];
    INGOT_UNROLL
    for (auto &chain : sums)
        INGOT_UNROLL
        for (auto &row : chain)
            INGOT_UNROLL
            for (auto &panel : row)
                INGOT_UNROLL
                for (auto &sum : panel) sum = hn::Zero(d);
    const auto step = [&](size_t chain, size_t group) HWY_ATTR {
        INGOT_UNROLL
        for (size_t s = 0; s < kSpan; ++s)
            INGOT_UNROLL
            for (size_t v = 0; v < kVectors; ++v) {
                const uint8_t *from = panels[s] + (group * kRows + v * kLanes) * 4;
                hwy::Prefetch(from + kAhead);
                const VU packed = load(from);
                each_column<kNumbers>(packed, [&](size_t at, VF w) HWY_ATTR {
                    INGOT_UNROLL
                    for (size_t m = 0; m < kTall; ++m)
                        sums[chain][m][s][v] = hn::MulAdd(
                            hn::Set(d, x[(group * kStep + at) * kTall + m]), w, sums[chain][m][s][v]);
                });
            }
    };
    const size_t groups = p.padded / kStep;
    size_t group = 0;
    for (; group + kChains <= groups; group += kChains)
        INGOT_UNROLL
        for (size_t chain = 0; chain < kChains; ++chain) step(chain, group + chain);
    for (; group < groups; ++group) step(0, group);
    INGOT_UNROLL
    for (size_t m = 0; m < kTall; ++m)
        INGOT_UNROLL
        for (size_t s = 0; s < kSpan; ++s)
            INGOT_UNROLL
            for (size_t v = 0; v < kVectors; ++v) {
                VF sum = sums[0][m][s][v];
                INGOT_UNROLL
                for (size_t chain = 1; chain < kChains; ++chain) sum = hn::Add(sum, sums[chain][m][s][v]);
                to.store(sum, m, s * kRows + v * kLanes);
            }
}

// Few rows, whole numbers.
template <int kNumbers, size_t kTall, size_t kSpan>
HWY_INLINE void few_whole(const Product &p, const float *x, const uint8_t *const (&panels)[kSpan],
                          const Ends &to) {
    constexpr size_t kStep = kGroup<kNumbers>;
    const F32 d;
    VF sums[kTall][kSpan][kVectors];
    INGOT_UNROLL
    for (auto &row : sums)
        INGOT_UNROLL
        for (auto &panel : row)
            INGOT_UNROLL
            for (auto &sum : panel) sum = hn::Zero(d);
    const size_t size = size_t(p.format.block), groups = size / kStep;
    for (size_t block = 0; block < p.layout.blocks; ++block) {
        const size_t offset = p.layout.numbers + block * p.layout.block_bytes;
        VF zeros[kSpan][kVectors], scales[kSpan][kVectors];
        INGOT_UNROLL
        for (size_t s = 0; s < kSpan; ++s) {
            const Scales<kNumbers> here(panels[s], p.layout, p.format.zero_points, block);
            INGOT_UNROLL
            for (size_t v = 0; v < kVectors; ++v) {
                zeros[s][v] = here.zero[v];
                scales[s][v] = here.scale[v];
            }
        }
        VF part[2][kTall][kSpan][kVectors];
        INGOT_UNROLL
        for (auto &chain : part)
            INGOT_UNROLL
            for (auto &row : chain)
                INGOT_UNROLL
                for (auto &panel : row)
                    INGOT_UNROLL
                    for (auto &sum : panel) sum = hn::Zero(d);
        for (size_t group = 0; group < groups; ++group) {
            const float *here = x + (block * size + group * kStep) * kTall;
            INGOT_UNROLL
            for (size_t s = 0; s < kSpan; ++s)
                INGOT_UNROLL
                for (size_t v = 0; v < kVectors; ++v) {
                    const uint8_t *from = panels[s] + offset + (group * kRows + v * kLanes) * 4;
                    hwy::Prefetch(from + kAhead);
                    each_column<kNumbers>(load(from), [&](size_t at, VF w) HWY_ATTR {
                        w = hn::Sub(w, zeros[s][v]);
                        INGOT_UNROLL
                        for (size_t m = 0; m < kTall; ++m)
                            part[at % 2][m][s][v] =
                                hn::MulAdd(hn::Set(d, here[at * kTall + m]), w, part[at % 2][m][s][v]);
                    });
                }
        }
        INGOT_UNROLL
        for (size_t m = 0; m < kTall; ++m)
            INGOT_UNROLL
            for (size_t s = 0; s < kSpan; ++s)
                INGOT_UNROLL
                for (size_t v = 0; v < kVectors; ++v)
                    sums[m][s][v] = hn::MulAdd(hn::Add(part[0][m][s][v], part[1][m][s][v]), scales[s][v],
                                               sums[m][s][v]);
    }
    INGOT_UNROLL
    for (size_t s = 0; s < kSpan; ++s)
        INGOT_UNROLL
        for (size_t v = 0; v < kVectors; ++v) {
            const VF factor = hn::LoadU(d, reinterpret_cast<const float *>(panels[s]) + v * kLanes);
            INGOT_UNROLL
            for (size_t m = 0; m < kTall; ++m)
                to.store(hn::Mul(sums[m][s][v], factor), m, s * kRows + v * kLanes);
        }
}

// A tile of sums: kTall rows of rounded x by kSpan panels.
template <int kNumbers, size_t kTall, size_t kSpan>
HWY_INLINE void rounded_tile(const Product &p, size_t row, const uint8_t *const (&panels)[kSpan],
                             const Ends &to) {
    const F32 d;
    const I32 di;
    const size_t size = size_t(p.format.block), quads = size / 4;
    const bool zero_points = p.format.zero_points != 0;
    const int8_t *x = p.numbers.get() + row * p.padded;
    const float *x_scales = p.scales.get() + row * p.layout.blocks;
    const int32_t *x_sums = p.sums.get() + row * p.layout.blocks;
    VF sums[kTall][kSpan][kVectors];
    INGOT_UNROLL
    for (auto &each : sums)
        INGOT_UNROLL
        for (auto &panel : each)
            INGOT_UNROLL
            for (auto &sum : panel) sum = hn::Zero(d);
    const auto quad = [&](const int8_t *at) HWY_ATTR {
        int32_t four;
        std::memcpy(&four, at, 4);
        return hn::BitCast(I8(), hn::Set(di, four));
    };
    // Sums beside each other, since one chain of additions would wait for itself.
    constexpr size_t kChains = kTall * kSpan * kVectors >= 4 ? 1 : 4 / (kTall * kSpan * kVectors);
    for (size_t block = 0; block < p.layout.blocks; ++block) {
        VI part[kChains][kTall][kSpan][kVectors];
        INGOT_UNROLL
        for (size_t m = 0; m < kTall; ++m) {
            // What the zero point is taken off for, where all numbers have the same.
            const int32_t sum = x_sums[block * kTall + m];
            const VI begin = hn::Set(di, zero_points ? 0 : -int32_t(kMiddle<kNumbers>) * sum);
            INGOT_UNROLL
            for (size_t s = 0; s < kSpan; ++s)
                INGOT_UNROLL
                for (size_t v = 0; v < kVectors; ++v) {
                    part[0][m][s][v] = begin;
                    INGOT_UNROLL
                    for (size_t chain = 1; chain < kChains; ++chain) part[chain][m][s][v] = hn::Zero(di);
                }
        }
        const size_t offset = p.layout.numbers + block * p.layout.block_bytes;
        const int8_t *here = x + block * size * kTall;
        constexpr size_t kQuads = kNumbers == INGOT_CPU_INT4 ? 2 : 1;
        // Blocks are multiples of eight quads.
        constexpr size_t kStep = kChains > kQuads ? kChains / kQuads : 1;
        const auto step = [&](size_t group, size_t chain) HWY_ATTR {
            auto &first = part[chain % kChains], &second = part[(chain + 1) % kChains];
            INGOT_UNROLL
            for (size_t s = 0; s < kSpan; ++s)
                INGOT_UNROLL
                for (size_t v = 0; v < kVectors; ++v) {
                    const uint8_t *from = panels[s] + offset + (group * kRows + v * kLanes) * 4;
                    if constexpr (kTall <= kStreamedRows) hwy::Prefetch(from + kAhead);
                    const VU packed = load(from);
                    if constexpr (kNumbers == INGOT_CPU_INT8) {
                        const auto w = hn::BitCast(U8(), packed);
                        INGOT_UNROLL
                        for (size_t m = 0; m < kTall; ++m)
                            first[m][s][v] = hn::SumOfMulQuadAccumulate(
                                di, w, quad(here + (group * kTall + m) * 4), first[m][s][v]);
                    } else {
                        const VU low = hn::Set(U32(), 0x0f0f0f0fu);
                        const auto w0 = hn::BitCast(U8(), hn::And(packed, low));
                        const auto w1 =
                            hn::BitCast(U8(), hn::And(hn::ShiftRight<4>(packed), low));
                        INGOT_UNROLL
                        for (size_t m = 0; m < kTall; ++m) {
                            const int8_t *at = here + (group * 2 * kTall + m) * 4;
                            first[m][s][v] =
                                hn::SumOfMulQuadAccumulate(di, w0, quad(at), first[m][s][v]);
                            second[m][s][v] = hn::SumOfMulQuadAccumulate(
                                di, w1, quad(at + kTall * 4), second[m][s][v]);
                        }
                    }
                }
        };
        for (size_t group = 0; group < quads / kQuads; group += kStep)
            INGOT_UNROLL
            for (size_t ahead = 0; ahead < kStep; ++ahead) step(group + ahead, ahead * kQuads);
        INGOT_UNROLL
        for (size_t chain = 1; chain < kChains; ++chain)
            INGOT_UNROLL
            for (size_t m = 0; m < kTall; ++m)
                INGOT_UNROLL
                for (size_t s = 0; s < kSpan; ++s)
                    INGOT_UNROLL
                    for (size_t v = 0; v < kVectors; ++v)
                        part[0][m][s][v] = hn::Add(part[0][m][s][v], part[chain][m][s][v]);
        INGOT_UNROLL
        for (size_t s = 0; s < kSpan; ++s) {
            const Scales<kNumbers> scales(panels[s], p.layout, p.format.zero_points, block);
            INGOT_UNROLL
            for (size_t m = 0; m < kTall; ++m) {
                const VF scale = hn::Set(d, x_scales[block * kTall + m]);
                const VF sum = hn::Set(d, float(x_sums[block * kTall + m]));
                INGOT_UNROLL
                for (size_t v = 0; v < kVectors; ++v) {
                    // Whole numbers below 2^24, so exact.
                    VF whole = hn::ConvertTo(d, part[0][m][s][v]);
                    if (zero_points) whole = hn::NegMulAdd(scales.zero[v], sum, whole);
                    sums[m][s][v] =
                        hn::MulAdd(whole, hn::Mul(scales.scale[v], scale), sums[m][s][v]);
                }
            }
        }
    }
    INGOT_UNROLL
    for (size_t s = 0; s < kSpan; ++s)
        INGOT_UNROLL
        for (size_t v = 0; v < kVectors; ++v) {
            const VF factor = hn::LoadU(d, reinterpret_cast<const float *>(panels[s]) + v * kLanes);
            INGOT_UNROLL
            for (size_t m = 0; m < kTall; ++m)
                to.store(hn::Mul(sums[m][s][v], factor), m, s * kRows + v * kLanes);
        }
}

// Panels as floats, columns [from, to): [to - from][16] each.
template <int kNumbers>
HWY_INLINE void decode(const Product &p, const uint8_t *panel, size_t from, size_t to, float *w) {
    const F32 d;
    constexpr size_t kStep = kGroup<kNumbers>;
    if constexpr (kNumbers == INGOT_CPU_BFLOAT16) {
        for (size_t group = from / kStep; group < to / kStep; ++group)
            INGOT_UNROLL
            for (size_t v = 0; v < kVectors; ++v) {
                float *here = w + (group * kStep - from) * kRows + v * kLanes;
                each_column<kNumbers>(load(panel + (group * kRows + v * kLanes) * 4),
                                      [&](size_t at, VF value) HWY_ATTR {
                                          hn::StoreU(value, d, here + at * kRows);
                                      });
            }
    } else {
        const size_t size = size_t(p.format.block);
        VF factors[kVectors];
        INGOT_UNROLL
        for (size_t v = 0; v < kVectors; ++v)
            factors[v] = hn::LoadU(d, reinterpret_cast<const float *>(panel) + v * kLanes);
        for (size_t block = from / size; block < to / size; ++block) {
            const Scales<kNumbers> scales(panel, p.layout, p.format.zero_points, block);
            const uint8_t *numbers = panel + p.layout.numbers + block * p.layout.block_bytes;
            INGOT_UNROLL
            for (size_t v = 0; v < kVectors; ++v) {
                const VF scale = hn::Mul(scales.scale[v], factors[v]);
                float *here = w + (block * size - from) * kRows + v * kLanes;
                for (size_t group = 0; group < size / kStep; ++group)
                    each_column<kNumbers>(
                        load(numbers + (group * kRows + v * kLanes) * 4),
                        [&](size_t at, VF value) HWY_ATTR {
                            hn::StoreU(hn::Mul(hn::Sub(value, scales.zero[v]), scale), d,
                                       here + (group * kStep + at) * kRows);
                        });
            }
        }
    }
}

// A tile of sums: kTall rows of x by kSpan panels of floats, over `depth` columns.
template <size_t kTall, size_t kSpan>
HWY_INLINE void float_tile(const float *x, const float *const (&panels)[kSpan], size_t depth,
                           bool begin, bool end, const Ends &to) {
    const F32 d;
    VF sums[kTall][kSpan * kVectors];
    INGOT_UNROLL
    for (size_t m = 0; m < kTall; ++m)
        INGOT_UNROLL
        for (size_t v = 0; v < kSpan * kVectors; ++v) sums[m][v] = hn::Zero(d);
    for (size_t k = 0; k < depth; ++k) {
        VF w[kSpan * kVectors];
        INGOT_UNROLL
        for (size_t s = 0; s < kSpan; ++s)
            INGOT_UNROLL
            for (size_t v = 0; v < kVectors; ++v)
                w[s * kVectors + v] = hn::LoadU(d, panels[s] + k * kRows + v * kLanes);
        INGOT_UNROLL
        for (size_t m = 0; m < kTall; ++m) {
            const VF each = hn::Set(d, x[k * kTall + m]);
            INGOT_UNROLL
            for (size_t v = 0; v < kSpan * kVectors; ++v)
                sums[m][v] = hn::MulAdd(each, w[v], sums[m][v]);
        }
    }
    // Sums of the columns before are added last: short sums round less.
    INGOT_UNROLL
    for (size_t m = 0; m < kTall; ++m)
        INGOT_UNROLL
        for (size_t v = 0; v < kSpan * kVectors; ++v)
            to.store_part(sums[m][v], m, v * kLanes, begin, end);
}

#if INGOT_PAIRS
// The same of pairs of bfloat16, [depth][kTall] of x: each product is exact, and so is none of a
// number below the normal ones, which counts as zero.
template <size_t kTall, size_t kSpan>
__attribute__((target("avx512bf16"))) void pair_tile(const uint32_t *x, const uint8_t *const (&panels)[kSpan],
                                                     size_t depth, bool begin, bool end, const Ends &to) {
    __m512 sums[kTall][kSpan];
    INGOT_UNROLL
    for (auto &row : sums)
        INGOT_UNROLL
        for (auto &sum : row) sum = _mm512_setzero_ps();
    for (size_t k = 0; k < depth; ++k) {
        __m512bh w[kSpan];
        INGOT_UNROLL
        for (size_t s = 0; s < kSpan; ++s) w[s] = (__m512bh)_mm512_loadu_si512(panels[s] + k * kRows * 4);
        INGOT_UNROLL
        for (size_t m = 0; m < kTall; ++m) {
            const __m512bh each = (__m512bh)_mm512_set1_epi32(int(x[k * kTall + m]));
            INGOT_UNROLL
            for (size_t s = 0; s < kSpan; ++s) sums[m][s] = _mm512_dpbf16_ps(sums[m][s], each, w[s]);
        }
    }
    INGOT_UNROLL
    for (size_t m = 0; m < kTall; ++m)
        INGOT_UNROLL
        for (size_t s = 0; s < kSpan; ++s) to.store_part(VF{sums[m][s]}, m, s * kRows, begin, end);
}
#endif

// Calls use(std::integral_constant<size_t, n>()) for the n of 1 to kMost that is given.
template <size_t kMost, typename Use>
HWY_INLINE void with_rows(size_t rows, const Use &use) {
    if (rows == kMost) return use(std::integral_constant<size_t, kMost>());
    if constexpr (kMost > 1) with_rows<kMost - 1>(rows, use);
}

// Calls use(panel, std::integral_constant<size_t, n>()) for panels from `panel` on, n at a time.
template <size_t kMost, typename Use>
HWY_INLINE void in_spans(size_t begin, size_t end, const Use &use) {
    for (; begin + kMost <= end; begin += kMost) use(begin, std::integral_constant<size_t, kMost>());
    if constexpr (kMost > 1) in_spans<kMost / 2>(begin, end, use);
}

// Pointers to panels one behind the other.
template <size_t kSpan>
struct Span {
    Span(const Product &p, const Job &job, size_t panel) {
        for (size_t s = 0; s < kSpan; ++s) at[s] = job.weight + (panel + s) * p.layout.bytes;
    }
    const uint8_t *at[kSpan];
};

template <int kNumbers>
HWY_NOINLINE void few(const Product &p, const Job &job, size_t begin, size_t end) {
    const float *x = p.x.get() + job.first * p.padded;
    with_rows<kFewRows>(job.rows, [&](auto tall) HWY_ATTR {
        in_spans<kStreams<tall()>>(begin, end, [&](size_t panel, auto span) HWY_ATTR {
            const Span<span()> weights(p, job, panel);
            const Ends to(*job.target, job.first, panel * kRows);
            if constexpr (kNumbers < INGOT_CPU_INT8)
                few_floats<kNumbers, tall()>(p, x, weights.at, to);
            else
                few_whole<kNumbers, tall()>(p, x, weights.at, to);
        });
    });
}

template <int kNumbers>
HWY_NOINLINE void rounded(const Product &p, const Job &job, size_t begin, size_t end) {
    const auto tile = [&](size_t row, size_t panel, auto tall, auto span) HWY_ATTR {
        const Span<span()> weights(p, job, panel);
        rounded_tile<kNumbers, tall()>(p, row, weights.at, Ends(*job.target, row, panel * kRows));
    };
    if (job.rows <= kStreamedRows)
        return with_rows<kStreamedRows>(job.rows, [&](auto tall) HWY_ATTR {
            in_spans<kStreams<tall()>>(begin, end, [&](size_t panel, auto span)
                                                       HWY_ATTR { tile(job.first, panel, tall, span); });
        });
    const Tiles tiles(job.rows, kRoundedRows);
    in_spans<kPanels>(begin, end, [&](size_t panel, auto span) HWY_ATTR {
        for (size_t each = 0; each < tiles.count; ++each)
            with_rows<kRoundedRows>(tiles.begin(each + 1) - tiles.begin(each), [&](auto tall) HWY_ATTR {
                tile(job.first + tiles.begin(each), panel, tall, span);
            });
    });
}

template <int kNumbers>
HWY_NOINLINE void many(const Product &p, const Job &job, size_t begin, size_t end) {
    const Tiles tiles(job.rows, kTileRows);
    const Buffer<float> decoded(kNumbers == INGOT_CPU_FLOAT32 ? 0 : kAbreast * kDepth * kRows);
    for (size_t first = begin; first < end; first += kAbreast) {
        const size_t last = std::min(first + kAbreast, end);
        for (size_t from = 0; from < p.padded; from += kDepth) {
            const size_t depth = std::min(kDepth, p.padded - from);
            const auto floats = [&](size_t panel) HWY_ATTR {
                if constexpr (kNumbers == INGOT_CPU_FLOAT32)
                    return reinterpret_cast<const float *>(job.weight + panel * p.layout.bytes) +
                           from * kRows;
                return static_cast<const float *>(decoded.get()) + (panel - first) * kDepth * kRows;
            };
            if constexpr (kNumbers != INGOT_CPU_FLOAT32)
                for (size_t panel = first; panel < last; ++panel)
                    decode<kNumbers>(p, job.weight + panel * p.layout.bytes, from, from + depth,
                                     decoded.get() + (panel - first) * kDepth * kRows);
            for (size_t tile = 0; tile < tiles.count; ++tile) {
                const size_t row = job.first + tiles.begin(tile);
                const size_t rows = tiles.begin(tile + 1) - tiles.begin(tile);
                const float *x = p.x.get() + row * p.padded + from * rows;
                const bool ends = from + depth == p.padded;
                with_rows<kTileRows>(rows, [&](auto tall) HWY_ATTR {
                    for (size_t panel = first; panel < last; panel += kPanels) {
                        const Ends to(*job.target, row, panel * kRows);
                        if (kPanels == 1 || panel + 1 == last)
                            float_tile<tall(), 1>(x, {floats(panel)}, depth, !from, ends, to);
                        else if constexpr (kPanels == 2)
                            float_tile<tall(), 2>(x, {floats(panel), floats(panel + 1)}, depth,
                                                  !from, ends, to);
                    }
                });
            }
        }
    }
}

#if INGOT_PAIRS
HWY_NOINLINE void pairs(const Product &p, const Job &job, size_t begin, size_t end) {
    const Tiles tiles(job.rows, kTileRows);
    // What lies in a first-level cache beside a tile of x.
    constexpr size_t kPairs = kDepth;
    const size_t all = p.padded / 2;
    for (size_t from = 0; from < all; from += kPairs) {
        const size_t depth = std::min(kPairs, all - from);
        for (size_t first = begin; first < end; first += kAbreast) {
            const size_t last = std::min(first + kAbreast, end);
            for (size_t tile = 0; tile < tiles.count; ++tile) {
                const size_t row = job.first + tiles.begin(tile);
                const size_t rows = tiles.begin(tile + 1) - tiles.begin(tile);
                const auto *x = reinterpret_cast<const uint32_t *>(p.x.get() + row * p.padded) + from * rows;
                const bool ends = from + depth == all;
                with_rows<kTileRows>(rows, [&](auto tall) HWY_ATTR {
                    for (size_t panel = first; panel < last; panel += kPanels) {
                        const Ends to(*job.target, row, panel * kRows);
                        const uint8_t *weight = job.weight + panel * p.layout.bytes + from * kRows * 4;
                        if (panel + 1 == last)
                            pair_tile<tall(), 1>(x, {weight}, depth, !from, ends, to);
                        else
                            pair_tile<tall(), 2>(x, {weight, weight + p.layout.bytes}, depth, !from, ends, to);
                    }
                });
            }
        }
    }
}
#endif

// Whether tiles of narrow rows are pairs.
bool HasPairs() {
#if INGOT_PAIRS
    static const bool has = __builtin_cpu_supports("avx512bf16");
    return has;
#else
    return false;
#endif
}

template <int kNumbers>
void columns_of(const Product &p, const Job &job, size_t begin, size_t end) {
#if INGOT_PAIRS
    if (kNumbers == INGOT_CPU_BFLOAT16 && p.narrow && job.rows > kFewRows && HasPairs())
        return pairs(p, job, begin, end);
#endif
    if constexpr (kNumbers >= INGOT_CPU_INT8)
        if (p.rounded) return rounded<kNumbers>(p, job, begin, end);
    if (job.rows <= kFewRows && job.rows <= kTileRows) return few<kNumbers>(p, job, begin, end);
    many<kNumbers>(p, job, begin, end);
}

void Columns(const Product &p, const Job &job, size_t begin, size_t end) {
    switch (p.format.numbers) {
        case INGOT_CPU_FLOAT32: return columns_of<INGOT_CPU_FLOAT32>(p, job, begin, end);
        case INGOT_CPU_BFLOAT16: return columns_of<INGOT_CPU_BFLOAT16>(p, job, begin, end);
        case INGOT_CPU_INT8: return columns_of<INGOT_CPU_INT8>(p, job, begin, end);
        default: return columns_of<INGOT_CPU_INT4>(p, job, begin, end);
    }
}

size_t TileRows(bool rounded) { return rounded ? kRoundedRows : kTileRows; }

// One block of a row of x in int8: the scale that its largest number asks for.
HWY_INLINE void round_block(const float *x, size_t size, int8_t *to, size_t stride, float *scale,
                            int32_t *sum) {
    const F32 d;
    VF most = hn::Zero(d);
    for (size_t k = 0; k < size; k += kLanes) most = hn::Max(most, hn::Abs(hn::LoadU(d, x + k)));
    const float largest = hn::ReduceMax(d, most);
    *scale = largest / 127.0f;
    const VF inverse = hn::Set(d, largest > 0 ? 127.0f / largest : 0.0f);
    int32_t total = 0;
    HWY_ALIGN int32_t whole[kRows];
    for (size_t k = 0; k < size; k += kLanes) {
        hn::Store(hn::NearestInt(hn::Mul(hn::LoadU(d, x + k), inverse)), I32(), whole);
        for (size_t lane = 0; lane < kLanes; ++lane) {
            total += whole[lane];
            to[(k + lane) / 4 * stride + (k + lane) % 4] = static_cast<int8_t>(whole[lane]);
        }
    }
    *sum = total;
}

// The nearest bfloat16, of two as near the even one, as a float.
HWY_INLINE VU narrowed(VF x) {
    const U32 d;
    const VU bits = hn::BitCast(d, x);
    const VU odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d, 1));
    const VU near = hn::Add(bits, hn::Add(odd, hn::Set(d, 0x7fff)));
    // What is no number stays none, which the addition could make infinite.
    const VU none = hn::Or(bits, hn::Set(d, 0x400000));
    const auto is_none = hn::RebindMask(d, hn::IsNaN(x));
    return hn::And(hn::IfThenElse(is_none, none, near), hn::Set(d, 0xffff0000u));
}

// A tile of narrow rows, pairs or not.
void pack_narrow(const Product &p, size_t row, size_t tall, const float *const *rows, bool pairs) {
    auto *to = reinterpret_cast<uint32_t *>(p.x.get() + row * p.padded);
    HWY_ALIGN uint32_t here[kRows];
    for (size_t m = 0; m < tall; ++m)
        for (size_t k = 0; k < p.padded; k += kLanes) {
            const size_t left = k < p.columns ? p.columns - k : 0;
            hn::Store(narrowed(hn::LoadN(F32(), rows[m] + k, left)), U32(), here);
            const size_t count = std::min(kLanes, p.padded - k);
            if (pairs)
                for (size_t i = 0; i < count; i += 2) to[(k + i) / 2 * tall + m] = here[i] >> 16 | here[i + 1];
            else
                for (size_t i = 0; i < count; ++i) to[(k + i) * tall + m] = here[i];
        }
}

// One tile: rows[m] -> column m; of a job of so many rows.
void Pack(const Product &p, size_t row, size_t tall, const float *const *rows, size_t of) {
    if (p.narrow) return pack_narrow(p, row, tall, rows, of > kFewRows && HasPairs());
    if (!p.rounded) {
        float *to = p.x.get() + row * p.padded;
        if (tall == 1) {
            std::memcpy(to, rows[0], p.columns * sizeof(float));
            std::fill(to + p.columns, to + p.padded, 0.0f);
            return;
        }
        for (size_t k = 0; k < p.padded; ++k)
            for (size_t m = 0; m < tall; ++m) to[k * tall + m] = k < p.columns ? rows[m][k] : 0.0f;
        return;
    }
    const size_t size = size_t(p.format.block);
    HWY_ALIGN float last[128];
    for (size_t block = 0; block < p.layout.blocks; ++block)
        for (size_t m = 0; m < tall; ++m) {
            const float *from = rows[m] + block * size;
            if ((block + 1) * size > p.columns) {
                const size_t left = p.columns - block * size;
                std::copy(from, from + left, last);
                std::fill(last + left, last + size, 0.0f);
                from = last;
            }
            const size_t at = row * p.layout.blocks + block * tall + m;
            round_block(from, size, p.numbers.get() + row * p.padded + (block * size * tall) + m * 4,
                        tall * 4, p.scales.get() + at, p.sums.get() + at);
        }
}

}  // namespace HWY_NAMESPACE
}  // namespace ingot::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ingot::cpu {

HWY_EXPORT(Columns);
HWY_EXPORT(TileRows);
HWY_EXPORT(Pack);

namespace {
// Bytes of weights that are worth a piece of their own: of few rows, and of those with more to do.
constexpr size_t kFewBytes = size_t(128) << 10;
constexpr size_t kPieceBytes = size_t(64) << 10;
constexpr size_t kMostPieces = 256;

size_t padded_columns(const ingot_cpu_format &format, size_t columns) {
    if (is_whole(format)) return round_up(columns, size_t(format.block));
    return format.numbers == INGOT_CPU_BFLOAT16 ? round_up(columns, 2) : columns;
}

size_t rows_of(const Job *jobs, size_t count) {
    size_t rows = 0;
    for (size_t job = 0; job < count; ++job) rows = std::max(rows, jobs[job].first + jobs[job].rows);
    return rows;
}
}  // namespace

Product::Product(const ingot_cpu_format &format, size_t columns, int32_t rounding, const Job *jobs,
                 size_t count)
    : format(format),
      layout(format, columns),
      columns(columns),
      padded(padded_columns(format, columns)),
      rounded(rounding == INGOT_CPU_TO_INT8 && is_whole(format)),
      narrow(rounding == INGOT_CPU_TO_BFLOAT16 && format.numbers == INGOT_CPU_BFLOAT16),
      jobs(jobs),
      count(count),
      rows(rows_of(jobs, count)),
      tile_rows(HWY_DYNAMIC_DISPATCH(TileRows)(this->rounded)),
      x(this->rounded ? 0 : rows * padded),
      numbers(this->rounded ? rows * padded : 0),
      scales(this->rounded ? rows * layout.blocks : 0),
      sums(this->rounded ? rows * layout.blocks : 0) {}

void Product::pack(const ingot_cpu_threads &threads, Row row, const void *self) const {
    struct Tile {
        size_t row, rows, of;
    };
    std::vector<Tile> all;
    for (size_t job = 0; job < count; ++job) {
        if (job && jobs[job].first == jobs[job - 1].first) continue;
        const Tiles tiles(jobs[job].rows, tile_rows);
        for (size_t tile = 0; tile < tiles.count; ++tile)
            all.push_back({jobs[job].first + tiles.begin(tile),
                           tiles.begin(tile + 1) - tiles.begin(tile), jobs[job].rows});
    }
    const auto packed = HWY_DYNAMIC_POINTER(Pack);
    // A few rows are not worth waking anybody.
    const size_t pieces = rows * columns < (1 << 15) ? 1 : std::min(all.size(), kMostPieces);
    run(threads, pieces, [&](size_t piece) {
        const float *here[16];
        for (size_t tile = all.size() * piece / pieces; tile < all.size() * (piece + 1) / pieces; ++tile) {
            for (size_t m = 0; m < all[tile].rows; ++m) here[m] = row(self, all[tile].row + m);
            packed(*this, all[tile].row, all[tile].rows, here, all[tile].of);
        }
    });
}

void Product::multiply(const ingot_cpu_threads &threads) const {
    struct Piece {
        const Job *job;
        size_t begin, end;
    };
    std::vector<Piece> all;
    for (size_t job = 0; job < count; ++job) {
        if (!jobs[job].rows) continue;
        const size_t panels = panels_of(jobs[job].target->out);
        const bool few = jobs[job].rows <= kFewRows;
        const size_t most = std::max<size_t>(1, panels * layout.bytes / (few ? kFewBytes : kPieceBytes));
        // Panels that are computed together stay together.
        const size_t abreast = few ? kSpread : 2;
        const size_t groups = (panels + abreast - 1) / abreast, pieces = std::min({most, kMostPieces, groups});
        for (size_t piece = 0; piece < pieces; ++piece)
            all.push_back({&jobs[job], groups * piece / pieces * abreast,
                           std::min(panels, groups * (piece + 1) / pieces * abreast)});
    }
    const auto columns = HWY_DYNAMIC_POINTER(Columns);
    run(threads, all.size(), [&](size_t piece) {
        const Piece &each = all[piece];
        columns(*this, *each.job, each.begin, each.end);
    });
}

}  // namespace ingot::cpu
#endif  // HWY_ONCE
