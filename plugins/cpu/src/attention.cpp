// ingot_cpu_attention.
//
// Two forms, over the heads of queries that share a head of keys and values (its rows are all their
// queries, head by head of a token):
//
//   few rows   keys in spans, whose numbers are read once: scores in registers by key, a softmax of
//              the span, and the weighted sum of its values. Spans are merged in their order.
//   many rows  blocks of keys, transposed into the first-level cache, times tiles of rows in
//              registers, and a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867;
//              Dao et al. 2022, arXiv:2205.14135). Blocks that no row of a tile may see are skipped.
//
// The new keys and values are appended before, the keys rotated; queries are rotated where they are
// read. What of a cache lies behind the tokens there are is never read.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "refuse.h"
#include "targets.h"

#ifndef INGOT_CPU_ATTENTION
#define INGOT_CPU_ATTENTION
namespace ingot::cpu {

// Keys of a block, and of a span.
constexpr size_t kKeys = 64, kSpan = 512;
// Rows that are few.
constexpr size_t kFew = 4;
// Rows of a piece of work, about.
constexpr size_t kPieceRows = 192;

// Which keys a token may see: none outside of [first, end), and all of those where `all` says so.
struct Seen {
    uint32_t first, end;
    bool all;

    bool meets(size_t key, size_t count) const { return first < key + count && end > key; }
};

struct Attending {
    explicit Attending(const ingot_cpu_attention_params &params)
        : p(params),
          batch(size_t(p.batch)),
          tokens(size_t(p.tokens)),
          heads(size_t(p.heads)),
          key_heads(size_t(p.key_heads)),
          size(size_t(p.head_size)),
          shared(heads / key_heads),
          past(size_t(p.past)),
          total(past + tokens),
          capacity(size_t(p.capacity)),
          turned(size_t(p.rotated) / 2),
          rows(tokens * shared),
          spans((total + kSpan - 1) / kSpan),
          seen(batch * tokens) {}

    const ingot_cpu_attention_params &p;
    size_t batch, tokens, heads, key_heads, size;
    size_t shared;  // heads of queries for a head of keys
    size_t past, total, capacity;
    size_t turned;  // pairs of a head that are rotated
    size_t rows;    // of a head of keys
    size_t spans;
    Buffer<Seen> seen;  // [B, T]

    const float *cache(const float *of, size_t row, size_t head) const {
        return of + (row * key_heads + head) * capacity * size;
    }

    // Of a row of the batch and a head of keys, query r, counted from the row's first: the token that
    // it is of, and where it lies.
    size_t token_of(size_t row, size_t r) const { return row * tokens + r / shared; }
    size_t query_of(size_t row, size_t head, size_t r) const {
        return (token_of(row, r) * heads + head * shared + r % shared) * size;
    }
};

// A softmax of some keys: the largest score, and the sum of what it leaves.
struct Partial {
    float most, sum;
};

}  // namespace ingot::cpu
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "attention.cpp"
#include "hwy/foreach_target.h"
#include "hwy/highway.h"
#include "hwy/contrib/math/math-inl.h"
#include "vectors-inl.h"

HWY_BEFORE_NAMESPACE();
namespace ingot::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using V = hn::Vec<D>;

constexpr size_t kLanes = HWY_MAX_LANES_D(D);
constexpr bool kManyRegisters = kLanes == 16 || HWY_ARCH_ARM;
// Rows of a tile whose scores are summed at a time, over two vectors of keys, and those whose values
// are, over at most four vectors of a head.
constexpr size_t kTall = kManyRegisters ? 12 : 6;
constexpr size_t kShort = kTall / 2, kAcross = 4;
// A number of each row of a tile, in whole vectors.
constexpr size_t kTallest = (kTall + kLanes - 1) / kLanes * kLanes;
constexpr float kNone = -std::numeric_limits<float>::infinity();

// A head's numbers in whole vectors.
HWY_INLINE size_t padded(size_t size) { return round_up(size, kLanes); }

// One head of a token, rotated and times `scale`.
void turn(const Attending &a, const float *x, size_t token, float scale, float *to) {
    const D d;
    const V factor = hn::Set(d, scale);
    const size_t half = a.turned;
    const float *cos = a.p.cos + token * half, *sin = a.p.sin + token * half;
    const auto pairs = [&](size_t i, const auto &load, const auto &store) HWY_ATTR {
        const V c = load(cos + i), s = load(sin + i), one = load(x + i), other = load(x + half + i);
        store(hn::Mul(hn::NegMulAdd(other, s, hn::Mul(one, c)), factor), to + i);
        store(hn::Mul(hn::MulAdd(one, s, hn::Mul(other, c)), factor), to + half + i);
    };
    const auto load = [&](const float *from) HWY_ATTR { return hn::LoadU(d, from); };
    const auto store = [&](V v, float *at) HWY_ATTR { hn::StoreU(v, d, at); };
    size_t i = 0;
    for (; i + kLanes <= half; i += kLanes) pairs(i, load, store);
    if (const size_t left = half - i)
        pairs(
            i, [&](const float *from) HWY_ATTR { return hn::LoadN(d, from, left); },
            [&](V v, float *at) HWY_ATTR { hn::StoreN(v, d, at, left); });
    for (i = 2 * half; i + kLanes <= a.size; i += kLanes) hn::StoreU(hn::Mul(hn::LoadU(d, x + i), factor), d, to + i);
    if (i < a.size) hn::StoreN(hn::Mul(hn::LoadN(d, x + i, a.size - i), factor), d, to + i, a.size - i);
}

// The keys and values of one row and head: those before, where they lie elsewhere, and the new ones.
void Append(const Attending &a, size_t row, size_t head) {
    const auto &p = a.p;
    const size_t index = row * a.key_heads + head, size = a.size;
    float *keys = p.present_key + index * a.capacity * size, *values = p.present_value + index * a.capacity * size;
    if (p.present_key != p.past_key && a.past)
        std::memcpy(keys, p.past_key + index * size_t(p.past_capacity) * size, a.past * size * sizeof(float));
    if (p.present_value != p.past_value && a.past)
        std::memcpy(values, p.past_value + index * size_t(p.past_capacity) * size, a.past * size * sizeof(float));
    for (size_t t = 0; t < a.tokens; ++t) {
        const size_t token = row * a.tokens + t, from = (token * a.key_heads + head) * size;
        turn(a, p.key + from, token, 1, keys + (a.past + t) * size);
        std::memcpy(values + (a.past + t) * size, p.value + from, size * sizeof(float));
    }
}

// What one token may see.
Seen seen_by(const uint8_t *visible, size_t total) {
    size_t first = 0, end = total, count = 0;
    while (first < end && !visible[first]) ++first;
    while (end > first && !visible[end - 1]) --end;
    for (size_t k = first; k < end; ++k) count += visible[k] != 0;
    return {uint32_t(first), uint32_t(end), count == end - first};
}

void Look(const Attending &a, size_t begin, size_t end) {
    for (size_t token = begin; token < end; ++token) a.seen[token] = seen_by(a.p.visible + token * a.total, a.total);
}

// Scores of keys that a token may not see become -inf. keys [begin, begin + count).
void hide(const Attending &a, size_t token, size_t begin, size_t count, float *scores) {
    const Seen &seen = a.seen[token];
    if (seen.all && seen.first <= begin && begin + count <= seen.end) return;
    const uint8_t *visible = a.p.visible + token * a.total + begin;
    for (size_t k = 0; k < count; ++k) scores[k] = visible[k] ? scores[k] : kNone;
}

// What scores are shifted by: their largest, where there is one; -inf less -inf would be no number.
template <class Tag, class Vector = hn::Vec<Tag>>
HWY_INLINE Vector shift_of(Tag d, Vector most) {
    return hn::IfThenZeroElse(hn::Eq(most, hn::Set(d, kNone)), most);
}

// Scores [count] in place to what the softmax leaves of each, before the division.
HWY_INLINE Partial soften(float *scores, size_t count) {
    const D d;
    V most = hn::Set(d, kNone);
    size_t k = 0;
    for (; k + kLanes <= count; k += kLanes) most = hn::Max(most, hn::LoadU(d, scores + k));
    if (k < count) most = hn::Max(most, hn::LoadNOr(hn::Set(d, kNone), d, scores + k, count - k));
    const float top = hn::ReduceMax(d, most);
    const V shift = shift_of(d, hn::Set(d, top));
    V sum = hn::Zero(d);
    for (k = 0; k + kLanes <= count; k += kLanes) {
        const V each = hn::Exp(d, hn::Sub(hn::LoadU(d, scores + k), shift));
        sum = hn::Add(sum, each);
        hn::StoreU(each, d, scores + k);
    }
    if (k < count) {
        const V each = hn::Exp(d, hn::Sub(hn::LoadNOr(hn::Set(d, kNone), d, scores + k, count - k), shift));
        sum = hn::Add(sum, each);
        hn::StoreN(each, d, scores + k, count - k);
    }
    return {top, hn::ReduceSum(d, sum)};
}

// What a sum so far is worth beside a larger score.
HWY_INLINE float worth(float most, float now) { return most == kNone ? 0 : std::exp(most - now); }

// --- Few rows

// Scores of four keys, which lie `size` apart, with each of kRows queries [kRows][across].
template <size_t kRows>
HWY_INLINE void score_four(const float *queries, size_t across, const float *keys, size_t size, float *scores) {
    const D d;
    V sums[kRows][4];
    INGOT_UNROLL
    for (auto &row : sums)
        INGOT_UNROLL
        for (auto &sum : row) sum = hn::Zero(d);
    const auto each = [&](size_t i, const auto &load) HWY_ATTR {
        V key[4];
        INGOT_UNROLL
        for (size_t k = 0; k < 4; ++k) key[k] = load(keys + k * size + i);
        INGOT_UNROLL
        for (size_t r = 0; r < kRows; ++r) {
            const V query = hn::LoadU(d, queries + r * across + i);
            INGOT_UNROLL
            for (size_t k = 0; k < 4; ++k) sums[r][k] = hn::MulAdd(query, key[k], sums[r][k]);
        }
    };
    size_t i = 0;
    for (; i + kLanes <= size; i += kLanes) each(i, [&](const float *from) HWY_ATTR { return hn::LoadU(d, from); });
    if (i < size) each(i, [&](const float *from) HWY_ATTR { return hn::LoadN(d, from, size - i); });
    const Four four;
    INGOT_UNROLL
    for (size_t r = 0; r < kRows; ++r)
        hn::StoreU(sums_of(d, sums[r]), four, scores + r * kSpan);
}

// to[r] becomes factors[r] to[r] + the sum over keys of weights[r][key] * values[key], some vectors of
// a head.
template <size_t kRows, size_t kVectors>
HWY_INLINE void weigh(const float *weights, size_t stride, const float *values, size_t size, size_t count, size_t last,
                      const float *factors, float *to, size_t across) {
    const D d;
    V sums[kRows][kVectors];
    INGOT_UNROLL
    for (size_t r = 0; r < kRows; ++r)
        INGOT_UNROLL
        for (size_t v = 0; v < kVectors; ++v)
            sums[r][v] = hn::Mul(hn::Set(d, factors[r]), hn::LoadU(d, to + r * across + v * kLanes));
    // Of the last vector there are `last` numbers, the rest of which may be beyond all memory.
    const auto sum = [&](size_t k, const auto &load) HWY_ATTR {
        V value[kVectors];
        INGOT_UNROLL
        for (size_t v = 0; v < kVectors; ++v)
            value[v] = v + 1 < kVectors ? hn::LoadU(d, values + k * size + v * kLanes) : load(values + k * size + v * kLanes);
        INGOT_UNROLL
        for (size_t r = 0; r < kRows; ++r) {
            const V weight = hn::Set(d, weights[r * stride + k]);
            INGOT_UNROLL
            for (size_t v = 0; v < kVectors; ++v) sums[r][v] = hn::MulAdd(weight, value[v], sums[r][v]);
        }
    };
    if (last == kLanes)
        for (size_t k = 0; k < count; ++k) sum(k, [&](const float *from) HWY_ATTR { return hn::LoadU(d, from); });
    else
        for (size_t k = 0; k < count; ++k) sum(k, [&](const float *from) HWY_ATTR { return hn::LoadN(d, from, last); });
    INGOT_UNROLL
    for (size_t r = 0; r < kRows; ++r)
        INGOT_UNROLL
        for (size_t v = 0; v < kVectors; ++v) hn::StoreU(sums[r][v], d, to + r * across + v * kLanes);
}

// The same over all of a head.
template <size_t kRows>
HWY_INLINE void weigh_all(const float *weights, size_t stride, const float *values, size_t size, size_t count,
                          const float *factors, float *to, size_t across) {
    size_t i = 0;
    for (; i + kAcross * kLanes <= size; i += kAcross * kLanes)
        weigh<kRows, kAcross>(weights, stride, values + i, size, count, kLanes, factors, to + i, across);
    for (; i < size; i += kLanes)
        weigh<kRows, 1>(weights, stride, values + i, size, count, std::min(kLanes, size - i), factors, to + i, across);
}

template <size_t kRows>
void span_of(const Attending &a, size_t row, size_t head, size_t span, Partial *partial, float *sums) {
    const size_t across = padded(a.size), begin = span * kSpan, count = std::min(kSpan, a.total - begin);
    HWY_ALIGN float scores[kRows * kSpan];
    const Buffer<float> queries(kRows * across);
    std::fill_n(queries.get(), kRows * across, 0.0f);
    size_t first = count, end = 0;
    for (size_t r = 0; r < kRows; ++r) {
        const size_t token = a.token_of(row, r);
        turn(a, a.p.query + a.query_of(row, head, r), token, a.p.scale, queries.get() + r * across);
        const Seen &seen = a.seen[token];
        if (!seen.meets(begin, count)) continue;
        first = std::min(first, std::max<size_t>(seen.first, begin) - begin);
        end = std::max(end, std::min<size_t>(seen.end, begin + count) - begin);
    }
    std::fill_n(sums, kRows * across, 0.0f);
    first = std::min(first, end);
    const size_t keys = end - first;
    const float *from = a.cache(a.p.present_key, row, head) + (begin + first) * a.size;
    size_t k = 0;
    for (; k + 4 <= keys; k += 4) score_four<kRows>(queries.get(), across, from + k * a.size, a.size, scores + k);
    if (k < keys && keys >= 4) {
        // The last four, some of them once more.
        k = keys - 4;
        score_four<kRows>(queries.get(), across, from + k * a.size, a.size, scores + k);
        k = keys;
    }
    for (; k < keys; ++k)
        for (size_t r = 0; r < kRows; ++r) {
            float sum = 0;
            for (size_t i = 0; i < a.size; ++i) sum += queries[r * across + i] * from[k * a.size + i];
            scores[r * kSpan + k] = sum;
        }
    for (size_t r = 0; r < kRows; ++r) {
        hide(a, a.token_of(row, r), begin + first, keys, scores + r * kSpan);
        partial[r] = soften(scores + r * kSpan, keys);
    }
    const float nothing[kRows] = {};
    weigh_all<kRows>(scores, kSpan, a.cache(a.p.present_value, row, head) + (begin + first) * a.size, a.size, keys,
                     nothing, sums, across);
}

// A span of keys for all rows of a head of keys, of which there are at most kFew.
void Span(const Attending &a, size_t row, size_t head, size_t span, Partial *partial, float *sums) {
    switch (a.rows) {
        case 1: return span_of<1>(a, row, head, span, partial, sums);
        case 2: return span_of<2>(a, row, head, span, partial, sums);
        case 3: return span_of<3>(a, row, head, span, partial, sums);
        default: return span_of<kFew>(a, row, head, span, partial, sums);
    }
}

// One query's sums [Dp] of each of its spans, which lie `apart`, as its result.
void Merge(const Attending &a, const Partial *partial, const float *sums, size_t apart, size_t sums_apart, float *y) {
    const D d;
    float most = kNone, all = 0;
    for (size_t s = 0; s < a.spans; ++s) most = std::max(most, partial[s * apart].most);
    for (size_t s = 0; s < a.spans; ++s) all += partial[s * apart].sum * worth(partial[s * apart].most, most);
    for (size_t i = 0; i < a.size; i += kLanes) {
        V sum = hn::Zero(d);
        for (size_t s = 0; s < a.spans; ++s)
            sum = hn::MulAdd(hn::Set(d, worth(partial[s * apart].most, most)), hn::LoadU(d, sums + s * sums_apart + i), sum);
        hn::StoreN(hn::Div(sum, hn::Set(d, all)), d, y + i, a.size - i);
    }
}

size_t Padded(size_t size) { return padded(size); }

// --- Many rows

// Scores [kTall][kKeys] of a tile of queries, [size][kTall], with a block of keys.
HWY_INLINE void score(const float *queries, const float *columns, size_t size, float *scores) {
    const D d;
    for (size_t k = 0; k < kKeys; k += 2 * kLanes) {
        V sums[kTall][2];
        INGOT_UNROLL
        for (auto &row : sums) row[0] = row[1] = hn::Zero(d);
        const float *query = queries, *column = columns + k;
        for (size_t i = 0; i < size; ++i) {
            const V one = hn::LoadU(d, column), two = hn::LoadU(d, column + kLanes);
            INGOT_UNROLL
            for (size_t r = 0; r < kTall; ++r) {
                const V q = hn::Set(d, query[r]);
                sums[r][0] = hn::MulAdd(q, one, sums[r][0]);
                sums[r][1] = hn::MulAdd(q, two, sums[r][1]);
            }
            query += kTall;
            column += kKeys;
        }
        INGOT_UNROLL
        for (size_t r = 0; r < kTall; ++r) {
            hn::StoreU(sums[r][0], d, scores + r * kKeys + k);
            hn::StoreU(sums[r][1], d, scores + r * kKeys + k + kLanes);
        }
    }
}

// The softmax so far of the rows of a tile.
struct Running {
    HWY_ALIGN float most[kTallest];          // the largest score
    HWY_ALIGN float sums[kTall][kLanes];     // of what the softmax leaves, in parts
};

// Scores [kTall][kKeys] in place to what the softmax leaves of each; what becomes of sums so far.
void soften_tile(float *scores, Running &running, float *factors) {
    const D d;
    HWY_ALIGN float now[kTallest];
    std::copy_n(running.most, kTallest, now);
    for (size_t r = 0; r < kTall; ++r) {
        V most = hn::LoadU(d, scores + r * kKeys);
        for (size_t k = kLanes; k < kKeys; k += kLanes) most = hn::Max(most, hn::LoadU(d, scores + r * kKeys + k));
        now[r] = std::max(now[r], hn::ReduceMax(d, most));
    }
    for (size_t r = 0; r < kTallest; r += kLanes) {
        const V before = hn::LoadU(d, running.most + r), most = hn::LoadU(d, now + r);
        hn::StoreU(hn::Exp(d, hn::Sub(before, shift_of(d, most))), d, factors + r);
        hn::StoreU(most, d, running.most + r);
    }
    for (size_t r = 0; r < kTall; ++r) {
        const V shift = shift_of(d, hn::Set(d, now[r]));
        V sum = hn::Mul(hn::LoadU(d, running.sums[r]), hn::Set(d, factors[r]));
        for (size_t k = 0; k < kKeys; k += kLanes) {
            const V each = hn::Exp(d, hn::Sub(hn::LoadU(d, scores + r * kKeys + k), shift));
            sum = hn::Add(sum, each);
            hn::StoreU(each, d, scores + r * kKeys + k);
        }
        hn::StoreU(sum, d, running.sums[r]);
    }
}

// Tokens [first, first + count) of one row, for all queries that share a head of keys.
void Block(const Attending &a, size_t row, size_t head, size_t first, size_t count) {
    const D d;
    const size_t size = a.size, across = padded(size), rows = count * a.shared, tiles = (rows + kTall - 1) / kTall;
    const Buffer<float> queries(tiles * kTall * size), sums(tiles * kTall * across), columns(size * kKeys), one(size);
    const Buffer<Running> running(tiles);
    HWY_ALIGN float scores[kTall * kKeys];
    HWY_ALIGN float factors[kTallest];
    std::fill_n(queries.get(), tiles * kTall * size, 0.0f);
    std::fill_n(sums.get(), tiles * kTall * across, 0.0f);
    for (size_t tile = 0; tile < tiles; ++tile) {
        std::fill_n(running[tile].most, kTallest, kNone);
        std::fill_n(running[tile].sums[0], kTall * kLanes, 0.0f);
    }
    const size_t before = first * a.shared;
    const auto token_of = [&](size_t r) { return a.token_of(row, before + r); };
    const auto query_of = [&](size_t r) { return a.query_of(row, head, before + r); };
    for (size_t r = 0; r < rows; ++r) {
        turn(a, a.p.query + query_of(r), token_of(r), a.p.scale, one.get());
        float *tile = queries.get() + r / kTall * kTall * size + r % kTall;
        for (size_t i = 0; i < size; ++i) tile[i * kTall] = one[i];
    }
    size_t begin = a.total, end = 0;
    for (size_t t = first; t < first + count; ++t) {
        const Seen &seen = a.seen[row * a.tokens + t];
        begin = std::min<size_t>(begin, seen.first);
        end = std::max<size_t>(end, seen.end);
    }
    const float *keys = a.cache(a.p.present_key, row, head), *values = a.cache(a.p.present_value, row, head);
    for (size_t k = begin / kKeys * kKeys; k < end; k += kKeys) {
        const size_t here = std::min(kKeys, a.total - k);
        // Behind the last key are zeros, and nobody sees them.
        if (here < kKeys) std::fill_n(columns.get(), size * kKeys, 0.0f);
        columns_of(keys + k * size, size, here, size, columns.get(), kKeys);
        for (size_t tile = 0; tile < tiles; ++tile) {
            const size_t from = tile * kTall, there = std::min(kTall, rows - from);
            bool any = false;
            for (size_t r = from; r < from + there; r += a.shared) any |= a.seen[token_of(r)].meets(k, here);
            if (!(any || a.seen[token_of(from + there - 1)].meets(k, here))) continue;
            score(queries.get() + from * size, columns.get(), size, scores);
            for (size_t r = 0; r < there; ++r) {
                hide(a, token_of(from + r), k, here, scores + r * kKeys);
                if (here < kKeys) std::fill(scores + r * kKeys + here, scores + (r + 1) * kKeys, kNone);
            }
            soften_tile(scores, running[tile], factors);
            for (size_t r = 0; r < there; r += kShort)
                weigh_all<kShort>(scores + r * kKeys, kKeys, values + k * size, size, here, factors + r,
                                  sums.get() + (from + r) * across, across);
        }
    }
    for (size_t r = 0; r < rows; ++r) {
        const V sum = hn::Set(d, hn::ReduceSum(d, hn::LoadU(d, running[r / kTall].sums[r % kTall])));
        for (size_t i = 0; i < size; i += kLanes)
            hn::StoreN(hn::Div(hn::LoadU(d, sums.get() + r * across + i), sum), d, a.p.y + query_of(r) + i, size - i);
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace ingot::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ingot::cpu {
namespace {

HWY_EXPORT(Append);
HWY_EXPORT(Look);
HWY_EXPORT(Span);
HWY_EXPORT(Merge);
HWY_EXPORT(Padded);
HWY_EXPORT(Block);

// Numbers that are moved where that is worth another thread.
constexpr size_t kMoved = size_t(1) << 14;

void few(const Attending &a, const ingot_cpu_threads &threads) {
    const size_t across = HWY_DYNAMIC_DISPATCH(Padded)(a.size), groups = a.batch * a.key_heads, rows = a.rows;
    const Buffer<Partial> partial(groups * a.spans * rows);
    const Buffer<float> sums(groups * a.spans * rows * across);
    const auto span = HWY_DYNAMIC_POINTER(Span);
    const auto merge = HWY_DYNAMIC_POINTER(Merge);
    const auto merged = [&](size_t group) {
        for (size_t r = 0; r < rows; ++r) {
            const size_t at = group * a.spans * rows + r;
            merge(a, partial.get() + at, sums.get() + at * across, rows, rows * across,
                  a.p.y + a.query_of(group / a.key_heads, group % a.key_heads, r));
        }
    };
    // Pieces by what they read, which does not depend on how many threads there are.
    const size_t all = groups * a.spans, numbers = groups * a.total * a.size * 2;
    const size_t pieces = std::min(all, numbers / kMoved + 1);
    run(threads, pieces, [&](size_t piece) {
        for (size_t i = all * piece / pieces; i < all * (piece + 1) / pieces; ++i) {
            const size_t group = i / a.spans;
            span(a, group / a.key_heads, group % a.key_heads, i % a.spans, partial.get() + i * rows,
                 sums.get() + i * rows * across);
            if (a.spans == 1) merged(group);
        }
    });
    if (a.spans > 1)
        for (size_t group = 0; group < groups; ++group) merged(group);
}

void many(const Attending &a, const ingot_cpu_threads &threads) {
    const auto block = HWY_DYNAMIC_POINTER(Block);
    const size_t tokens = std::max<size_t>(1, kPieceRows / a.shared), blocks = (a.tokens + tokens - 1) / tokens;
    run(threads, a.batch * a.key_heads * blocks, [&](size_t i) {
        // The last tokens see the most, so they are begun first.
        const size_t group = i % (a.batch * a.key_heads), first = (blocks - 1 - i / (a.batch * a.key_heads)) * tokens;
        block(a, group / a.key_heads, group % a.key_heads, first, std::min(tokens, a.tokens - first));
    });
}

void attend(const ingot_cpu_attention_params &p, const ingot_cpu_threads &threads) {
    const Attending a(p);
    if (!a.batch || !a.total) return;
    const auto append = HWY_DYNAMIC_POINTER(Append);
    const size_t groups = a.batch * a.key_heads;
    const size_t moved = groups * a.size * (a.tokens + (p.present_key == p.past_key ? 0 : a.past));
    const size_t pieces = std::min(groups, moved / kMoved + 1);
    run(threads, pieces, [&](size_t piece) {
        for (size_t i = groups * piece / pieces; i < groups * (piece + 1) / pieces; ++i)
            append(a, i / a.key_heads, i % a.key_heads);
    });
    // A call without tokens hands the caches on.
    if (!a.tokens) return;
    const auto look = HWY_DYNAMIC_POINTER(Look);
    const size_t each = std::max<size_t>(1, kMoved * 4 / a.total), all = a.batch * a.tokens;
    run(threads, (all + each - 1) / each, [&](size_t i) { look(a, i * each, std::min(all, (i + 1) * each)); });
    if (a.rows <= kFew)
        few(a, threads);
    else
        many(a, threads);
}

// Key by key, in float64.
void reference_attention(const ingot_cpu_attention_params &p) {
    const Attending a(p);
    const auto turned = [&](const float *x, size_t token) {
        std::vector<double> result(x, x + a.size);
        for (size_t i = 0; i < a.turned; ++i) {
            const double cos = p.cos[token * a.turned + i], sin = p.sin[token * a.turned + i];
            result[i] = x[i] * cos - x[a.turned + i] * sin;
            result[a.turned + i] = x[a.turned + i] * cos + x[i] * sin;
        }
        return result;
    };
    for (size_t row = 0; row < a.batch; ++row)
        for (size_t head = 0; head < a.key_heads; ++head) {
            const size_t index = row * a.key_heads + head, from = index * size_t(p.past_capacity) * a.size;
            float *keys = p.present_key + index * a.capacity * a.size, *values = p.present_value + index * a.capacity * a.size;
            if (p.present_key != p.past_key) std::copy_n(p.past_key + from, a.past * a.size, keys);
            if (p.present_value != p.past_value) std::copy_n(p.past_value + from, a.past * a.size, values);
            for (size_t t = 0; t < a.tokens; ++t) {
                const size_t token = row * a.tokens + t, at = (token * a.key_heads + head) * a.size;
                const auto key = turned(p.key + at, token);
                std::transform(key.begin(), key.end(), keys + (a.past + t) * a.size, [](double x) { return float(x); });
                std::copy_n(p.value + at, a.size, values + (a.past + t) * a.size);
            }
        }
    for (size_t token = 0; token < a.batch * a.tokens; ++token)
        for (size_t head = 0; head < a.heads; ++head) {
            const size_t row = token / a.tokens, at = (token * a.heads + head) * a.size;
            const float *keys = a.cache(p.present_key, row, head / a.shared);
            const float *values = a.cache(p.present_value, row, head / a.shared);
            const auto query = turned(p.query + at, token);
            double most = -std::numeric_limits<double>::infinity(), sum = 0;
            std::vector<double> scores(a.total, most), result(a.size, 0.0);
            for (size_t k = 0; k < a.total; ++k) {
                if (!p.visible[token * a.total + k]) continue;
                double score = 0;
                for (size_t i = 0; i < a.size; ++i) score += query[i] * keys[k * a.size + i];
                scores[k] = score * double(p.scale);
                most = std::max(most, scores[k]);
            }
            for (size_t k = 0; k < a.total; ++k) {
                if (!p.visible[token * a.total + k]) continue;
                const double weight = std::exp(scores[k] - most);
                sum += weight;
                for (size_t i = 0; i < a.size; ++i) result[i] += weight * values[k * a.size + i];
            }
            for (size_t i = 0; i < a.size; ++i) p.y[at + i] = float(result[i] / sum);
        }
}

}  // namespace
}  // namespace ingot::cpu

using namespace ingot::cpu;

int ingot_cpu_attention(const ingot_cpu_attention_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_attention_params &p = *params;
        check_size("batch", p.batch, 0);
        check_size("tokens", p.tokens, 0);
        check_size("heads", p.heads);
        check_size("key_heads", p.key_heads);
        check_size("head_size", p.head_size);
        check_size("past", p.past, 0);
        check_size("capacity", p.capacity, 0);
        require(p.heads % p.key_heads == 0, "heads has to be a multiple of key_heads");
        require(p.rotated >= 0 && p.rotated % 2 == 0 && p.rotated <= p.head_size,
                "rotated has to be even and at most head_size");
        require(p.past <= p.past_capacity && p.past + p.tokens <= p.capacity, "the caches have too little room");
        require((p.present_key != p.past_key && p.present_value != p.past_value) || p.capacity == p.past_capacity,
                "caches that are written in place have one capacity");
        if (use_reference()) return reference_attention(p);
        attend(p, *threads);
    });
}
#endif  // HWY_ONCE
