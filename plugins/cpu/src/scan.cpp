// ingot_cpu_mamba2_scan.
//
// Two forms, both over the state as it is stored, with its Ns numbers of a row in a vector:
//
//   token by token  the recurrence. A few tokens, and those after the last whole chunk, go this way;
//                   of one token the state is read and written once.
//   in chunks       section 6 of arXiv:2405.21060 with small products in registers, which touch each
//                   number of the state twice a token and not three times. What one token passes to
//                   another decays by a product of the steps' own decays, as the recurrence
//                   multiplies them; so no sum of exponents can cancel. What is not finite may
//                   reach earlier tokens of its chunk.
//
// A piece of work is some rows of one head's state, which stay in the first-level cache over all
// tokens. What heads share is prepared before: every step and decay, and of each chunk C with its
// tokens side by side and the products of C and B.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "refuse.h"
#include "targets.h"

#ifndef INGOT_CPU_SCAN
#define INGOT_CPU_SCAN
namespace ingot::cpu {

// Tokens of a chunk.
constexpr size_t kChunk = 16;
// Rows of a head's state in a piece of work: so many where heads alone make many pieces, and half of
// them elsewhere.
constexpr size_t kSlice = 64, kManyHeads = 64;

struct Scan {
    explicit Scan(const ingot_cpu_mamba2_scan_params &params)
        : p(params),
          batch(size_t(p.batch)),
          tokens(size_t(p.tokens)),
          heads(size_t(p.heads)),
          size(size_t(p.head_size)),
          groups(size_t(p.groups)),
          states(size_t(p.states)),
          x_stride(size_t(p.x_stride)),
          dt_stride(size_t(p.dt_stride)),
          bc_stride(size_t(p.bc_stride)),
          chunks(tokens / kChunk),
          slice(batch * heads >= kManyHeads ? kSlice : kSlice / 2),
          steps(batch * tokens * heads),
          decays(batch * tokens * heads),
          c_columns(batch * chunks * groups * states * kChunk),
          products(batch * chunks * groups * kChunk * kChunk) {}

    const ingot_cpu_mamba2_scan_params &p;
    size_t batch, tokens, heads, size, groups, states, x_stride, dt_stride, bc_stride, chunks, slice;
    Buffer<float> steps, decays;  // dt' and exp(dt' A), [B, T, Hm]
    Buffer<float> c_columns;      // [B, chunks, G][Ns][token]
    Buffer<float> products;       // B_s C_t, [B, chunks, G][s][t]
};

}  // namespace ingot::cpu
#endif

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "scan.cpp"
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
// Vectors of a chunk's tokens.
constexpr size_t kWide = kChunk / kLanes;
// Sums in registers at a time.
constexpr size_t kSums = kLanes == 16 || HWY_ARCH_ARM ? 16 : 8;
// Rows of the state whose y is summed at a time, and the vectors of a row that are carried on.
constexpr size_t kTall = kSums / kWide;
constexpr size_t kAbreast = 4;
constexpr size_t kCarried = kSums / kAbreast;
constexpr size_t kMostRows = std::max(kTall, kAbreast);

// --- What heads share

// dt' and its decay for one token of all heads.
void steps_of(const Scan &scan, size_t token) {
    const D d;
    const auto &p = scan.p;
    const V mask = hn::Set(d, p.mask[token]), least = hn::Set(d, p.dt_min), most = hn::Set(d, p.dt_max);
    const V threshold = hn::Set(d, 20.0f);
    for (size_t h = 0; h < scan.heads; h += kLanes) {
        const size_t left = scan.heads - h, at = token * scan.heads + h;
        const float *dt = p.dt + token * scan.dt_stride + h;
        const V raw = hn::Add(hn::LoadN(d, dt, left), hn::LoadN(d, p.dt_bias + h, left));
        // As PyTorch's softplus, which is its argument above 20.
        const V small = hn::Log1p(d, hn::Exp(d, hn::Min(raw, threshold)));
        const V soft = hn::IfThenElse(hn::Gt(raw, threshold), raw, small);
        const V clamped = hn::Min(hn::Max(soft, least), most);
        // What is no number stays none.
        const V step = hn::Mul(hn::IfThenElse(hn::IsNaN(raw), raw, clamped), mask);
        const V exponent = hn::Mul(step, hn::LoadN(d, p.a + h, left));
        // Highway's exp is meant for at most 104, where it is infinite already.
        const V decay = hn::Exp(d, hn::Min(exponent, hn::Set(d, 104.0f)));
        hn::StoreN(step, d, scan.steps.get() + at, left);
        hn::StoreN(decay, d, scan.decays.get() + at, left);
    }
}

// Sums over n of rows[m * stride + n] and columns[n][token].
HWY_INLINE void multiply(const float *rows, size_t stride, const float *columns, size_t states,
                         V (&sums)[kTall][kWide]) {
    const D d;
    // Four rows an address, since there are too few registers for one each.
    const float *quads[(kTall + 3) / 4];
    for (size_t q = 0; q < (kTall + 3) / 4; ++q) quads[q] = rows + q * 4 * stride;
    INGOT_UNROLL
    for (auto &row : sums)
        INGOT_UNROLL
        for (auto &sum : row) sum = hn::Zero(d);
    for (size_t n = 0; n < states; ++n) {
        V c[kWide];
        INGOT_UNROLL
        for (size_t w = 0; w < kWide; ++w) c[w] = hn::LoadU(d, columns + n * kChunk + w * kLanes);
        INGOT_UNROLL
        for (size_t m = 0; m < kTall; ++m) {
            const V s = hn::Set(d, quads[m / 4][m % 4 * stride]);
            INGOT_UNROLL
            for (size_t w = 0; w < kWide; ++w) sums[m][w] = hn::MulAdd(s, c[w], sums[m][w]);
        }
        for (auto &quad : quads) ++quad;
    }
}

// The tokens of one chunk, or those after the last.
void Prepare(const Scan &scan, size_t batch, size_t chunk) {
    const D d;
    const size_t first = batch * scan.tokens + chunk * kChunk;
    const size_t end = std::min(first + kChunk, (batch + 1) * scan.tokens);
    for (size_t token = first; token < end; ++token) steps_of(scan, token);
    if (chunk >= scan.chunks) return;
    const size_t stride = scan.bc_stride;
    for (size_t group = 0; group < scan.groups; ++group) {
        const size_t index = (batch * scan.chunks + chunk) * scan.groups + group;
        const float *b = scan.p.b + first * stride + group * scan.states;
        float *columns = scan.c_columns.get() + index * scan.states * kChunk;
        float *products = scan.products.get() + index * kChunk * kChunk;
        columns_of(scan.p.c + first * stride + group * scan.states, stride, kChunk, scan.states, columns, kChunk);
        for (size_t s = 0; s < kChunk; s += kTall) {
            V sums[kTall][kWide];
            multiply(b + s * stride, stride, columns, scan.states, sums);
            INGOT_UNROLL
            for (size_t m = 0; m < kTall; ++m)
                INGOT_UNROLL
                for (size_t w = 0; w < kWide; ++w)
                    hn::StoreU(sums[m][w], d, products + (s + m) * kChunk + w * kLanes);
        }
    }
}

// --- Token by token

struct Token {
    float step, decay, skip;  // dt', exp(dt' A) and D
    const float *b, *c;       // [Ns]
};

// One token of kRows rows of a state: x and y are [kRows].
template <size_t kRows>
HWY_INLINE void step_rows(const Token &token, const float *from, float *to, size_t states, const float *x,
                          float *y) {
    const D d;
    V sums[4] = {hn::Zero(d), hn::Zero(d), hn::Zero(d), hn::Zero(d)};
    if (token.step == 0) {
        // Not a bit of the state changes, be it a negative zero.
        for (size_t n = 0; n < states; n += kLanes) {
            const V c = hn::LoadN(d, token.c + n, states - n);
            INGOT_UNROLL
            for (size_t m = 0; m < kRows; ++m)
                sums[m] = hn::MulAdd(hn::LoadN(d, from + m * states + n, states - n), c, sums[m]);
        }
        if (from != to) std::memcpy(to, from, kRows * states * sizeof(float));
    } else {
        const V decay = hn::Set(d, token.decay);
        V scaled[kRows];
        INGOT_UNROLL
        for (size_t m = 0; m < kRows; ++m) scaled[m] = hn::Set(d, token.step * x[m]);
        const auto each = [&](size_t m, V s, V b, V c) HWY_ATTR {
            s = hn::MulAdd(scaled[m], b, hn::Mul(s, decay));
            sums[m] = hn::MulAdd(s, c, sums[m]);
            return s;
        };
        size_t n = 0;
        for (; n + kLanes <= states; n += kLanes) {
            const V b = hn::LoadU(d, token.b + n), c = hn::LoadU(d, token.c + n);
            INGOT_UNROLL
            for (size_t m = 0; m < kRows; ++m)
                hn::StoreU(each(m, hn::LoadU(d, from + m * states + n), b, c), d, to + m * states + n);
        }
        if (const size_t left = states - n) {
            const V b = hn::LoadN(d, token.b + n, left), c = hn::LoadN(d, token.c + n, left);
            INGOT_UNROLL
            for (size_t m = 0; m < kRows; ++m)
                hn::StoreN(each(m, hn::LoadN(d, from + m * states + n, left), b, c), d,
                           to + m * states + n, left);
        }
    }
    const Four four;
    const V4 skip = hn::Set(four, token.skip);
    hn::StoreN(hn::MulAdd(skip, hn::LoadN(four, x, kRows), sums_of(d, sums)), four, y, kRows);
}

// --- In chunks

struct Chunk {
    size_t head, row, rows;  // of the state
    size_t token;            // the first, counted over the batch
    const float *c_columns, *products, *b;
    const float *from;  // [rows, Ns]
    float *to;
};

// What is below the normal numbers, whose products would be slow.
HWY_INLINE V normal(D d, V v) {
    return hn::IfThenElseZero(hn::Ge(v, hn::Set(d, std::numeric_limits<float>::min())), v);
}

void chunk_of(const Scan &scan, const Chunk &chunk, float *spare) {
    const D d;
    const Four four;
    const hn::RebindToSigned<D> di;
    const size_t states = scan.states, size = scan.size, heads = scan.heads;
    HWY_ALIGN float passed[kChunk][kChunk];  // what y_t takes of x_s, [s][t]
    HWY_ALIGN float kept[kChunk];            // of the state, at each token
    HWY_ALIGN float x[kChunk][kSlice], added[kChunk][kSlice];
    HWY_ALIGN float y[kSlice][kChunk];

    // decayed: from token s to each token t.
    V decayed[kWide];
    INGOT_UNROLL
    for (auto &v : decayed) v = hn::Zero(d);
    const float *steps = scan.steps.get() + chunk.token * heads + chunk.head;
    const float *decays = scan.decays.get() + chunk.token * heads + chunk.head;
    float to_end = 1;
    bool any = false;
    for (size_t s = kChunk; s-- > 0;) {
        const float step = steps[s * heads];
        const V wide = hn::Set(d, step), decay = hn::Set(d, decays[s * heads]);
        INGOT_UNROLL
        for (size_t w = 0; w < kWide; ++w) {
            const auto here = hn::Eq(hn::Iota(di, int32_t(w * kLanes)), hn::Set(di, int32_t(s)));
            const V path = hn::IfThenElse(hn::RebindMask(d, here), hn::Set(d, 1.0f), decayed[w]);
            const V product = hn::LoadU(d, chunk.products + s * kChunk + w * kLanes);
            // Padding may hold what makes the product infinite.
            const V all = step == 0 ? hn::Zero(d) : hn::Mul(hn::Mul(path, wide), product);
            hn::StoreU(all, d, passed[s] + w * kLanes);
            decayed[w] = normal(d, hn::Mul(path, decay));
        }
        any |= step != 0;
        const float *row = scan.p.x + (chunk.token + s) * scan.x_stride + chunk.head * size + chunk.row;
        const V weight = hn::Set(d, to_end * step);
        for (size_t i = 0; i < scan.slice; i += kLanes) {
            const V value = i + kLanes <= chunk.rows ? hn::LoadU(d, row + i)
                            : i < chunk.rows         ? hn::LoadN(d, row + i, chunk.rows - i)
                                                     : hn::Zero(d);
            hn::StoreU(value, d, x[s] + i);
            hn::StoreU(hn::Mul(value, weight), d, added[s] + i);
        }
        to_end *= decays[s * heads];
        if (to_end < std::numeric_limits<float>::min()) to_end = 0;
    }
    INGOT_UNROLL
    for (size_t w = 0; w < kWide; ++w) hn::StoreU(decayed[w], d, kept + w * kLanes);

    const float *before = chunk.from;
    if (chunk.rows < kTall) {
        std::copy_n(before, chunk.rows * states, spare);
        before = spare;
    }
    for (size_t next = 0; next < chunk.rows; next += kTall) {
        // The last rows with some of those before, where they are too few.
        const size_t row = std::min(next, std::max(chunk.rows, kTall) - kTall);
        V sums[kTall][kWide];
        multiply(before + row * states, states, chunk.c_columns, states, sums);
        INGOT_UNROLL
        for (size_t w = 0; w < kWide; ++w) {
            const V factor = hn::LoadU(d, kept + w * kLanes);
            INGOT_UNROLL
            for (size_t m = 0; m < kTall; ++m) sums[m][w] = hn::Mul(sums[m][w], factor);
        }
        INGOT_UNROLL
        for (size_t part = 0; part < kWide; ++part)
            for (size_t s = part * kLanes; s < (part + 1) * kLanes; ++s) {
                // Tokens of the parts before come earlier than s.
                V weights[kWide];
                INGOT_UNROLL
                for (size_t w = part; w < kWide; ++w) weights[w] = hn::LoadU(d, passed[s] + w * kLanes);
                INGOT_UNROLL
                for (size_t m = 0; m < kTall; ++m) {
                    const V value = hn::Set(d, x[s][row + m]);
                    INGOT_UNROLL
                    for (size_t w = part; w < kWide; ++w)
                        sums[m][w] = hn::MulAdd(value, weights[w], sums[m][w]);
                }
            }
        INGOT_UNROLL
        for (size_t m = 0; m < kTall; ++m)
            INGOT_UNROLL
            for (size_t w = 0; w < kWide; ++w) hn::StoreU(sums[m][w], d, y[row + m] + w * kLanes);
    }

    const V4 skip = hn::Set(four, scan.p.d[chunk.head]);
    for (size_t i = 0; i < chunk.rows; i += 4)
        for (size_t t = 0; t < kChunk; t += 4) {
            V4 v[4];
            INGOT_UNROLL
            for (size_t m = 0; m < 4; ++m) v[m] = hn::LoadU(four, y[i + m] + t);
            transpose(v);
            INGOT_UNROLL
            for (size_t m = 0; m < 4; ++m) {
                const V4 all = hn::MulAdd(skip, hn::LoadU(four, x[t + m] + i), v[m]);
                float *to = scan.p.y + ((chunk.token + t + m) * heads + chunk.head) * size + chunk.row + i;
                if (i + 4 <= chunk.rows)
                    hn::StoreU(all, four, to);
                else
                    hn::StoreN(all, four, to, chunk.rows - i);
            }
        }

    if (!any) {
        if (chunk.from != chunk.to) std::memcpy(chunk.to, chunk.from, chunk.rows * states * sizeof(float));
        return;
    }
    const V decay = hn::Set(d, to_end);
    const size_t stride = scan.bc_stride;
    for (size_t row = 0; row < chunk.rows; row += kAbreast) {
        // Rows that there are not are written to memory of their own.
        const float *from[kAbreast];
        float *to[kAbreast];
        for (size_t m = 0; m < kAbreast; ++m) {
            const bool real = row + m < chunk.rows;
            from[m] = real ? chunk.from + (row + m) * states : spare;
            to[m] = real ? chunk.to + (row + m) * states : spare;
        }
        const auto carry = [&](auto vectors, size_t n) HWY_ATTR {
            constexpr size_t kVectors = decltype(vectors)::value;
            V sums[kAbreast][kVectors];
            INGOT_UNROLL
            for (size_t m = 0; m < kAbreast; ++m)
                INGOT_UNROLL
                for (size_t v = 0; v < kVectors; ++v)
                    sums[m][v] = hn::Mul(decay, hn::LoadU(d, from[m] + n + v * kLanes));
            for (size_t s = 0; s < kChunk; ++s) {
                V b[kVectors];
                INGOT_UNROLL
                for (size_t v = 0; v < kVectors; ++v)
                    b[v] = hn::LoadU(d, chunk.b + s * stride + n + v * kLanes);
                INGOT_UNROLL
                for (size_t m = 0; m < kAbreast; ++m) {
                    const V value = hn::Set(d, added[s][row + m]);
                    INGOT_UNROLL
                    for (size_t v = 0; v < kVectors; ++v) sums[m][v] = hn::MulAdd(value, b[v], sums[m][v]);
                }
            }
            INGOT_UNROLL
            for (size_t m = 0; m < kAbreast; ++m)
                INGOT_UNROLL
                for (size_t v = 0; v < kVectors; ++v) hn::StoreU(sums[m][v], d, to[m] + n + v * kLanes);
        };
        size_t n = 0;
        for (; n + kCarried * kLanes <= states; n += kCarried * kLanes)
            carry(std::integral_constant<size_t, kCarried>(), n);
        for (; n + kLanes <= states; n += kLanes) carry(std::integral_constant<size_t, 1>(), n);
        for (; n < states; ++n)
            for (size_t m = 0; m < kAbreast; ++m) {
                float sum = to_end * from[m][n];
                for (size_t s = 0; s < kChunk; ++s) sum += added[s][row + m] * chunk.b[s * stride + n];
                to[m][n] = sum;
            }
    }
}

// Rows [slice * scan.slice, ...) of a head's state, over all tokens.
void Slice(const Scan &scan, size_t batch, size_t head, size_t slice) {
    const auto &p = scan.p;
    const size_t states = scan.states, first = batch * scan.tokens;
    const size_t group = head / (scan.heads / scan.groups);
    const size_t row = slice * scan.slice, rows = std::min(scan.slice, scan.size - row);
    const size_t offset = ((batch * scan.heads + head) * scan.size + row) * states;
    const float *from = p.state + offset;
    float *to = p.new_state + offset;
    const auto of_group = [&](const float *array, size_t token) {
        return array + token * scan.bc_stride + group * states;
    };
    if (scan.chunks) {
        const Buffer<float> spare(kMostRows * states);
        std::fill_n(spare.get(), kMostRows * states, 0.0f);
        for (size_t chunk = 0; chunk < scan.chunks; ++chunk) {
            const size_t index = (batch * scan.chunks + chunk) * scan.groups + group;
            const size_t token = first + chunk * kChunk;
            chunk_of(scan,
                     {head, row, rows, token, scan.c_columns.get() + index * states * kChunk,
                      scan.products.get() + index * kChunk * kChunk, of_group(p.b, token), from, to},
                     spare.get());
            from = to;
        }
    }
    for (size_t t = first + scan.chunks * kChunk; t < first + scan.tokens; ++t) {
        const size_t at = t * scan.heads + head;
        const Token token{scan.steps[at], scan.decays[at], p.d[head], of_group(p.b, t), of_group(p.c, t)};
        const float *x = p.x + t * scan.x_stride + head * scan.size + row;
        float *y = p.y + at * scan.size + row;
        size_t i = 0;
        for (; i + 4 <= rows; i += 4)
            step_rows<4>(token, from + i * states, to + i * states, states, x + i, y + i);
        for (; i < rows; ++i)
            step_rows<1>(token, from + i * states, to + i * states, states, x + i, y + i);
        from = to;
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace ingot::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ingot::cpu {
namespace {

HWY_EXPORT(Prepare);
HWY_EXPORT(Slice);

// What a piece reads and writes of states, at least, where there is one token.
constexpr size_t kPieceBytes = size_t(64) << 10;
constexpr size_t kMostPieces = 256;

void compute(const ingot_cpu_mamba2_scan_params &p, const ingot_cpu_threads &threads) {
    const Scan scan(p);
    const auto prepare = HWY_DYNAMIC_POINTER(Prepare);
    const auto slice_of = HWY_DYNAMIC_POINTER(Slice);
    const size_t chunks = (scan.tokens + kChunk - 1) / kChunk;
    run(threads, scan.chunks ? scan.batch * chunks : 1, [&](size_t piece) {
        if (scan.chunks) return prepare(scan, piece / chunks, piece % chunks);
        for (size_t batch = 0; batch < scan.batch; ++batch) prepare(scan, batch, 0);
    });
    const size_t slices = (scan.size + scan.slice - 1) / scan.slice;
    const size_t all = scan.batch * scan.heads * slices;
    const size_t bytes = scan.tokens * std::min(scan.slice, scan.size) * scan.states * 2 * sizeof(float);
    const size_t pieces = std::min({all, all * bytes / kPieceBytes + 1, kMostPieces});
    run(threads, pieces, [&](size_t piece) {
        for (size_t i = all * piece / pieces; i < all * (piece + 1) / pieces; ++i)
            slice_of(scan, i / slices / scan.heads, i / slices % scan.heads, i % slices);
    });
}

// The recurrence, step by step in float64.
void reference_scan(const ingot_cpu_mamba2_scan_params &p) {
    const auto tokens = size_t(p.tokens), heads = size_t(p.heads), size = size_t(p.head_size),
               groups = size_t(p.groups), states = size_t(p.states);
    for (size_t row = 0; row < size_t(p.batch) * heads; ++row) {
        const size_t batch = row / heads, h = row % heads, group = h / (heads / groups);
        std::vector<double> S(p.state + row * size * states, p.state + (row + 1) * size * states);
        for (size_t t = batch * tokens; t < (batch + 1) * tokens; ++t) {
            const double raw = double(p.dt[t * size_t(p.dt_stride) + h]) + p.dt_bias[h];
            const double soft = std::max(raw, 0.0) + std::log1p(std::exp(-std::abs(raw)));
            const double step = p.mask[t] * std::min(std::max(soft, double(p.dt_min)), double(p.dt_max));
            const double decay = std::exp(step * p.a[h]);
            const size_t bc = t * size_t(p.bc_stride) + group * states;
            const float *B = p.b + bc, *C = p.c + bc;
            for (size_t i = 0; i < size; ++i) {
                const double x = p.x[t * size_t(p.x_stride) + h * size + i];
                double y = p.d[h] * x;
                for (size_t n = 0; n < states; ++n) {
                    double &s = S[i * states + n];
                    if (step != 0) s = decay * s + step * x * B[n];
                    y += s * C[n];
                }
                p.y[(t * heads + h) * size + i] = float(y);
            }
        }
        for (size_t i = 0; i < S.size(); ++i) p.new_state[row * size * states + i] = float(S[i]);
    }
}

}  // namespace
}  // namespace ingot::cpu

using namespace ingot::cpu;

int ingot_cpu_mamba2_scan(const ingot_cpu_mamba2_scan_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_mamba2_scan_params &p = *params;
        check_size("batch", p.batch, 0);
        check_size("tokens", p.tokens, 0);
        check_size("heads", p.heads);
        check_size("head_size", p.head_size);
        check_size("groups", p.groups);
        check_size("states", p.states);
        if (p.heads % p.groups)
            throw Refused(std::to_string(p.heads) + " heads are no multiple of " +
                          std::to_string(p.groups) + " groups");
        require(p.x_stride >= p.heads * p.head_size && p.dt_stride >= p.heads && p.bc_stride >= p.groups * p.states,
                "a stride is shorter than a token");
        require(p.dt_min <= p.dt_max, "dt_min has to be a number up to dt_max");
        if (use_reference()) return reference_scan(p);
        if (p.tokens) return compute(p, *threads);
        if (p.state != p.new_state)
            std::memcpy(p.new_state, p.state,
                        size_t(p.batch * p.heads * p.head_size * p.states) * sizeof(float));
    });
}
#endif  // HWY_ONCE
