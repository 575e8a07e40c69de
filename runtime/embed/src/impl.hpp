// What a session holds, and the rule that one call of it runs at a time.
#pragma once

#include <ingot/session.hpp>

#include <atomic>
#include <memory>

#include "backend.hpp"
#include "memory.hpp"

namespace ingot {

struct Session::Impl {
    Manifest manifest;
    std::unique_ptr<Backend> backend;
    TokenInputs tokens;
    std::vector<float> joined;  // the output of a call that was fed token by token, or was cut
    bool lost = false;          // the backend failed half-way through its states
    std::atomic_flag busy = ATOMIC_FLAG_INIT;

    explicit Impl(Manifest read)
        : manifest(std::move(read)), tokens(manifest.vocab_size, manifest.states) {}

    // As the functions of Session, without a `Call`.
    void reset(std::int64_t batch, std::int64_t capacity);
    View step(Tokens ids, Tokens mask, std::int64_t batch, std::int64_t count,
              std::int64_t logits_to_keep);
    void usable() const;

  private:
    View run(const std::int64_t *ids, const std::int64_t *mask, std::int64_t count,
             std::int64_t kept);
    View run_one_by_one(const std::int64_t *ids, const std::int64_t *mask, std::int64_t count,
                        std::int64_t kept);
    View cut(const View &view, std::int64_t kept);
};

// While it lives, every other call of the same session is refused. Waiting would answer with the
// state that the other call leaves, and never end in a callback.
class Call {
  public:
    explicit Call(std::atomic_flag &busy) : busy_(busy) {
        if (busy_.test_and_set(std::memory_order_acquire)) {
            throw Error(
                "the session is busy with another call, of its own callback or of another thread; "
                "give each a session of its own: fork() it.");
        }
    }
    ~Call() { busy_.clear(std::memory_order_release); }
    Call(const Call &) = delete;
    Call &operator=(const Call &) = delete;

  private:
    std::atomic_flag &busy_;
};

}  // namespace ingot
