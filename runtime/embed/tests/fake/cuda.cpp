// Stands in for libcuda.so.1: one device of compute capability 9.0 whose memory is the host's.
#include <cuda.h>

#include <cstdlib>
#include <cstring>

namespace {

CUcontext context() { return reinterpret_cast<CUcontext>(1); }

void *host(CUdeviceptr address) { return reinterpret_cast<void *>(address); }

}  // namespace

extern "C" {

CUresult cuInit(unsigned) { return CUDA_SUCCESS; }

CUresult cuCtxGetCurrent(CUcontext *current) {
    *current = nullptr;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR ? 9 : 0;
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *made, CUdevice) {
    *made = context();
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice) { return CUDA_SUCCESS; }

CUresult cuCtxPushCurrent(CUcontext) { return CUDA_SUCCESS; }

CUresult cuCtxPopCurrent(CUcontext *popped) {
    *popped = context();
    return CUDA_SUCCESS;
}

CUresult cuStreamCreate(CUstream *stream, unsigned) {
    *stream = reinterpret_cast<CUstream>(std::malloc(1));
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
    std::free(stream);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream) { return CUDA_SUCCESS; }

CUresult cuMemAlloc(CUdeviceptr *made, std::size_t bytes) {
    void *memory = std::malloc(bytes);
    // What new memory holds must not matter.
    if (memory != nullptr) std::memset(memory, 0x7F, bytes);
    *made = reinterpret_cast<CUdeviceptr>(memory);
    return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr address) {
    std::free(host(address));
    return CUDA_SUCCESS;
}

CUresult cuMemsetD8Async(CUdeviceptr address, unsigned char value, std::size_t bytes, CUstream) {
    std::memset(host(address), value, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, std::size_t bytes, CUstream) {
    std::memcpy(host(to), from, bytes);
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, std::size_t bytes, CUstream) {
    std::memcpy(to, host(from), bytes);
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult, const char **text) {
    *text = "a fake error";
    return CUDA_SUCCESS;
}

}  // extern "C"
