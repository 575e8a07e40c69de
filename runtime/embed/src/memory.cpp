#include "memory.hpp"

#include <unistd.h>

namespace ingot {

void need_memory(std::uint64_t bytes) {
    static const std::uint64_t whole = static_cast<std::uint64_t>(sysconf(_SC_PHYS_PAGES)) *
                                       static_cast<std::uint64_t>(sysconf(_SC_PAGE_SIZE));
    if (bytes > whole) throw std::bad_alloc();
}

}  // namespace ingot
