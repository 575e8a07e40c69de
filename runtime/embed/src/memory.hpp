// Memory that is not there: found out before it is asked for, and said in one sentence.
#pragma once

#include <cstdint>
#include <ingot/error.hpp>
#include <new>
#include <stdexcept>

namespace ingot {

// Throws std::bad_alloc where so many bytes are more than this machine has. An allocator would
// promise them, and the system would end the process that writes to them.
void need_memory(std::uint64_t bytes);

// Runs what may ask for more memory than there is; then an Error says `refusal`.
template <typename Run>
auto within_memory(const char *refusal, Run run) -> decltype(run()) {
    try {
        return run();
    } catch (const std::bad_alloc &) {
        throw Error(refusal);
    } catch (const std::length_error &) {
        // A vector of more elements than there are addresses.
        throw Error(refusal);
    }
}

}  // namespace ingot
