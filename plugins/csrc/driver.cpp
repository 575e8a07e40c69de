#include "driver.h"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <tuple>
#include <unordered_map>
#include <utility>

#include "forms.h"

namespace ingot {
namespace {

// The few declarations of cuda.h that are needed; its values are a stable binary interface.
using CUresult = int;
using CUdevice = int;
using CUcontext = void *;
using CUmodule = void *;
using CUfunction = void *;
using CUstream = void *;
constexpr CUresult kSuccess = 0;
constexpr CUresult kInvalidImage = 200;
constexpr CUresult kNoBinaryForGpu = 209;
constexpr CUresult kUnsupportedPtxVersion = 222;
constexpr int kAttributeMajor = 75;
constexpr int kAttributeMinor = 76;
constexpr int kMaxDynamicShared = 8;
constexpr size_t kDefaultShared = 48 * 1024;
constexpr size_t kMaxArguments = 48;

struct Driver {
    CUresult (*init)(unsigned) = nullptr;
    CUresult (*version)(int *) = nullptr;
    CUresult (*context)(CUcontext *) = nullptr;
    CUresult (*retain)(CUcontext *, CUdevice) = nullptr;
    CUresult (*set_context)(CUcontext) = nullptr;
    CUresult (*context_id)(CUcontext, unsigned long long *) = nullptr;  // null before CUDA 12.0
    CUresult (*device)(CUdevice *) = nullptr;
    CUresult (*attribute)(int *, int, CUdevice) = nullptr;
    CUresult (*load)(CUmodule *, const void *) = nullptr;
    CUresult (*function)(CUfunction *, CUmodule, const char *) = nullptr;
    CUresult (*set_attribute)(CUfunction, int, int) = nullptr;
    CUresult (*launch)(CUfunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                       unsigned, CUstream, void **, void **) = nullptr;
    CUresult (*error_string)(CUresult, const char **) = nullptr;
    std::string missing;
};

thread_local std::string last_error = "no call has failed";
std::string driver_path = "libcuda.so.1";
bool driver_opened = false;
std::mutex mutex;

Driver open_driver() {
    Driver result;
    driver_opened = true;
    void *library = dlopen(driver_path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        result.missing = "the CUDA driver cannot be opened (" + std::string(dlerror()) +
                         "); install NVIDIA's driver";
        return result;
    }
    auto find = [&](auto &target, const char *name) {
        target = reinterpret_cast<std::decay_t<decltype(target)>>(dlsym(library, name));
        if (target == nullptr) result.missing = driver_path + " has no " + name;
    };
    find(result.init, "cuInit");
    find(result.version, "cuDriverGetVersion");
    find(result.context, "cuCtxGetCurrent");
    find(result.retain, "cuDevicePrimaryCtxRetain");
    find(result.set_context, "cuCtxSetCurrent");
    result.context_id =
        reinterpret_cast<decltype(result.context_id)>(dlsym(library, "cuCtxGetId"));
    find(result.device, "cuCtxGetDevice");
    find(result.attribute, "cuDeviceGetAttribute");
    find(result.load, "cuModuleLoadData");
    find(result.function, "cuModuleGetFunction");
    find(result.set_attribute, "cuFuncSetAttribute");
    find(result.launch, "cuLaunchKernel");
    find(result.error_string, "cuGetErrorString");
    if (result.missing.empty() && result.init(0) != kSuccess) {
        result.missing = "the CUDA driver finds no device";
    }
    return result;
}

const Driver &driver() {
    static const Driver opened = open_driver();
    return opened;
}

ingot_status check(CUresult result, const char *call) {
    if (result == kSuccess) return INGOT_OK;
    const char *text = nullptr;
    driver().error_string(result, &text);
    return fail(INGOT_DRIVER_ERROR,
                std::string(call) + ": " + (text != nullptr ? text : "unknown error"));
}

// One compiled form, ready to launch in one context.
struct Loaded {
    CUfunction function;
    const CompiledForm *form;
};

using Forms = std::unordered_map<std::string, Loaded>;

// The current context of this thread. CUDA's runtime, and so PyTorch, binds one at its first call in
// a thread, which may still lie ahead; like the runtime, this binds the primary context of device 0.
// It is never released: whoever made it first may have left it to the process.
ingot_status current_context(CUcontext *context) {
    if (!driver().missing.empty()) return fail(INGOT_NO_DRIVER, driver().missing + ".");
    if (ingot_status s = check(driver().context(context), "cuCtxGetCurrent")) return s;
    if (*context != nullptr) return INGOT_OK;
    if (ingot_status s = check(driver().retain(context, 0), "cuDevicePrimaryCtxRetain")) return s;
    return check(driver().set_context(*context), "cuCtxSetCurrent");
}

// The compute capability of the current context's device.
ingot_status current_capability(int *capability) {
    CUdevice device = 0;
    int major = 0, minor = 0;
    if (ingot_status s = check(driver().device(&device), "cuCtxGetDevice")) return s;
    if (ingot_status s = check(driver().attribute(&major, kAttributeMajor, device), "attribute"))
        return s;
    if (ingot_status s = check(driver().attribute(&minor, kAttributeMinor, device), "attribute"))
        return s;
    *capability = 10 * major + minor;
    return INGOT_OK;
}

std::string dotted(int capability) {
    return std::to_string(capability / 10) + "." + std::to_string(capability % 10);
}

const CompiledFor &compiled_for(int capability) {
    size_t i = 0;
    while (i + 1 < kCompiledForCount && kCompiledFor[i].capability != capability) ++i;
    return kCompiledFor[i];
}

// Why the driver did not load a cubin: it is older than what the cubin needs, if it can be that.
ingot_status not_loaded(CUresult result, const char *call, int capability) {
    const CompiledFor &made = compiled_for(capability);
    int cuda = 0;
    if (ingot_status s = check(driver().version(&cuda), "cuDriverGetVersion")) return s;
    const bool too_old = cuda < made.minimum_cuda;
    const bool of_the_image =
        result == kInvalidImage || result == kNoBinaryForGpu || result == kUnsupportedPtxVersion;
    if (!too_old && !of_the_image) return check(result, call);
    const std::string kernels = "the kernels for compute capability " + dotted(capability);
    const std::string version =
        "CUDA " + std::to_string(cuda / 1000) + "." + std::to_string(cuda % 1000 / 10);
    // Only a ptxas of CUDA 13 needs a newer driver than the card itself.
    const bool older_helps = std::string(made.ptxas).compare(0, 2, "13") == 0;
    const char *rebuild = "rebuild them with: python -m ingot.plugins.kernels.build";
    if (too_old) {
        return fail(INGOT_DRIVER_ERROR,
                    kernels + " need NVIDIA's driver R" + std::to_string(made.minimum_driver) +
                        " or later and this one supports " + version + "; update the driver" +
                        (older_helps ? std::string(", or ") + rebuild + " --ptxas older" : "."));
    }
    const char *text = nullptr;
    driver().error_string(result, &text);
    return fail(INGOT_DRIVER_ERROR, "NVIDIA's driver, which supports " + version + ", refuses " +
                                        kernels + ", which ptxas " + made.ptxas + " made (" +
                                        (text != nullptr ? text : "unknown error") + "); " +
                                        rebuild + (older_helps ? " --ptxas older" : ""));
}

ingot_status load(int capability, Forms *forms) {
    int best = 0;
    for (size_t i = 0; i < kFormCount; ++i) {
        int compiled = kForms[i].capability;
        if (runs_on(compiled, capability) && compiled > best) best = compiled;
    }
    if (best == 0) {
        return fail(INGOT_NO_KERNEL, "no kernel is compiled for compute capability " +
                                         dotted(capability) + "; this library has " +
                                         kCapabilities + ".");
    }
    for (size_t i = 0; i < kFormCount; ++i) {
        const CompiledForm &form = kForms[i];
        if (form.capability != best) continue;
        CUmodule module = nullptr;
        CUfunction function = nullptr;
        if (CUresult r = driver().load(&module, form.cubin))
            return not_loaded(r, "cuModuleLoadData", best);
        // Where the driver loads lazily, this is what loads.
        if (CUresult r = driver().function(&function, module, form.symbol))
            return not_loaded(r, "cuModuleGetFunction", best);
        if (form.shared_bytes > kDefaultShared) {
            if (ingot_status s = check(driver().set_attribute(function, kMaxDynamicShared,
                                                              static_cast<int>(form.shared_bytes)),
                                       "cuFuncSetAttribute"))
                return s;
        }
        (*forms)[form.name] = Loaded{function, &form};
    }
    return INGOT_OK;
}

// The forms of the current context, loaded at the first call in it.
ingot_status prepared(const Forms **forms) {
    // A context may be destroyed and another made at its address, on this device or on another; only
    // the id says so, where the driver has ids. What was loaded into contexts past stays in the map.
    using Key = std::tuple<CUcontext, unsigned long long, int>;
    static std::map<Key, Forms> contexts;
    CUcontext context = nullptr;
    unsigned long long id = 0;
    int capability = 0;
    if (ingot_status s = current_context(&context)) return s;
    if (driver().context_id != nullptr) {
        if (ingot_status s = check(driver().context_id(context, &id), "cuCtxGetId")) return s;
    }
    if (ingot_status s = current_capability(&capability)) return s;
    std::lock_guard<std::mutex> lock(mutex);
    const Key key{context, id, capability};
    auto found = contexts.find(key);
    if (found == contexts.end()) {
        Forms loaded;
        if (ingot_status s = load(capability, &loaded)) return s;
        found = contexts.emplace(key, std::move(loaded)).first;
    }
    *forms = &found->second;
    return INGOT_OK;
}

}  // namespace

ingot_status fail(ingot_status status, const std::string &message) {
    last_error = message;
    return status;
}

const char *dtype_name(ingot_dtype dtype) {
    switch (dtype) {
        case INGOT_FLOAT32: return "fp32";
        case INGOT_FLOAT16: return "fp16";
        case INGOT_BFLOAT16: return "bf16";
    }
    return "unknown";
}

size_t dtype_size(ingot_dtype dtype) { return dtype == INGOT_FLOAT32 ? 4 : 2; }

ingot_status compute_capability(int *capability) {
    CUcontext context = nullptr;
    if (ingot_status s = current_context(&context)) return s;
    return current_capability(capability);
}

ingot_status check_workspace(const std::string &op, size_t needed, size_t given) {
    if (given >= needed) return INGOT_OK;
    return fail(INGOT_BAD_ARGUMENT, op + " needs " + std::to_string(needed) +
                                        " bytes of workspace for this call and was given " +
                                        std::to_string(given) + "; pass as many as ingot_" + op +
                                        "_workspace says.");
}

ingot_status launch(const std::string &form, Grid grid, std::initializer_list<Argument> arguments,
                    void *stream) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return INGOT_OK;
    constexpr int64_t kMaxX = 2147483647, kMaxYz = 65535;
    if (grid.x < 0 || grid.x > kMaxX || grid.y < 0 || grid.y > kMaxYz || grid.z < 0 ||
        grid.z > kMaxYz) {
        return fail(INGOT_BAD_ARGUMENT, form + " would need a grid of " + std::to_string(grid.x) +
                                            " x " + std::to_string(grid.y) + " x " +
                                            std::to_string(grid.z) +
                                            " blocks; split the call into smaller ones.");
    }
    const Forms *forms = nullptr;
    if (ingot_status s = prepared(&forms)) return s;
    auto found = forms->find(form);
    if (found == forms->end()) {
        return fail(INGOT_NO_KERNEL, "no kernel " + form + " in this library; rebuild it with "
                                     "make plugins.");
    }
    const CompiledForm &compiled = *found->second.form;
    void *pointers[kMaxArguments + 2];
    std::string kinds;
    for (const Argument &argument : arguments) {
        if (kinds.size() == kMaxArguments) break;
        pointers[kinds.size()] = const_cast<uint64_t *>(&argument.pointer);
        kinds += static_cast<char>(argument.kind);
    }
    if (kinds != compiled.arguments) {
        return fail(INGOT_BAD_ARGUMENT, form + " takes the arguments " + compiled.arguments +
                                            " and was given " + kinds + ".");
    }
    // Triton's kernels end with two scratch pointers, which none of these forms uses.
    uint64_t none = 0;
    pointers[kinds.size()] = pointers[kinds.size() + 1] = &none;
    return check(driver().launch(found->second.function, static_cast<unsigned>(grid.x),
                                 static_cast<unsigned>(grid.y), static_cast<unsigned>(grid.z),
                                 compiled.threads, 1, 1, compiled.shared_bytes, stream,
                                 pointers, nullptr),
                 form.c_str());
}

}  // namespace ingot

int ingot_kernels_version(void) { return INGOT_KERNELS_VERSION; }

const char *ingot_kernels_build(void) { return ingot::kBuildLine; }

const char *ingot_last_error(void) { return ingot::last_error.c_str(); }

ingot_status ingot_prepare(void) {
    const ingot::Forms *forms = nullptr;
    return ingot::prepared(&forms);
}

ingot_status ingot_use_driver(const char *path) {
    std::lock_guard<std::mutex> lock(ingot::mutex);
    if (ingot::driver_opened) {
        return ingot::fail(INGOT_BAD_ARGUMENT, "the driver is open already.");
    }
    ingot::driver_path = path;
    return INGOT_OK;
}
