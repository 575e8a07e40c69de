// TensorRT's library, opened at run time, and the checks that come before an engine is read.
#pragma once

#include <NvInferRuntime.h>

#include <ingot/session.hpp>

namespace ingot {

// The builder whose headers this library was compiled with: "tensorrt" or "tensorrt-rtx". TensorRT's
// classes differ between its major versions and its two builders, so only that one is used.
extern const char *const kBuilder;

struct NvInfer {
    std::string version;  // such as 10.13.2.6
    void *(*create_runtime)(void *logger, std::int32_t version) = nullptr;
    nvinfer1::IPluginRegistry *(*registry)() = nullptr;
};

// Opens the builder's library. Throws Error where it is missing.
const NvInfer &nvinfer(const EngineInfo &engine);

// Proves that an engine may be loaded here, before it is read: builder, version, compute capability,
// plugins and hashes. `hashed` says that the files were found to be the manifest's just before.
void check_engine(const std::filesystem::path &folder, const Manifest &manifest,
                  const std::string &version, std::int64_t capability, bool hashed);

}  // namespace ingot
