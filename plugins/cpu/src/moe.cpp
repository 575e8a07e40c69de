// ingot_cpu_moe_dispatch and ingot_cpu_moe_linear: the rows of each expert, side by side, through
// the products of product.h, so that each expert that is chosen is read once. And ingot_cpu_mlp, of
// which all tokens have the one expert.
#include <algorithm>
#include <cmath>

#include "product.h"
#include "reference.h"
#include "refuse.h"
#include "targets.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "moe.cpp"
#include "hwy/foreach_target.h"
#include "activation-inl.h"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace ingot::cpu {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

// hidden[i] = activation(gate[i]) * up[i]
void Gate(const float *gate, const float *up, size_t count, int32_t activation, float *hidden) {
    const hn::ScalableTag<float> d;
    const size_t lanes = hn::Lanes(d);
    size_t i = 0;
    for (; i + lanes <= count; i += lanes)
        hn::StoreU(hn::Mul(activate(d, activation, hn::LoadU(d, gate + i)), hn::LoadU(d, up + i)), d,
                   hidden + i);
    if (i < count)
        hn::StoreN(hn::Mul(activate(d, activation, hn::LoadN(d, gate + i, count - i)),
                           hn::LoadN(d, up + i, count - i)),
                   d, hidden + i, count - i);
}

// y = sum over k of weights[k] * rows[k]
void Combine(const float *const *rows, const float *weights, size_t chosen, size_t count, float *y) {
    const hn::ScalableTag<float> d;
    const size_t lanes = hn::Lanes(d);
    for (size_t i = 0; i < count; i += lanes) {
        const size_t left = std::min(lanes, count - i);
        auto sum = hn::Zero(d);
        for (size_t k = 0; k < chosen; ++k)
            sum = hn::MulAdd(hn::Set(d, weights[k]), hn::LoadN(d, rows[k] + i, left), sum);
        hn::StoreN(sum, d, y + i, left);
    }
}

}  // namespace HWY_NAMESPACE
}  // namespace ingot::cpu
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace ingot::cpu {

HWY_EXPORT(Gate);
HWY_EXPORT(Combine);

namespace {

// Floats that the rows of a slice of tokens may take.
constexpr size_t kSliceFloats = size_t(16) << 20;

// What each row of a slice is for, sorted by expert: jobs for the experts that have any.
struct Sorted {
    Sorted(const int64_t *ids, size_t choices, size_t experts, const void *weight, size_t bytes,
           const Target *target) {
        std::vector<size_t> counts(experts);
        for (size_t choice = 0; choice < choices; ++choice) ++counts[size_t(ids[choice])];
        std::vector<size_t> next(experts);
        for (size_t expert = 0, first = 0; expert < experts; first += counts[expert++]) {
            next[expert] = first;
            if (counts[expert])
                jobs.push_back({static_cast<const uint8_t *>(weight) + expert * bytes, first, counts[expert], target});
            if (counts[expert]) chosen.push_back(expert);
        }
        choice_of_row.resize(choices);
        row_of_choice.resize(choices);
        for (size_t choice = 0; choice < choices; ++choice) {
            const size_t row = next[size_t(ids[choice])]++;
            choice_of_row[row] = choice;
            row_of_choice[choice] = row;
        }
    }
    std::vector<Job> jobs;
    std::vector<size_t> chosen, choice_of_row, row_of_choice;
};

// The experts of one token and their weights: softmax over all, then the largest logits; of equal
// ones the first.
void route(const float *logits, size_t experts, size_t top_k, bool normalize, int64_t *ids, float *weights) {
    std::vector<bool> taken(experts);
    for (size_t k = 0; k < top_k; ++k) {
        size_t best = experts;
        for (size_t expert = 0; expert < experts; ++expert)
            if (!taken[expert] && (best == experts || logits[expert] > logits[best])) best = expert;
        taken[best] = true;
        ids[k] = int64_t(best);
    }
    const double largest = logits[ids[0]];
    double all = 0, some = 0;
    for (size_t expert = 0; expert < experts; ++expert) all += std::exp(logits[expert] - largest);
    for (size_t k = 0; k < top_k; ++k) some += std::exp(logits[ids[k]] - largest);
    for (size_t k = 0; k < top_k; ++k)
        weights[k] = float(std::exp(logits[ids[k]] - largest) / (normalize ? some : all));
}

struct Rows {
    const float *x;
    size_t columns, choices_of_row;  // of x
    const size_t *choice_of_row;
    static const float *of(const void *self, size_t row) {
        const Rows &rows = *static_cast<const Rows *>(self);
        const size_t choice = rows.choice_of_row ? rows.choice_of_row[row] : row;
        return rows.x + choice / rows.choices_of_row * rows.columns;
    }
};

void reference_dispatch(const ingot_cpu_moe_dispatch_params &p, const int64_t *ids, const float *weights) {
    const size_t hidden = size_t(p.hidden), inner = size_t(p.intermediate), top_k = size_t(p.top_k);
    const size_t gate_up = matrix_bytes(p.gate_up_format, 2 * inner, hidden);
    const size_t down = matrix_bytes(p.down_format, hidden, inner);
    for (size_t n = 0; n < size_t(p.tokens); ++n) {
        std::vector<double> sum(hidden);
        for (size_t k = 0; k < top_k; ++k) {
            const size_t expert = size_t(ids[n * top_k + k]);
            const auto both = reference_product(
                p.gate_up_format, static_cast<const uint8_t *>(p.gate_up) + expert * gate_up,
                {p.x + n * hidden, p.x + (n + 1) * hidden}, 2 * inner, p.round_activations);
            std::vector<double> h(inner);
            for (size_t i = 0; i < inner; ++i)
                h[i] = reference_activation(p.activation, both[i]) * both[inner + i];
            const auto out = reference_product(p.down_format,
                                               static_cast<const uint8_t *>(p.down) + expert * down, h,
                                               hidden, p.round_activations);
            for (size_t i = 0; i < hidden; ++i) sum[i] += weights[n * top_k + k] * out[i];
        }
        for (size_t i = 0; i < hidden; ++i) p.y[n * hidden + i] = float(sum[i]);
    }
}

// Where rows of gate and of up are: both [rows], so many floats from one row to the next.
struct Both {
    const float *gate, *up;
    size_t stride;
};

// middle[row] = activation(gate[row]) * up[row], each `inner` floats.
void gate_rows(const ingot_cpu_threads &threads, const Both &both, size_t rows, size_t inner,
               int32_t activation, float *middle) {
    const auto gate = HWY_DYNAMIC_POINTER(Gate);
    const size_t pieces = rows * inner < (1 << 15) ? 1 : std::min<size_t>(rows, 64);
    run(threads, pieces, [&](size_t piece) {
        for (size_t row = rows * piece / pieces; row < rows * (piece + 1) / pieces; ++row)
            gate(both.gate + row * both.stride, both.up + row * both.stride, inner, activation,
                 middle + row * inner);
    });
}

// A slice of the tokens.
void mlp(const ingot_cpu_mlp_params &p, const ingot_cpu_threads &threads, size_t begin, size_t tokens) {
    const size_t hidden = size_t(p.hidden), inner = size_t(p.intermediate);
    const Buffer<float> gate(tokens * inner), up(tokens * inner);
    {
        const Target to_gate{inner, gate.get(), nullptr, nullptr, 1}, to_up{inner, up.get(), nullptr, nullptr, 1};
        const Job jobs[] = {{static_cast<const uint8_t *>(p.gate), 0, tokens, &to_gate},
                            {static_cast<const uint8_t *>(p.up), 0, tokens, &to_up}};
        const Product product(p.gate_up_format, hidden, p.round_activations, jobs, 2);
        const Rows rows{p.x + begin * hidden, hidden, 1, nullptr};
        product.pack(threads, Rows::of, &rows);
        product.multiply(threads);
    }
    gate_rows(threads, {gate.get(), up.get(), inner}, tokens, inner, p.activation, gate.get());
    const float *residual = p.residual ? p.residual + begin * hidden : nullptr;
    const Target target{hidden, p.y + begin * hidden, nullptr, residual, p.scale};
    const Job job{static_cast<const uint8_t *>(p.down), 0, tokens, &target};
    const Product product(p.down_format, inner, p.round_activations, &job, 1);
    const Rows rows{gate.get(), inner, 1, nullptr};
    product.pack(threads, Rows::of, &rows);
    product.multiply(threads);
}

// A slice of the tokens.
void dispatch(const ingot_cpu_moe_dispatch_params &p, const ingot_cpu_threads &threads, size_t begin,
              size_t tokens, const int64_t *ids, const float *weights) {
    const size_t hidden = size_t(p.hidden), inner = size_t(p.intermediate), top_k = size_t(p.top_k);
    const size_t choices = tokens * top_k;
    const Buffer<float> both(choices * 2 * inner), middle(choices * inner), out(choices * hidden);
    const Target to_both{2 * inner, both.get(), nullptr, nullptr, 1}, to_out{hidden, out.get(), nullptr, nullptr, 1};
    const Sorted sorted(ids, choices, size_t(p.experts), p.gate_up,
                        matrix_bytes(p.gate_up_format, 2 * inner, hidden), &to_both);
    {
        const Product product(p.gate_up_format, hidden, p.round_activations, sorted.jobs.data(),
                              sorted.jobs.size());
        const Rows rows{p.x + begin * hidden, hidden, top_k, sorted.choice_of_row.data()};
        product.pack(threads, Rows::of, &rows);
        product.multiply(threads);
    }
    gate_rows(threads, {both.get(), both.get() + inner, 2 * inner}, choices, inner, p.activation, middle.get());
    {
        std::vector<Job> jobs = sorted.jobs;
        const size_t bytes = matrix_bytes(p.down_format, hidden, inner);
        for (size_t job = 0; job < jobs.size(); ++job) {
            jobs[job].weight = static_cast<const uint8_t *>(p.down) + sorted.chosen[job] * bytes;
            jobs[job].target = &to_out;
        }
        const Product product(p.down_format, inner, p.round_activations, jobs.data(), jobs.size());
        const Rows rows{middle.get(), inner, 1, nullptr};
        product.pack(threads, Rows::of, &rows);
        product.multiply(threads);
    }
    const auto combine = HWY_DYNAMIC_POINTER(Combine);
    const size_t parts = choices * hidden < (1 << 15) ? 1 : std::min<size_t>(tokens, 64);
    run(threads, parts, [&](size_t part) {
        std::vector<const float *> rows(top_k);
        for (size_t n = tokens * part / parts; n < tokens * (part + 1) / parts; ++n) {
            for (size_t k = 0; k < top_k; ++k)
                rows[k] = out.get() + sorted.row_of_choice[n * top_k + k] * hidden;
            combine(rows.data(), weights + n * top_k, top_k, hidden, p.y + (begin + n) * hidden);
        }
    });
}

// How many tokens at a time: their rows may take kSliceFloats.
size_t slice_of(size_t tokens, size_t floats) {
    return std::min(tokens, std::max<size_t>(16, kSliceFloats / std::max<size_t>(floats, 1)));
}

void check_choice(int64_t top_k, int64_t experts) {
    check_size("experts", experts);
    require(top_k >= 1 && top_k <= experts, "top_k is 1 to the number of experts");
}

}  // namespace
}  // namespace ingot::cpu

using namespace ingot::cpu;

int ingot_cpu_moe_dispatch(const ingot_cpu_moe_dispatch_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_moe_dispatch_params &p = *params;
        check(p.gate_up_format);
        check(p.down_format);
        check_size("tokens", p.tokens, 0);
        check_size("hidden", p.hidden);
        check_size("intermediate", p.intermediate);
        check_choice(p.top_k, p.experts);
        check_activation(p.activation);
        const size_t tokens = size_t(p.tokens), top_k = size_t(p.top_k), experts = size_t(p.experts);
        std::vector<int64_t> ids(tokens * top_k);
        std::vector<float> weights(tokens * top_k);
        for (size_t n = 0; n < tokens; ++n)
            route(p.router_logits + n * experts, experts, top_k, p.normalize, &ids[n * top_k],
                  &weights[n * top_k]);
        if (use_reference()) return reference_dispatch(p, ids.data(), weights.data());
        const size_t slice = slice_of(tokens, top_k * size_t(3 * p.intermediate + p.hidden));
        for (size_t begin = 0; begin < tokens; begin += slice)
            dispatch(p, *threads, begin, std::min(slice, tokens - begin), &ids[begin * top_k],
                     &weights[begin * top_k]);
    });
}

int ingot_cpu_mlp(const ingot_cpu_mlp_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_mlp_params &p = *params;
        check(p.gate_up_format);
        check(p.down_format);
        check_size("tokens", p.tokens, 0);
        check_size("hidden", p.hidden);
        check_size("intermediate", p.intermediate);
        check_activation(p.activation);
        if (use_reference()) return reference_mlp(p);
        const size_t tokens = size_t(p.tokens), slice = slice_of(tokens, size_t(2 * p.intermediate));
        for (size_t begin = 0; begin < tokens; begin += slice)
            mlp(p, *threads, begin, std::min(slice, tokens - begin));
    });
}

int ingot_cpu_moe_linear(const ingot_cpu_moe_linear_params *params, const ingot_cpu_threads *threads) {
    return answered([&] {
        const ingot_cpu_moe_linear_params &p = *params;
        check(p.format);
        check_size("tokens", p.tokens, 0);
        check_size("in_features", p.in_features);
        check_size("out_features", p.out_features);
        check_size("top_k", p.top_k);
        check_size("experts", p.experts);
        const size_t tokens = size_t(p.tokens), top_k = size_t(p.top_k), columns = size_t(p.in_features),
                     out = size_t(p.out_features);
        for (size_t choice = 0; choice < tokens * top_k; ++choice)
            require(p.expert_ids[choice] >= 0 && p.expert_ids[choice] < p.experts,
                    "an expert's id is not 0 to the number of experts less one");
        const size_t bytes = matrix_bytes(p.format, out, columns);
        const size_t slice = slice_of(tokens, top_k * (columns + 2 * out));
        for (size_t begin = 0; begin < tokens; begin += slice) {
            const size_t choices = std::min(slice, tokens - begin) * top_k;
            const int64_t *ids = p.expert_ids + begin * top_k;
            float *y = p.y + begin * top_k * out;
            const Buffer<float> found(use_reference() ? 0 : choices * out);
            const Target target{out, found.get(), nullptr, nullptr, 1};
            const Sorted sorted(ids, choices, size_t(p.experts), p.weight, bytes, &target);
            const Rows rows{p.x + begin * (p.per_choice ? top_k : 1) * columns, columns,
                            p.per_choice ? 1 : top_k, sorted.choice_of_row.data()};
            if (use_reference()) {
                for (size_t row = 0; row < choices; ++row) {
                    const size_t choice = sorted.choice_of_row[row];
                    const float *x = Rows::of(&rows, row);
                    const auto found = reference_product(
                        p.format, static_cast<const uint8_t *>(p.weight) + size_t(ids[choice]) * bytes,
                        {x, x + columns}, out, p.round_activations);
                    std::copy(found.begin(), found.end(), y + choice * out);
                }
                continue;
            }
            const Product product(p.format, columns, p.round_activations, sorted.jobs.data(),
                                  sorted.jobs.size());
            product.pack(*threads, Rows::of, &rows);
            product.multiply(*threads);
            for (size_t choice = 0; choice < choices; ++choice)
                std::copy_n(found.get() + sorted.row_of_choice[choice] * out, out, y + choice * out);
        }
    });
}
#endif  // HWY_ONCE
