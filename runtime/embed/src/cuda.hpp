// The few calls of CUDA's driver that a session needs. The driver is opened at run time, so that a
// library built with TensorRT's headers also runs where there is no GPU.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>

namespace ingot {

struct CudaDriver;

// Memory and one stream on a device: by default the caller's current one, or the first where none is.
//
// Throws Error: no driver, no device, or a call that CUDA refuses.
class Cuda {
  public:
    Cuda();
    explicit Cuda(int device);
    ~Cuda();
    Cuda(const Cuda &) = delete;
    Cuda &operator=(const Cuda &) = delete;

    // The device's ordinal.
    int device() const { return device_; }

    // Major times ten plus minor, such as 90.
    std::int64_t capability() const { return capability_; }

    // A cudaStream_t.
    void *stream() const { return stream_; }

    // The address of a buffer of this name and at least so many bytes; what it held is lost where it
    // has to grow.
    void *room(const std::string &name, std::size_t bytes);

    // The address of a buffer that exists.
    void *at(const std::string &name) const { return buffers_.at(name).address; }

    void zero(void *address, std::size_t bytes);
    void upload(void *address, const void *data, std::size_t bytes);

    // Waits for all that was enqueued before.
    void download(void *data, const void *address, std::size_t bytes) const;

    // Makes this device's context current while it lives, as CUDA and TensorRT ask of each thread.
    class Current {
      public:
        explicit Current(const Cuda &cuda);
        ~Current();
        Current(const Current &) = delete;
        Current &operator=(const Current &) = delete;

      private:
        const Cuda &cuda_;
    };

  private:
    struct Buffer {
        void *address = nullptr;
        std::size_t bytes = 0;
    };

    const CudaDriver &driver_;
    int device_ = 0;
    void *context_ = nullptr;
    void *stream_ = nullptr;
    std::int64_t capability_ = 0;
    std::map<std::string, Buffer> buffers_;
};

}  // namespace ingot
