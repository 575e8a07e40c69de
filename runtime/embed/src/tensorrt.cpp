// The backend over a TensorRT engine.
//
// An engine is code for the GPU: it is read only where its hash is the manifest's, by the builder's own
// version, on a device it was built for. States live on the device in two buffers each, read from one
// and written to the other in turn; both are allocated at reset. The contexts of the profiles run one
// after the other on one stream, so they compute in one block of memory. Logits come back to the host.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <fstream>
#include <iterator>

#include "backend.hpp"
#include "cuda.hpp"
#include "json_file.hpp"
#include "nvinfer.hpp"

namespace ingot {
namespace {

namespace fs = std::filesystem;

// The buffer that contexts compute in; no tensor has a space in its name.
constexpr const char *kActivations = "context memory";

// Keeps the last error for the message of the call that failed.
class Logger final : public nvinfer1::ILogger {
  public:
    void log(Severity severity, const char *message) noexcept override {
        if (severity > Severity::kERROR) return;
        try {
            last = message;
        } catch (const std::exception &) {
            // Without memory the message is lost, and the call's failure is still said.
        }
    }

    static thread_local std::string last;
};

thread_local std::string Logger::last;

// TensorRT keeps the first logger of a process without owning it, so it is never destroyed.
Logger &logger() {
    static Logger *const kept = new Logger;
    return *kept;
}

[[noreturn]] void refuse(const std::string &what) {
    const std::string said = Logger::last.empty() ? "no message" : plain(Logger::last, 400);
    throw Error(what + " (TensorRT: " + said + "); export again.");
}

nvinfer1::DataType type_of(const std::string &dtype) {
    if (dtype == "float16") return nvinfer1::DataType::kHALF;
    if (dtype == "bfloat16") return nvinfer1::DataType::kBF16;
    if (dtype == "int64") return nvinfer1::DataType::kINT64;
    return nvinfer1::DataType::kFLOAT;
}

std::size_t width_of(const std::string &dtype) {
    if (dtype == "int64") return 8;
    return dtype == "float32" ? 4 : 2;
}

// The engine, with its weights on the device; contexts of it run for several threads.
struct Loaded {
    Loaded(const fs::path &folder, const Manifest &given, bool hashed)
        : manifest(given), library(nvinfer(*manifest.engine)) {
        const EngineInfo &info = *manifest.engine;
        check_engine(folder, manifest, library.version, cuda.capability(), hashed);
        const Cuda::Current current(cuda);
        if (!info.embedded) {
            for (const std::string &name : info.libraries) {
                const std::string path = (folder / name).string();
                if (library.registry()->loadLibrary(path.c_str()) == nullptr) {
                    refuse(path + " cannot be loaded");
                }
            }
        }
        runtime.reset(static_cast<nvinfer1::IRuntime *>(
            library.create_runtime(&logger(), NV_TENSORRT_VERSION)));
        if (!runtime) refuse("TensorRT " + library.version + " cannot start");
        runtime->setEngineHostCodeAllowed(info.embedded);
        std::ifstream file(folder / kEngine, std::ios::binary);
        const std::vector<char> blob((std::istreambuf_iterator<char>(file)),
                                     std::istreambuf_iterator<char>());
        engine.reset(runtime->deserializeCudaEngine(blob.data(), blob.size()));
        if (!engine) refuse((folder / kEngine).string() + " cannot be read");
        for (const TensorInfo &input : manifest.inputs) check_tensor(input);
        for (const StateInfo &state : manifest.states)
            check_tensor({state.output, state.dtype, {}});
        check_tensor(main_output(manifest));
    }

    void check_tensor(const TensorInfo &tensor) const {
        const char *name = tensor.name.c_str();
        if (engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kNONE) {
            refuse("the engine has no " + tensor.name + ", which " + kManifest + " names");
        }
        if (engine->getTensorDataType(name) != type_of(tensor.dtype)) {
            refuse("the engine has " + tensor.name + " of another type than " + tensor.dtype +
                   ", which " + kManifest + " says");
        }
    }

    const Manifest manifest;
    const NvInfer &library;
    // Keeps the device open: what lies there is lost when the last one closes it.
    Cuda cuda;
    std::unique_ptr<nvinfer1::IRuntime> runtime;
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
};

class TrtBackend final : public Backend {
  public:
    explicit TrtBackend(std::shared_ptr<Loaded> loaded)
        : loaded_(std::move(loaded)), manifest_(loaded_->manifest), cuda_(loaded_->cuda.device()) {
        contexts_.resize(manifest_.engine->profiles.size());
    }

    ~TrtBackend() override {
        const Cuda::Current current(cuda_);
        contexts_.clear();
        // The last backend frees the engine, and it needs the device for that.
        loaded_.reset();
    }

    std::unique_ptr<Backend> fork() const override { return std::make_unique<TrtBackend>(loaded_); }

    void reset(std::int64_t batch, std::int64_t capacity) override {
        const auto &most = manifest_.engine->profiles[0].shapes.at("input_ids").most;
        if (batch > most[0] || capacity > most[1]) {
            throw Error(std::to_string(batch) + " sequences of " + std::to_string(capacity) +
                        " tokens are more than this engine was built for (" + std::to_string(most[0]) +
                        " of " + std::to_string(most[1]) +
                        "); export with a larger --max-batch or --max-seq.");
        }
        const Cuda::Current current(cuda_);
        batch_ = batch;
        turn_ = 0;
        for (const StateInfo &state : manifest_.states) {
            const std::size_t bytes =
                elements(state_shape(state, batch, capacity)) * width_of(state.dtype);
            void *before = cuda_.room(buffer(state, turn_), bytes);
            cuda_.room(buffer(state, 1 - turn_), bytes);
            // A cache that grows holds nothing yet, and the other buffer is written first.
            if (!state.axis) cuda_.zero(before, bytes);
        }
    }

    View run(const Feeds &feeds) override {
        const Cuda::Current current(cuda_);
        nvinfer1::IExecutionContext &context = context_for(feeds.tokens);
        feed(context, "input_ids", feeds.ids, {feeds.batch, feeds.tokens});
        feed(context, "attention_mask", feeds.mask, {feeds.batch, feeds.columns});
        feed(context, "position_ids", feeds.positions, {feeds.batch, feeds.tokens});
        for (const StateInfo &state : manifest_.states) {
            bind(context, state.input, state_shape(state, feeds.batch, feeds.past),
                 cuda_.at(buffer(state, turn_)));
            context.setTensorAddress(state.output.c_str(), cuda_.at(buffer(state, 1 - turn_)));
        }
        const TensorInfo &main = main_output(manifest_);
        const std::vector<std::int64_t> shape = main_shape(main, feeds);
        expect(context, main.name, shape);
        for (const StateInfo &state : manifest_.states) {
            expect(context, state.output,
                   state_shape(state, feeds.batch, feeds.past + feeds.tokens));
        }
        const std::size_t bytes = elements(shape) * width_of(main.dtype);
        void *address = cuda_.room(main.name, bytes);
        context.setTensorAddress(main.name.c_str(), address);
        if (!context.enqueueV3(static_cast<cudaStream_t>(cuda_.stream()))) {
            refuse("the engine could not run");
        }
        turn_ = 1 - turn_;
        output_ = download(main.dtype, elements(shape), address);
        return {output_.data(), shape};
    }

    std::vector<StateCopy> state(std::int64_t seen) const override {
        const Cuda::Current current(cuda_);
        std::vector<StateCopy> result;
        for (const StateInfo &state : manifest_.states) {
            StateCopy copy{state.output, state_shape(state, batch_, seen), {}};
            copy.values = download(state.dtype, elements(copy.shape), cuda_.at(buffer(state, turn_)));
            result.push_back(std::move(copy));
        }
        return result;
    }

  private:
    static std::string buffer(const StateInfo &state, int turn) {
        return state.input + "/" + std::to_string(turn);
    }

    // The engine would write past a buffer that was made for another shape.
    static void expect(const nvinfer1::IExecutionContext &context, const std::string &name,
                       const std::vector<std::int64_t> &shape) {
        const nvinfer1::Dims found = context.getTensorShape(name.c_str());
        if (std::equal(shape.begin(), shape.end(), found.d, found.d + std::max(0, found.nbDims)))
            return;
        refuse("the engine has " + name + " of another shape than " + sizes_of(shape) + ", which " +
               kManifest + " says");
    }

    // The execution context of the profile that fits so many new tokens: the second is for one.
    nvinfer1::IExecutionContext &context_for(std::int64_t tokens) {
        const std::size_t index = contexts_.size() > 1 && tokens == 1 ? 1 : 0;
        if (!contexts_[index]) contexts_[index] = make_context(static_cast<std::int32_t>(index));
        return *contexts_[index];
    }

    // The largest profile's memory fits each of them, and none keeps anything there between two runs.
    std::unique_ptr<nvinfer1::IExecutionContext> make_context(std::int32_t profile) {
        nvinfer1::ICudaEngine &engine = *loaded_->engine;
        const std::int64_t bytes = engine.getDeviceMemorySizeV2();
        void *memory = cuda_.room(kActivations, static_cast<std::size_t>(bytes));
        std::unique_ptr<nvinfer1::IExecutionContext> made(
            engine.createExecutionContext(nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED));
        if (made) made->setDeviceMemoryV2(memory, bytes);
        if (!made || !made->setOptimizationProfileAsync(profile,
                                                        static_cast<cudaStream_t>(cuda_.stream()))) {
            refuse("the engine could not make room to run");
        }
        return made;
    }

    void feed(nvinfer1::IExecutionContext &context, const std::string &name, const std::int64_t *data,
              const std::vector<std::int64_t> &shape) {
        const auto named = [&](const TensorInfo &input) { return input.name == name; };
        if (std::none_of(manifest_.inputs.begin(), manifest_.inputs.end(), named)) return;
        const std::size_t bytes = elements(shape) * sizeof *data;
        void *address = cuda_.room(name, bytes);
        cuda_.upload(address, data, bytes);
        bind(context, name, shape, address);
    }

    void bind(nvinfer1::IExecutionContext &context, const std::string &name,
              const std::vector<std::int64_t> &shape, void *address) const {
        nvinfer1::Dims dims{};
        if (shape.size() > std::size(dims.d)) refuse("the engine refuses the rank of " + name);
        dims.nbDims = static_cast<std::int32_t>(shape.size());
        std::copy(shape.begin(), shape.end(), dims.d);
        if (!context.setInputShape(name.c_str(), dims)) refuse("the engine refuses the shape of " + name);
        context.setTensorAddress(name.c_str(), address);
    }

    std::vector<float> download(const std::string &dtype, std::size_t count, const void *address) const {
        std::vector<float> result(count);
        if (dtype == "float32") {
            cuda_.download(result.data(), address, count * sizeof(float));
            return result;
        }
        std::vector<std::uint16_t> halves(count);
        cuda_.download(halves.data(), address, count * sizeof(std::uint16_t));
        const bool brain = dtype == "bfloat16";
        std::transform(halves.begin(), halves.end(), result.begin(), [&](std::uint16_t bits) {
            return brain ? Ort::BFloat16_t::FromBits(bits).ToFloat()
                         : Ort::Float16_t::FromBits(bits).ToFloat();
        });
        return result;
    }

    std::shared_ptr<Loaded> loaded_;
    const Manifest &manifest_;
    Cuda cuda_;
    std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;  // by profile
    std::int64_t batch_ = 1;
    int turn_ = 0;  // which buffer of each state holds the past
    std::vector<float> output_;
};

}  // namespace

std::unique_ptr<Backend> open_tensorrt(const fs::path &folder, const Manifest &manifest, bool hashed) {
    return std::make_unique<TrtBackend>(std::make_shared<Loaded>(folder, manifest, hashed));
}

}  // namespace ingot
