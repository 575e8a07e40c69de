#include "tokens.hpp"

#include <algorithm>

#include "memory.hpp"

namespace ingot {
namespace {

// Attention kernels count tokens, and runtimes sizes, in 32 bits.
constexpr std::int64_t kMostSize = 2147483647;

std::string shape_of(std::int64_t batch, std::int64_t tokens) {
    return "[" + std::to_string(batch) + ", " + std::to_string(tokens) + "]";
}

}  // namespace

TokenInputs::TokenInputs(std::int64_t vocab_size, const std::vector<StateInfo> &states)
    : vocab_size_(vocab_size), stateful_(!states.empty()) {
    for (const StateInfo &state : states) {
        cached_ = cached_ || state.axis;
        recurrent_ = recurrent_ || !state.axis;
    }
    reset(1, 0);
}

void TokenInputs::reset(std::int64_t batch, std::int64_t capacity) {
    if (batch < 1 || capacity < 0 || batch > kMostSize || capacity > kMostSize) {
        throw Error("a session of " + std::to_string(batch) + " sequences of " +
                    std::to_string(capacity) +
                    " tokens was asked for; give a batch of at least 1 and a capacity of at least "
                    "0, below 2^31 "
                    "each.");
    }
    // What the smallest call needs: for each row an id, a mask, a position and a count.
    need_memory(static_cast<std::uint64_t>(batch) * 4 * sizeof(std::int64_t));
    batch_ = batch;
    capacity_ = capacity;
    seen_ = 0;
    mask_.clear();
    counts_.assign(static_cast<std::size_t>(batch), 0);
}

void TokenInputs::check(Tokens ids, Tokens mask, std::int64_t batch, std::int64_t tokens) const {
    if (batch != batch_) {
        throw Error("the ids and mask are " + shape_of(batch, tokens) + "; both must be [" +
                    std::to_string(batch_) + ", tokens], or reset for another batch.");
    }
    if (tokens < 1) throw Error("the call holds no tokens; give at least one.");
    if (tokens > capacity_ - seen_) {
        throw Error(std::to_string(tokens) + " tokens after " + std::to_string(seen_) +
                    " do not fit the session's capacity of " + std::to_string(capacity_) +
                    "; reset with a larger one.");
    }
    const std::size_t size = static_cast<std::size_t>(batch) * static_cast<std::size_t>(tokens);
    if (ids.size / static_cast<std::size_t>(batch) != static_cast<std::size_t>(tokens) ||
        ids.size != size || mask.size != size) {
        throw Error(std::to_string(ids.size) + " ids and " + std::to_string(mask.size) +
                    " mask values were given for " + shape_of(batch, tokens) + "; give " +
                    "batch * tokens of each.");
    }
    if (ids.data == nullptr || mask.data == nullptr) {
        throw Error("the ids or the mask are a null pointer; give both.");
    }
    for (std::size_t n = 0; n < size; ++n) {
        if (mask.data[n] != 0 && mask.data[n] != 1) {
            throw Error("the mask holds " + std::to_string(mask.data[n]) +
                        "; it must hold only 1 (token) and 0 (padding).");
        }
        if (ids.data[n] < 0 || ids.data[n] >= vocab_size_) {
            throw Error("token id " + std::to_string(ids.data[n]) + " is outside the vocabulary of " +
                        std::to_string(vocab_size_) + "; use this model's tokenizer.");
        }
    }
    if (recurrent_) check_padding(mask.data, tokens);
}

// A convolution's window would hold padding that stands between tokens, or behind them. Caches have
// no such rule: attention looks at no masked position, wherever it stands.
void TokenInputs::check_padding(const std::int64_t *mask, std::int64_t tokens) const {
    for (std::size_t row = 0; row < counts_.size(); ++row) {
        bool begun = counts_[row] > 0;
        for (std::int64_t t = 0; t < tokens; ++t, ++mask) {
            if (begun && *mask == 0) {
                throw Error(
                    "the mask has padding behind the first token of row " + std::to_string(row) +
                    "; this model's state is recurrent and takes padding before a row's first "
                    "token only: pad on the left, and rows that go on by different lengths one by "
                    "one, each in a session of its own.");
            }
            begun = begun || *mask == 1;
        }
    }
}

Feeds TokenInputs::append(const std::int64_t *ids, const std::int64_t *mask, std::int64_t tokens,
                          std::int64_t kept) {
    const auto rows = static_cast<std::size_t>(batch_);
    const auto fresh = static_cast<std::size_t>(tokens);
    const auto before = static_cast<std::size_t>(seen_);
    if (!stateful_) std::fill(counts_.begin(), counts_.end(), 0);

    positions_.resize(rows * fresh);
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t t = 0; t < fresh; ++t) {
            counts_[row] += mask[row * fresh + t];
            // Padding before the first token stands at 0, too.
            positions_[row * fresh + t] = std::max<std::int64_t>(counts_[row] - 1, 0);
        }
    }

    Feeds feeds{ids, mask, positions_.data(), batch_, tokens, tokens, seen_, kept};
    if (cached_) {
        const std::size_t columns = before + fresh;
        mask_.resize(rows * columns);
        // The rows move apart in place, the last one first, so that none is overwritten before.
        for (std::size_t row = rows; row-- > 0;) {
            const auto past = mask_.begin() + static_cast<std::ptrdiff_t>(row * before);
            const auto moved = mask_.begin() + static_cast<std::ptrdiff_t>(row * columns);
            if (row > 0) std::copy_backward(past, past + seen_, moved + seen_);
            std::copy(mask + row * fresh, mask + (row + 1) * fresh, moved + seen_);
        }
        feeds.mask = mask_.data();
        feeds.columns = static_cast<std::int64_t>(columns);
    }
    if (stateful_) seen_ += tokens;
    return feeds;
}

}  // namespace ingot
