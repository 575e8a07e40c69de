#include "cuda.hpp"

#include <cuda.h>
#include <dlfcn.h>

#include <algorithm>
#include <ingot/error.hpp>

namespace ingot {

// cuda.h names the current version of each function by a macro; these are what it stands for.
struct CudaDriver {
    decltype(&cuInit) init;
    decltype(&cuCtxGetCurrent) get_current;
    decltype(&cuCtxGetDevice) get_device;
    decltype(&cuDeviceGetAttribute) attribute;
    decltype(&cuDevicePrimaryCtxRetain) retain;
    decltype(&cuDevicePrimaryCtxRelease) release;
    decltype(&cuCtxPushCurrent) push;
    decltype(&cuCtxPopCurrent) pop;
    decltype(&cuStreamCreate) create_stream;
    decltype(&cuStreamDestroy) destroy_stream;
    decltype(&cuStreamSynchronize) synchronize;
    decltype(&cuMemAlloc) allocate;
    decltype(&cuMemFree) free;
    decltype(&cuMemsetD8Async) set;
    decltype(&cuMemcpyHtoDAsync) upload;
    decltype(&cuMemcpyDtoHAsync) download;
    decltype(&cuGetErrorString) error_string;

    CudaDriver() {
        void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            throw Error(
                "this ingot holds an engine and this machine has no NVIDIA driver (libcuda.so.1); run "
                "an ort ingot here, or open the graph alone (graph_only).");
        }
        find(library, init, "cuInit");
        find(library, get_current, "cuCtxGetCurrent");
        find(library, get_device, "cuCtxGetDevice");
        find(library, attribute, "cuDeviceGetAttribute");
        find(library, retain, "cuDevicePrimaryCtxRetain");
        find(library, release, "cuDevicePrimaryCtxRelease_v2");
        find(library, push, "cuCtxPushCurrent_v2");
        find(library, pop, "cuCtxPopCurrent_v2");
        find(library, create_stream, "cuStreamCreate");
        find(library, destroy_stream, "cuStreamDestroy_v2");
        find(library, synchronize, "cuStreamSynchronize");
        find(library, allocate, "cuMemAlloc_v2");
        find(library, free, "cuMemFree_v2");
        find(library, set, "cuMemsetD8Async");
        find(library, upload, "cuMemcpyHtoDAsync_v2");
        find(library, download, "cuMemcpyDtoHAsync_v2");
        find(library, error_string, "cuGetErrorString");
        if (init(0) != CUDA_SUCCESS) {
            throw Error(
                "this ingot holds an engine and CUDA's driver finds no NVIDIA GPU; run an ort ingot "
                "here, or open the graph alone (graph_only).");
        }
    }

    template <typename Function>
    void find(void *library, Function &function, const char *name) {
        function = reinterpret_cast<Function>(dlsym(library, name));
        if (function == nullptr) {
            throw Error(std::string("libcuda.so.1 has no ") + name + "; update NVIDIA's driver.");
        }
    }

    void check(CUresult status, const char *what) const {
        if (status == CUDA_SUCCESS) return;
        const char *text = nullptr;
        error_string(status, &text);
        throw Error(std::string("CUDA could not ") + what + ": " + (text != nullptr ? text : "?") +
                    "; give it less, or see nvidia-smi.");
    }
};

namespace {

// A failed attempt is made again by the next session, since a GPU may have come.
const CudaDriver &driver() {
    static const CudaDriver opened;
    return opened;
}

CUdeviceptr pointer(const void *address) { return reinterpret_cast<CUdeviceptr>(address); }

CUstream stream_of(void *stream) { return static_cast<CUstream>(stream); }

int current_device() {
    CUcontext current = nullptr;
    CUdevice device = 0;
    if (driver().get_current(&current) == CUDA_SUCCESS && current != nullptr) {
        driver().check(driver().get_device(&device), "name the current device");
    }
    return device;
}

}  // namespace

Cuda::Cuda() : Cuda(current_device()) {}

Cuda::Cuda(int device) : driver_(driver()), device_(device) {
    int major = 0, minor = 0;
    driver_.check(
        driver_.attribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device_),
        "name the compute capability");
    driver_.check(
        driver_.attribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device_),
        "name the compute capability");
    capability_ = major * 10 + minor;
    CUcontext context = nullptr;
    driver_.check(driver_.retain(&context, device_), "open the device");
    context_ = context;
    try {
        const Current current_here(*this);
        CUstream stream = nullptr;
        driver_.check(driver_.create_stream(&stream, CU_STREAM_NON_BLOCKING), "make a stream");
        stream_ = stream;
    } catch (...) {
        driver_.release(device_);
        throw;
    }
}

Cuda::~Cuda() {
    {
        const Current current(*this);
        for (const auto &[name, buffer] : buffers_) driver_.free(pointer(buffer.address));
        driver_.destroy_stream(stream_of(stream_));
    }
    driver_.release(device_);
}

void *Cuda::room(const std::string &name, std::size_t bytes) {
    Buffer &buffer = buffers_[name];
    if (buffer.address != nullptr && buffer.bytes >= bytes) return buffer.address;
    if (buffer.address != nullptr) {
        driver_.check(driver_.synchronize(stream_of(stream_)), "finish its work");
        driver_.check(driver_.free(pointer(buffer.address)), "free memory");
        buffer = {};
    }
    CUdeviceptr made = 0;
    driver_.check(driver_.allocate(&made, std::max<std::size_t>(bytes, 1)), "allocate memory");
    buffer = {reinterpret_cast<void *>(made), bytes};
    return buffer.address;
}

void Cuda::zero(void *address, std::size_t bytes) {
    // CUDA refuses to set no bytes at all.
    if (bytes == 0) return;
    driver_.check(driver_.set(pointer(address), 0, bytes, stream_of(stream_)), "clear memory");
}

void Cuda::upload(void *address, const void *data, std::size_t bytes) {
    driver_.check(driver_.upload(pointer(address), data, bytes, stream_of(stream_)), "upload");
}

void Cuda::download(void *data, const void *address, std::size_t bytes) const {
    if (bytes > 0) {
        driver_.check(driver_.download(data, pointer(address), bytes, stream_of(stream_)), "download");
    }
    driver_.check(driver_.synchronize(stream_of(stream_)), "finish its work");
}

Cuda::Current::Current(const Cuda &cuda) : cuda_(cuda) {
    cuda_.driver_.check(cuda_.driver_.push(static_cast<CUcontext>(cuda_.context_)), "use the device");
}

Cuda::Current::~Current() {
    CUcontext popped = nullptr;
    cuda_.driver_.pop(&popped);
}

}  // namespace ingot
