// What the files of kernels have in common: lent threads, memory to work in, and how a call fails.
#pragma once

#include <cstdlib>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "panels.h"

// Loops over what lies in registers have no index left when they are compiled.
#define INGOT_UNROLL _Pragma("GCC unroll 16")

namespace ingot::cpu {

// Why a call is refused.
struct Refused : std::runtime_error {
    using std::runtime_error::runtime_error;
};

struct Free {
    void operator()(void *memory) const { std::free(memory); }
};

// Memory on a boundary of cache lines, not initialised.
template <typename T>
class Buffer {
   public:
    explicit Buffer(size_t count)
        : memory_(std::aligned_alloc(64, round_up(count * sizeof(T) + 1, 64))) {
        if (!memory_) throw std::bad_alloc();
    }
    T *get() const { return static_cast<T *>(memory_.get()); }
    T &operator[](size_t index) const { return get()[index]; }

   private:
    std::unique_ptr<void, Free> memory_;
};

// Runs body(i) for every i below count on the caller's threads. What a body throws stays off the
// frames of threads that are not ours, and is thrown here in the end.
template <typename Body>
void run(const ingot_cpu_threads &threads, size_t count, const Body &body) {
    struct Pieces {
        const Body &body;
        std::mutex guard;
        std::exception_ptr thrown;
    } pieces{body, {}, nullptr};
    if (count == 1) return body(size_t(0));
    if (!count) return;
    threads.run(
        threads.self, count,
        [](void *data, size_t index) {
            auto &all = *static_cast<Pieces *>(data);
            try {
                all.body(index);
            } catch (...) {
                const std::lock_guard<std::mutex> lock(all.guard);
                all.thrown = std::current_exception();
            }
        },
        &pieces);
    if (pieces.thrown) std::rethrow_exception(pieces.thrown);
}

}  // namespace ingot::cpu
