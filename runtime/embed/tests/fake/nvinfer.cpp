// Stands in for TensorRT's library. It cannot compute a graph; its engine is a recipe that only
// comes out right where shapes, addresses, profiles and the turns of the states are:
//
//   the state [B, 1, P, 1] gets each new token's id + 1000 * its position; the next token is
//   (sum of the state over unmasked columns + 7 * column count) mod V.
//
// A second state, where there is one, has a fixed size and is the sum of a row's ids.
//
// A recipe may be of half precision, or say one token less of its logits, as an engine of another
// export.
//
// A context runs in memory that the session gives it. Contexts of one stream, which never run at
// the same time, must share theirs, and those of others must not; what lies there is lost at each
// run.
//
// TensorRT's classes call through a table of functions (apiv::V*); ours has only those a session
// may use, so that any other call ends the test.
#include <NvInferRuntime.h>

#include <array>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

constexpr std::int64_t kVocabulary = 512;
constexpr std::int64_t kActivations = 5000;  // bytes

// The tables of C++ objects as GCC and Clang lay them out.
struct Table {
    std::array<void *, 256> functions;
    void *const *pointer = functions.data();

    Table() {
        void (*const unexpected)() = std::abort;
        for (void *&function : functions) std::memcpy(&function, &unexpected, sizeof function);
    }

    template <typename Member, typename Function>
    Table &set(Member member, Function *function) {
        std::array<std::size_t, 2> raw{};
        static_assert(sizeof raw == sizeof member);
        std::memcpy(&raw, &member, sizeof raw);
        std::memcpy(&functions.at((raw[0] - 1) / sizeof(void *)), &function, sizeof function);
        return *this;
    }

    // An object of which only its table is used.
    template <typename Interface>
    Interface *object() {
        return reinterpret_cast<Interface *>(&pointer);
    }
};

struct Bound {
    nvinfer1::Dims shape{};
    void *address = nullptr;

    const std::int64_t *ids() const { return static_cast<const std::int64_t *>(address); }
    float *floats() const { return static_cast<float *>(address); }
};

struct Context final : nvinfer1::IExecutionContext {
    Table table;
    std::int32_t profile = -1;
    cudaStream_t stream = nullptr;
    void *memory = nullptr;
    std::int64_t bytes = 0;
    std::map<std::string, Bound> bound;

    Context();
    ~Context() override;
    bool in_its_place() const;
    bool run();
};

std::string recipe;  // of the last engine

nvinfer1::DataType data_type(void *, const char *name) {
    const std::string text = name;
    if (text == "input_ids" || text == "attention_mask" || text == "position_ids") {
        return nvinfer1::DataType::kINT64;
    }
    return recipe == "a recipe of halves" ? nvinfer1::DataType::kHALF : nvinfer1::DataType::kFLOAT;
}

nvinfer1::TensorIOMode io_mode(void *, const char *name) {
    const std::string text = name;
    for (const char *output : {"logits", "present", "sum_after"}) {
        if (text == output) return nvinfer1::TensorIOMode::kOUTPUT;
    }
    for (const char *input :
         {"input_ids", "attention_mask", "position_ids", "past", "sum_before"}) {
        if (text == input) return nvinfer1::TensorIOMode::kINPUT;
    }
    return nvinfer1::TensorIOMode::kNONE;
}

std::map<const void *, Context *> contexts;  // by what the functions of the table are told

bool set_shape(void *self, const char *name, const nvinfer1::Dims &shape) {
    contexts.at(self)->bound[name].shape = shape;
    return true;
}

bool set_address(void *self, const char *name, void *address) {
    contexts.at(self)->bound[name].address = address;
    return true;
}

bool set_profile(void *self, std::int32_t index, cudaStream_t stream) {
    contexts.at(self)->profile = index;
    contexts.at(self)->stream = stream;
    return true;
}

void set_memory(void *self, void *memory, std::int64_t bytes) {
    contexts.at(self)->memory = memory;
    contexts.at(self)->bytes = bytes;
}

nvinfer1::Dims shape_of(void *self, const char *name) {
    auto &bound = contexts.at(self)->bound;
    const std::int64_t batch = bound["input_ids"].shape.d[0], fresh = bound["input_ids"].shape.d[1];
    const std::string text = name;
    if (text == "logits")
        return {3, {batch, recipe == "a recipe of fewer" ? fresh - 1 : fresh, kVocabulary}};
    if (text == "present") return {4, {batch, 1, bound["past"].shape.d[2] + fresh, 1}};
    return {2, {batch, 1}};
}

bool enqueue(void *self, cudaStream_t) { return contexts.at(self)->run(); }

Context::Context() {
    using nvinfer1::apiv::VExecutionContext;
    table.set(&VExecutionContext::setInputShape, set_shape)
        .set(&VExecutionContext::setTensorAddress, set_address)
        .set(&VExecutionContext::setOptimizationProfileAsync, set_profile)
        .set(&VExecutionContext::setDeviceMemoryV2, set_memory)
        .set(&VExecutionContext::getTensorShape, shape_of)
        .set(&VExecutionContext::enqueueV3, enqueue);
    mImpl = table.object<VExecutionContext>();
    contexts[mImpl] = this;
}

Context::~Context() { contexts.erase(mImpl); }

bool Context::in_its_place() const {
    for (const auto &[name, other] : contexts) {
        if (other->memory != nullptr && (other->memory == memory) != (other->stream == stream)) return false;
    }
    return memory != nullptr && bytes >= kActivations;
}

bool Context::run() {
    const Bound ids = bound["input_ids"], mask = bound["attention_mask"], positions = bound["position_ids"];
    const Bound past = bound["past"], present = bound["present"], logits = bound["logits"];
    const std::int64_t batch = ids.shape.d[0], fresh = ids.shape.d[1], before = past.shape.d[2];
    const std::int64_t columns = before + fresh;
    if (past.shape.nbDims != 4 || mask.shape.d[1] != columns) return false;
    // The second profile is for one token.
    if (profile != (fresh == 1 ? 1 : 0)) return false;
    if (!in_its_place()) return false;
    std::memset(memory, 0x55, static_cast<std::size_t>(bytes));
    for (std::int64_t row = 0; row < batch; ++row) {
        float *state = present.floats() + row * columns;
        std::memcpy(state, past.floats() + row * before, static_cast<std::size_t>(before) * sizeof *state);
        for (std::int64_t t = 0; t < fresh; ++t) {
            const std::int64_t at = row * fresh + t;
            state[before + t] = static_cast<float>(ids.ids()[at] + 1000 * positions.ids()[at]);
            double sum = 7.0 * static_cast<double>(before + t + 1);
            for (std::int64_t s = 0; s <= before + t; ++s) {
                if (mask.ids()[row * columns + s] != 0) sum += static_cast<double>(state[s]);
            }
            float *out = logits.floats() + at * kVocabulary;
            std::memset(out, 0, kVocabulary * sizeof *out);
            out[static_cast<std::int64_t>(std::fmod(sum, kVocabulary))] = 1.0F;
        }
        if (bound.count("sum_before") == 0) continue;
        float &sum_after = bound["sum_after"].floats()[row];
        sum_after = bound["sum_before"].floats()[row];
        for (std::int64_t t = 0; t < fresh; ++t) {
            sum_after += static_cast<float>(ids.ids()[row * fresh + t]);
        }
    }
    std::memset(memory, 0x2A, static_cast<std::size_t>(bytes));
    return true;
}

// There is no room on the device for contexts that bring their own memory.
nvinfer1::IExecutionContext *create_context(void *, nvinfer1::ExecutionContextAllocationStrategy how) {
    return how == nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED ? new Context : nullptr;
}

std::int64_t memory_size(void *) { return kActivations; }

struct Engine final : nvinfer1::ICudaEngine {
    Table table;

    Engine() {
        using Create = nvinfer1::IExecutionContext *(nvinfer1::apiv::VCudaEngine::*)(
            nvinfer1::ExecutionContextAllocationStrategy) noexcept;
        table
            .set(static_cast<Create>(&nvinfer1::apiv::VCudaEngine::createExecutionContext),
                 create_context)
            .set(&nvinfer1::apiv::VCudaEngine::getTensorDataType, data_type)
            .set(&nvinfer1::apiv::VCudaEngine::getTensorIOMode, io_mode)
            .set(&nvinfer1::apiv::VCudaEngine::getDeviceMemorySizeV2, memory_size);
        mImpl = table.object<nvinfer1::apiv::VCudaEngine>();
    }
};

bool plugins_loaded = false;

nvinfer1::ICudaEngine *deserialize(void *, const void *blob, std::size_t size) {
    recipe.assign(static_cast<const char *>(blob), size);
    return recipe.rfind("a recipe", 0) == 0 && plugins_loaded ? new Engine : nullptr;
}

void allow_host_code(void *, bool) {}

struct Runtime final : nvinfer1::IRuntime {
    Table table;

    Runtime() {
        using nvinfer1::apiv::VRuntime;
        // Some versions of TensorRT have more than one of this name.
        using Deserialize =
            nvinfer1::ICudaEngine *(VRuntime::*)(const void *, std::size_t) noexcept;
        table.set(static_cast<Deserialize>(&VRuntime::deserializeCudaEngine), deserialize)
            .set(&VRuntime::setEngineHostCodeAllowed, allow_host_code);
        mImpl = table.object<VRuntime>();
    }
};

void *load_library(void *self, const char *path) {
    plugins_loaded = std::strstr(path, "libingot_trt.so") != nullptr;
    return plugins_loaded ? self : nullptr;
}

}  // namespace

extern "C" {

std::int32_t getInferLibMajorVersion() noexcept { return NV_TENSORRT_MAJOR; }
std::int32_t getInferLibMinorVersion() noexcept { return 1; }
std::int32_t getInferLibPatchVersion() noexcept { return 2; }
std::int32_t getInferLibBuildVersion() noexcept { return 3; }

void *createInferRuntime_INTERNAL(void *, std::int32_t) noexcept { return new Runtime; }

nvinfer1::IPluginRegistry *getPluginRegistry() noexcept {
    static Table table = [] {
        Table made;
        made.set(&nvinfer1::IPluginRegistry::loadLibrary, load_library);
        return made;
    }();
    table.pointer = table.functions.data();
    return table.object<nvinfer1::IPluginRegistry>();
}

}  // extern "C"
