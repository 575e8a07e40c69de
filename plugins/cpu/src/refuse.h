// How a call of the C interface ends.
#pragma once

#include <string>

#include "work.h"

namespace ingot::cpu {

// Why the last call of this thread was refused.
std::string &last_error();

// Runs a call, and says what it threw.
template <typename Call>
int answered(const Call &call) {
    try {
        last_error().clear();
        call();
        return 0;
    } catch (const std::bad_alloc &) {
        last_error() = "out of memory";
    } catch (const std::exception &error) {
        last_error() = error.what();
    }
    return 1;
}

inline void require(bool holds, const char *why) {
    if (!holds) throw Refused(why);
}

// Raises Refused of a format that there is not.
void check(const ingot_cpu_format &format);

// Raises Refused of an activation that there is not.
void check_activation(int32_t activation);

// Raises Refused of a size that is below `least` or no int32.
void check_size(const char *name, int64_t size, int64_t least = 1);

}  // namespace ingot::cpu
