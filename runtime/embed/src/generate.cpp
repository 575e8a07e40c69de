// Greedy and sampled generation, several prompts at once.
#include <ingot/session.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>

#include "impl.hpp"

namespace ingot {
namespace {

void check(const Sampling &sampling) {
    // Written so that NaN is refused too.
    if (!(sampling.temperature >= 0.0 && std::isfinite(sampling.temperature))) {
        throw Error("temperature is " + std::to_string(sampling.temperature) +
                    "; it must be 0 or more.");
    }
    if (sampling.top_k < 0) {
        throw Error("top-k is " + std::to_string(sampling.top_k) + "; it must be 0 (off) or more.");
    }
    if (!(sampling.top_p > 0.0 && sampling.top_p <= 1.0)) {
        throw Error("top-p is " + std::to_string(sampling.top_p) +
                    "; it must be above 0 and at most 1.");
    }
}

// Chooses tokens for one call of `generate`.
class Sampler {
  public:
    explicit Sampler(const Sampling &sampling) : sampling_(sampling), random_(sampling.seed) {}

    // The next token of one row of logits [V].
    std::int64_t choose(const float *logits, std::size_t count) {
        for (std::size_t n = 0; n < count; ++n) {
            // An order of NaN is undefined, and a token chosen from them would look like an answer.
            if (std::isnan(logits[n]) || logits[n] == std::numeric_limits<float>::infinity()) {
                throw Error("the logits hold " + std::to_string(logits[n]) +
                            "; this model's numbers overflow: export it in a wider precision.");
            }
        }
        const float *likeliest = std::max_element(logits, logits + count);
        if (sampling_.temperature == 0.0) return likeliest - logits;
        return sample(logits, count, static_cast<double>(*likeliest));
    }

  private:
    std::int64_t sample(const float *logits, std::size_t count, double highest) {
        order_.resize(count);
        std::iota(order_.begin(), order_.end(), std::int64_t{0});
        std::size_t kept = count;
        if (sampling_.top_k > 0) {
            kept = std::min(count, static_cast<std::size_t>(sampling_.top_k));
        }
        const auto before = [&](std::int64_t a, std::int64_t b) {
            return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
        };
        std::partial_sort(order_.begin(), order_.begin() + static_cast<std::ptrdiff_t>(kept),
                          order_.end(), before);
        weights_.resize(kept);
        for (std::size_t n = 0; n < kept; ++n) {
            // Counted from the likeliest token and not from 0, so that no temperature is too small.
            weights_[n] = std::exp((static_cast<double>(logits[order_[n]]) - highest) /
                                   sampling_.temperature);
        }
        const double whole = std::accumulate(weights_.begin(), weights_.end(), 0.0);
        double sum = 0.0;
        for (std::size_t n = 0; n < kept; ++n) {
            sum += weights_[n];
            // The token that crosses top_p is kept, so at least one always is.
            if (sum >= sampling_.top_p * whole) kept = n + 1;
        }
        // The standard's distributions may differ between libraries; its generator may not.
        const double drawn = static_cast<double>(random_() >> 11) * 0x1.0p-53 * sum;
        double passed = 0.0;
        for (std::size_t n = 0; n + 1 < kept; ++n) {
            passed += weights_[n];
            if (drawn < passed) return order_[n];
        }
        return order_[kept - 1];
    }

    Sampling sampling_;
    std::mt19937_64 random_;
    std::vector<std::int64_t> order_;
    std::vector<double> weights_;
};

// Tokens of a prompt that are fed at once: those of a piece, or all of them where pieces would give
// something else, or be slow: of an ingot from before there was logits_to_keep, and of an engine;
// where the prompt is longer than the length at which the model turns all its positions; and of
// several rows that a session feeds token by token after a past.
std::int64_t piece_of(const Manifest &manifest, std::int64_t rows, std::int64_t tokens,
                      std::int64_t chunk) {
    const bool turned = tokens > manifest.generation.switch_length.value_or(tokens);
    if (chunk == 0 || !asks_for_last(manifest) || turned || (rows > 1 && by_token(manifest)))
        return tokens;
    return std::min(chunk, tokens);
}

// Prompts as one [B, T] batch, padded on the left.
struct Padded {
    std::int64_t longest = 0;
    Ids ids;
    Ids mask;
};

std::int64_t longest_of(const std::vector<Ids> &prompts) {
    std::size_t longest = 0;
    for (const Ids &prompt : prompts) {
        if (prompt.empty()) longest = std::numeric_limits<std::size_t>::max();
        longest = std::max(longest, prompt.size());
    }
    if (prompts.empty() || longest == std::numeric_limits<std::size_t>::max()) {
        throw Error("a prompt is empty or none was given; every prompt needs at least one token.");
    }
    return static_cast<std::int64_t>(longest);
}

Padded pad_left(const std::vector<Ids> &prompts, std::int64_t longest, std::int64_t pad) {
    const auto width = static_cast<std::size_t>(longest);
    Padded result{longest, Ids(prompts.size() * width, pad), Ids(prompts.size() * width, 0)};
    for (std::size_t row = 0; row < prompts.size(); ++row) {
        const Ids &prompt = prompts[row];
        const auto end = static_cast<std::ptrdiff_t>((row + 1) * width);
        const auto size = static_cast<std::ptrdiff_t>(prompt.size());
        std::copy(prompt.begin(), prompt.end(), result.ids.begin() + end - size);
        std::fill(result.mask.begin() + end - size, result.mask.begin() + end, 1);
    }
    return result;
}

// Columns of [B, T].
Ids columns(const Ids &all, std::size_t rows, std::int64_t begin, std::int64_t end) {
    return within_memory("there is no memory for this call; feed fewer tokens at once.", [&] {
        const std::size_t width = all.size() / rows;
        Ids result;
        for (std::size_t row = 0; row < rows; ++row) {
            const auto first = all.begin() + static_cast<std::ptrdiff_t>(row * width);
            result.insert(result.end(), first + begin, first + end);
        }
        return result;
    });
}

}  // namespace

std::vector<Ids> Session::generate(const std::vector<Ids> &prompts, const GenerateOptions &options,
                                   const OnTokens &on_tokens) {
    // The callback may end this object, which must not end what runs here.
    impl();
    const std::shared_ptr<Impl> held = impl_;
    const Call call(held->busy);
    const Manifest &info = held->manifest;
    if (info.task != "generate") {
        throw Error("this ingot was exported for the task '" + info.task +
                    "' and cannot generate; export it with --task generate.");
    }
    if (options.max_new_tokens < 1) {
        throw Error("max_new_tokens is " + std::to_string(options.max_new_tokens) +
                    "; it must be at least 1.");
    }
    if (options.prefill_chunk < 0) {
        throw Error("prefill_chunk is " + std::to_string(options.prefill_chunk) +
                    "; it must be 0 (no pieces) or more.");
    }
    check(options.sampling);
    const std::int64_t longest = longest_of(prompts);
    // A state of fixed size has no longest context.
    const std::int64_t most =
        info.generation.context_length.value_or(std::numeric_limits<std::int64_t>::max());
    if (options.max_new_tokens > most - longest) {
        throw Error("a prompt of " + std::to_string(longest) + " tokens and " +
                    std::to_string(options.max_new_tokens) + " new ones exceed this model's context of " +
                    std::to_string(most) + "; shorten the prompt or ask for fewer new tokens.");
    }
    const Ids &stops = options.stop_ids ? *options.stop_ids : info.generation.eos_token_ids;
    Padded fed = within_memory(
        "there is no memory for these prompts padded to one length; give fewer at once.",
        [&] { return pad_left(prompts, longest, info.generation.pad_token_id); });
    const auto batch = static_cast<std::int64_t>(prompts.size());
    held->reset(batch, longest + options.max_new_tokens);

    Sampler sampler(options.sampling);
    std::vector<Ids> made(prompts.size());
    std::vector<bool> running(prompts.size(), true);
    std::vector<std::optional<std::int64_t>> step_tokens(prompts.size());
    std::int64_t tokens = longest;
    const std::int64_t piece = piece_of(info, batch, longest, options.prefill_chunk);
    for (std::int64_t begin = 0; begin + piece < longest; begin += piece, tokens -= piece) {
        // Their logits are of no use; those of one token are the fewest there can be.
        held->step(columns(fed.ids, prompts.size(), begin, begin + piece),
                   columns(fed.mask, prompts.size(), begin, begin + piece), batch, piece, 1);
    }
    fed.ids = columns(fed.ids, prompts.size(), longest - tokens, longest);
    fed.mask = columns(fed.mask, prompts.size(), longest - tokens, longest);
    for (std::int64_t n = 0; n < options.max_new_tokens; ++n) {
        const View logits = held->step(fed.ids, fed.mask, batch, tokens, 1);
        const auto width = static_cast<std::size_t>(logits.shape.back());
        fed.ids.resize(prompts.size());
        for (std::size_t row = 0; row < prompts.size(); ++row) {
            // A row that has ended is fed on with the others, and draws on, so that the rest do not
            // depend on when it ended.
            const std::int64_t token = sampler.choose(logits.data + row * width, width);
            fed.ids[row] = token;
            step_tokens[row].reset();
            if (!running[row]) continue;
            step_tokens[row] = token;
            made[row].push_back(token);
            running[row] = std::find(stops.begin(), stops.end(), token) == stops.end();
        }
        if (on_tokens && !on_tokens(step_tokens)) break;
        if (std::find(running.begin(), running.end(), true) == running.end()) break;
        fed.mask.assign(prompts.size(), 1);
        tokens = 1;
    }
    return made;
}

}  // namespace ingot
