// The token side of a session: its checks, the running attention mask and the positions.
#pragma once

#include <ingot/session.hpp>

namespace ingot {

// A graph's token inputs of one call. The pointers are valid until the next call.
struct Feeds {
    const std::int64_t *ids = nullptr;        // [B, T]
    const std::int64_t *mask = nullptr;       // [B, columns]
    const std::int64_t *positions = nullptr;  // [B, T]
    std::int64_t batch = 0;
    std::int64_t tokens = 0;   // T
    std::int64_t columns = 0;  // P + T where a cache holds the past, else T
    std::int64_t past = 0;     // P
    std::int64_t kept = 0;     // of how many of the last tokens the logits are wanted
};

class TokenInputs {
  public:
    // Where one of the states grows, the attention mask covers its past as well; a graph without
    // any state takes each call for itself. A state that does not grow is recurrent.
    TokenInputs(std::int64_t vocab_size, const std::vector<StateInfo> &states);

    // Forgets the tokens seen.
    void reset(std::int64_t batch, std::int64_t capacity);

    // Refuses tokens that the graph would misread: shape, batch, capacity, vocabulary, or padding
    // that a recurrent state would take for tokens.
    void check(Tokens ids, Tokens mask, std::int64_t batch, std::int64_t tokens) const;

    // The graph's inputs for T more tokens, of the last of which so many have logits; `check` them
    // first.
    Feeds append(const std::int64_t *ids, const std::int64_t *mask, std::int64_t tokens,
                 std::int64_t kept);

    std::int64_t batch() const { return batch_; }
    std::int64_t capacity() const { return capacity_; }

    // P, the tokens of every row so far, padding included; 0 without state.
    std::int64_t seen() const { return seen_; }

  private:
    void check_padding(const std::int64_t *mask, std::int64_t tokens) const;

    std::int64_t vocab_size_;
    bool stateful_;
    bool cached_ = false;
    bool recurrent_ = false;
    std::int64_t batch_ = 1;
    std::int64_t capacity_ = 0;
    std::int64_t seen_ = 0;
    std::vector<std::int64_t> mask_;       // [B, P] of a cache
    std::vector<std::int64_t> counts_;     // [B], tokens that are no padding
    std::vector<std::int64_t> positions_;  // [B, T]
};

}  // namespace ingot
