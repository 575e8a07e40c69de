// An ingot, opened and run: one call from tokens to logits, with the state kept inside.
//
// Shape letters: B batch, T new tokens, V vocabulary, H hidden size. All arrays are row-major.
// Every function throws ingot::Error with one sentence. One session is for one thread at a time,
// and refuses a call while it is at work in another; several sessions may run in several threads,
// and those of one `fork` share their weights.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "api.h"
#include "error.hpp"
#include "manifest.hpp"

namespace ingot {

// How to open an ingot.
struct Options {
    int threads = 0;            // of the backend; 0 lets it choose
    bool verify = true;         // compare the SHA-256 of every file, not only sizes
    bool allow_failed = false;  // open an ingot whose validation failed
    bool graph_only = false;    // run the graph on ONNX Runtime, also where there is an engine
    // Of an ingot that runs on Ingot's own kernels, the library that has them: a program that you
    // vouch for, which is loaded only where it is the one that the ingot was made with. The one that
    // lies in the folder is never loaded unless it is named here.
    std::filesystem::path operators;
};

// Token ids or mask values of the caller, [B, T]; not copied.
struct Tokens {
    const std::int64_t *data = nullptr;
    std::size_t size = 0;

    Tokens(const std::int64_t *values, std::size_t count) : data(values), size(count) {}
    Tokens(const std::vector<std::int64_t> &values) : data(values.data()), size(values.size()) {}
};

// Numbers of the session's own memory, valid until its next call.
struct View {
    const float *data = nullptr;
    std::vector<std::int64_t> shape;
};

// A copy of one state, cut to the tokens seen so far.
struct StateCopy {
    std::string name;  // of the output, such as "present.0.key"
    std::vector<std::int64_t> shape;
    std::vector<float> values;
};

// How the next token is chosen. The same seed gives the same tokens on every machine; the Python
// session draws from another generator, so its sampled tokens differ.
struct Sampling {
    double temperature = 0.0;  // divides the logits; 0 takes the likeliest token (greedy)
    std::int64_t top_k = 0;    // keep the k likeliest tokens; 0 keeps all
    double top_p = 1.0;        // keep the likeliest tokens whose probabilities reach this sum
    std::uint64_t seed = 0;
};

constexpr std::int64_t kPrefillChunk = 512;

struct GenerateOptions {
    std::int64_t max_new_tokens = 64;  // at most so many for each prompt
    Sampling sampling;
    // Ids that end a sequence, each part of the result; the ingot's own where absent.
    std::optional<std::vector<std::int64_t>> stop_ids;
    // Tokens of a prompt that are fed at once, so that a long one takes the memory of so many; 0 for
    // all. A prompt stays whole where pieces would give something else, or be slow: see the README.
    std::int64_t prefill_chunk = kPrefillChunk;
};

// Told each step's token of every prompt, none where that prompt has ended; false stops. The
// session refuses calls from it; a fork may be made.
using OnTokens = std::function<bool(const std::vector<std::optional<std::int64_t>> &)>;

using Ids = std::vector<std::int64_t>;

class INGOT_API Session {
  public:
    // Opens a folder: its schema version, file sizes and hashes, verdict, target and precision are
    // checked before anything in it is run.
    explicit Session(const std::filesystem::path &folder, const Options &options = {});
    Session(Session &&) noexcept;
    Session &operator=(Session &&) noexcept;
    ~Session();

    const Manifest &manifest() const;

    // Another session over the same weights, with no state and as if just opened. It may be used in
    // another thread, and made while this one is used.
    Session fork() const;

    // Forgets all state and makes room for `batch` sequences of `capacity` tokens, padding
    // included. Throws Error: sizes that are none, or no memory; then the state is lost until it is
    // reset again.
    void reset(std::int64_t batch, std::int64_t capacity);

    // Feeds T new tokens of every sequence; an ingot without state takes each call for itself.
    //
    // ids, mask: [B, T]; the mask is 1 for tokens and 0 for padding. Where all states grow, padding
    // may stand anywhere; where one is recurrent, before the first token of its row only.
    // logits_to_keep: of how many of the last columns the logits are wanted; 0 for all. A graph with
    // an input of that name computes no others; of another, such as an engine, they are cut.
    //
    // Returns the main output as float32: logits [B, T, V], or [B, min(K, T), V] of the last K;
    // last_hidden_state [B, T, H], or of a classifier logits [B, labels]. Throws Error: another
    // batch, ids outside the vocabulary, padding that the state does not take, no room left, a
    // logits_to_keep below 0 or of an ingot that does not generate. After an error of the backend
    // itself the state is lost, and the next call must be reset.
    View step(Tokens ids, Tokens mask, std::int64_t batch, std::int64_t tokens,
              std::int64_t logits_to_keep = 0);

    // A copy of every state.
    std::vector<StateCopy> state() const;

    // Generates for all prompts together; shorter ones are padded on the left. The state is reset.
    //
    // Returns the new tokens of each prompt.
    // Throws Error: an ingot without logits, an empty prompt, or one that does not fit.
    std::vector<Ids> generate(const std::vector<Ids> &prompts, const GenerateOptions &options = {},
                              const OnTokens &on_tokens = {});

  private:
    struct Impl;
    explicit Session(std::shared_ptr<Impl> impl);
    Impl &impl() const;

    // Shared with a `generate` at work, whose callback may end the session.
    std::shared_ptr<Impl> impl_;
};

}  // namespace ingot
