#include "nvinfer.hpp"

#include <dlfcn.h>

#include <algorithm>

namespace ingot {

#ifdef TRT_MAJOR_RTX
const char *const kBuilder = "tensorrt-rtx";
#else
const char *const kBuilder = "tensorrt";
#endif

namespace {

const std::string kLibrary =
#ifdef TRT_MAJOR_RTX
    "libtensorrt_rtx.so." +
#else
    "libnvinfer.so." +
#endif
    std::to_string(NV_TENSORRT_MAJOR);

// The plugin library of `make plugins`; the Python plugins that stand in for it need Python.
constexpr const char *kPlugins = "libingot_trt.so";

NvInfer open() {
    void *library = dlopen(kLibrary.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw Error("this ingot holds an engine and " + kLibrary +
                    " cannot be opened; install TensorRT, or name its folder in LD_LIBRARY_PATH.");
    }
    const auto find = [&](const char *name) {
        void *found = dlsym(library, name);
        if (found == nullptr) {
            throw Error(kLibrary + " has no " + name + "; install TensorRT " +
                        std::to_string(NV_TENSORRT_MAJOR) + ".");
        }
        return found;
    };
    NvInfer result;
    for (const char *part : {"Major", "Minor", "Patch", "Build"}) {
        const std::string name = std::string("getInferLib") + part + "Version";
        const auto number = reinterpret_cast<std::int32_t (*)()>(find(name.c_str()));
        result.version += (result.version.empty() ? "" : ".") + std::to_string(number());
    }
    result.create_runtime =
        reinterpret_cast<decltype(result.create_runtime)>(find("createInferRuntime_INTERNAL"));
    result.registry = reinterpret_cast<decltype(result.registry)>(find("getPluginRegistry"));
    return result;
}

std::string capability_of(std::int64_t value) {
    return std::to_string(value / 10) + "." + std::to_string(value % 10);
}

}  // namespace

const NvInfer &nvinfer(const EngineInfo &engine) {
    if (engine.builder != kBuilder) {
        throw Error("this ingot's engine is of " + engine.builder + " and this library was built with " +
                    kBuilder + "'s headers; build it with TENSORRT_ROOT at " + engine.builder + ".");
    }
    static const NvInfer opened = open();
    return opened;
}

void check_engine(const std::filesystem::path &folder, const Manifest &manifest,
                  const std::string &version, std::int64_t capability, bool hashed) {
    const EngineInfo &engine = *manifest.engine;
    const std::string name = folder.string();
    if (version != engine.version) {
        throw Error(name + " was built by " + engine.builder + " " + engine.version + " and " + version +
                    " is installed; an engine runs on the version that built it: install that one, or "
                    "export again.");
    }
    const auto &built_for = engine.compute_capabilities;
    if (std::find(built_for.begin(), built_for.end(), capability) == built_for.end()) {
        std::string all;
        for (const std::int64_t one : built_for) all += (all.empty() ? "" : ", ") + capability_of(one);
        throw Error(name + " was built for compute capability " + all + " and this GPU has " +
                    capability_of(capability) + "; export again on this machine.");
    }
    const auto &libraries = engine.libraries;
    const bool has = std::find(libraries.begin(), libraries.end(), kPlugins) != libraries.end();
    if (!engine.plugins.empty() && !engine.embedded && !has) {
        throw Error(name + " was built without " + kPlugins +
                    ", which its engine needs outside of Python; run make plugins with TENSORRT_ROOT "
                    "set, and export again.");
    }
    if (engine.graph_sha256 != manifest.files.at(kGraph).sha256) {
        throw Error(name + " holds an engine of another " + kGraph + "; export again.");
    }
    if (engine.profiles.empty() || engine.profiles[0].shapes.count("input_ids") == 0 ||
        engine.profiles[0].shapes.at("input_ids").most.size() != 2) {
        throw Error(name + " holds an engine whose sizes " + kManifest + " does not say; export again.");
    }
    std::vector<std::string> read{kEngine};
    read.insert(read.end(), libraries.begin(), libraries.end());
    for (const std::string &file : read) {
        const auto expected = manifest.files.find(file);
        const bool listed = expected != manifest.files.end();
        if (listed && (hashed || sha256(folder / file) == expected->second.sha256)) continue;
        throw Error((folder / file).string() +
                    " is not the file that was exported (its SHA-256 differs); an engine is code, so it "
                    "is not loaded: export again.");
    }
}

}  // namespace ingot
