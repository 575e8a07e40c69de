// The CUDA driver, opened at run time, and the compiled kernels launched through it.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "ingot_kernels.h"

namespace ingot {

// One kernel argument: a device pointer, an int32 or a float32, as the form's signature has it.
struct Argument {
    enum class Kind : char { kPointer = 'p', kInt = 'i', kFloat = 'f' } kind;
    union {
        uint64_t pointer;
        int32_t integer;
        float real;
    };

    Argument(const void *value) : kind(Kind::kPointer), pointer(reinterpret_cast<uint64_t>(value)) {}
    Argument(int32_t value) : kind(Kind::kInt), integer(value) {}
    Argument(float value) : kind(Kind::kFloat), real(value) {}
};

struct Grid {
    int64_t x = 1, y = 1, z = 1;
};

// Enqueues the form of this name, for the device of the current context. A grid with a zero side is
// no launch.
//
// A form is a Triton function with fixed constants; plugins/kernels/*.py declares them and the build
// compiles each for every compute capability.
ingot_status launch(const std::string &form, Grid grid, std::initializer_list<Argument> arguments,
                    void *stream);

// Major times ten plus minor of the current device, such as 90.
ingot_status compute_capability(int *capability);

// Records what ingot_last_error() answers and returns the status.
ingot_status fail(ingot_status status, const std::string &message);

// Refuses a workspace of fewer bytes than a call needs; `op` is its name without "ingot_".
ingot_status check_workspace(const std::string &op, size_t needed, size_t given);

// Name of a dtype in form names: fp32, fp16, bf16.
const char *dtype_name(ingot_dtype dtype);

// Bytes of one element.
size_t dtype_size(ingot_dtype dtype);

// Hands out pieces of a workspace, each aligned to 256 bytes. With a null base it only adds up.
class Workspace {
  public:
    explicit Workspace(void *base) : base_(static_cast<char *>(base)) {}

    void *take(size_t bytes) {
        size_t begin = used_;
        used_ += (bytes + 255) / 256 * 256;
        return base_ == nullptr ? nullptr : base_ + begin;
    }

    size_t used() const { return used_; }

  private:
    char *base_;
    size_t used_ = 0;
};

}  // namespace ingot
