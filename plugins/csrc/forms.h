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

// How the kernels of one compute capability were made.
struct CompiledFor {
    int capability;
    const char *ptxas;   // its version, "12.9.86"
    int minimum_driver;  // the first release of NVIDIA's driver that loads them: 525 is R525
    int minimum_cuda;    // what cuDriverGetVersion answers there: 12000 is CUDA 12.0
};

extern const CompiledFor kCompiledFor[];
extern const size_t kCompiledForCount;

// The capabilities in the table, for messages: "8.0, 9.0".
extern const char *const kCapabilities;

// What ingot_kernels_build() answers.
extern const char *const kBuildLine;

// Whether a cubin runs on a device, by compute capabilities; the rule of plugins/kernels/form.py.
// From 9.0 on Triton compiles for architecture-specific targets (sm_90a), which fit one capability.
inline bool runs_on(int compiled, int device) {
    if (compiled >= 90) return compiled == device;
    return compiled / 10 == device / 10 && compiled <= device;
}

}  // namespace ingot
