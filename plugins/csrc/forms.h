// The table of compiled kernels, which plugins/kernels/build.py generates.
#pragma once

#include <cstddef>

namespace ingot {

struct CompiledForm {
    const char *name;
    const char *symbol;     // in the cubin
    int capability;         // major times ten plus minor
    unsigned threads;       // of a block
    unsigned shared_bytes;  // dynamic shared memory
    const char *arguments;  // one letter each: p pointer, i int32, f float32
    const void *cubin;
};

extern const CompiledForm kForms[];
extern const size_t kFormCount;

// The capabilities in the table, for messages: "8.0, 9.0".
extern const char *const kCapabilities;

}  // namespace ingot
