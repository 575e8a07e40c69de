// The backend over ONNX Runtime's CPU provider.
//
// A cache whose past and present may share a buffer is allocated once, at its capacity, and appended
// to in place. Another state is handed on from output to input without a copy.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <set>

#include "backend.hpp"

namespace ingot {
namespace {

namespace fs = std::filesystem;

// ONNX Runtime 1.31's Linux packages keep telemetry of every session in a database below the user's
// ~/.cache, for a thread of theirs to send to Microsoft; at exit that thread reads freed memory. A library
// in somebody's program must do neither unasked: ORT_DISABLE_TELEMETRY=0 in the environment asks for it.
// Set as this library is loaded, since setenv may not run beside other threads.
[[maybe_unused]] const int kNoTelemetry = setenv("ORT_DISABLE_TELEMETRY", "1", 0);

ONNXTensorElementDataType element_type(const std::string &dtype, const std::string &name) {
    if (dtype == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    throw Error(name + " is " + dtype +
                ", and only float32 and float16 run on ONNX Runtime here; export with --precision "
                "fp32.");
}

// The sizes of a tensor that ONNX Runtime made.
std::vector<std::int64_t> sizes(const Ort::Value &value) {
    return value.GetTensorTypeAndShapeInfo().GetShape();
}

// `count` numbers from element `begin` on, as float32.
void read(const Ort::Value &value, std::size_t begin, std::size_t count, float *out) {
    if (value.GetTensorTypeAndShapeInfo().GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
        std::copy_n(value.GetTensorData<float>() + begin, count, out);
        return;
    }
    const auto *halves = value.GetTensorData<Ort::Float16_t>() + begin;
    std::transform(halves, halves + count, out, [](Ort::Float16_t half) { return half.ToFloat(); });
}

// The graph and its weights. ONNX Runtime's own session has no state, and runs for several threads.
struct Model {
    Model(const fs::path &folder, const Manifest &given, int threads) : manifest(given) {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(threads);
        // Warnings about unused constants of the function bodies are of no use to a user.
        options.SetLogSeverityLevel(3);
        session = Ort::Session(env, (folder / kGraph).c_str(), options);
        check_names(folder);
        for (const TensorInfo &input : manifest.inputs) inputs.insert(input.name);
        for (const StateInfo &state : manifest.states) {
            element_type(state.dtype, state.input);
            shared = shared || state.shared;
        }
        for (const TensorInfo &output : manifest.outputs) {
            if (output.name == manifest.main_output) element_type(output.dtype, output.name);
        }
    }

    void check_names(const fs::path &folder) const {
        const Ort::AllocatorWithDefaultOptions allocator;
        std::set<std::string> has;
        for (std::size_t n = 0; n < session.GetInputCount(); ++n) {
            has.insert(session.GetInputNameAllocated(n, allocator).get());
        }
        for (std::size_t n = 0; n < session.GetOutputCount(); ++n) {
            has.insert(session.GetOutputNameAllocated(n, allocator).get());
        }
        std::set<std::string> named{manifest.main_output};
        for (const TensorInfo &input : manifest.inputs) named.insert(input.name);
        for (const StateInfo &state : manifest.states) {
            named.insert(state.input);
            named.insert(state.output);
        }
        for (const std::string &name : named) {
            if (has.count(name) > 0) continue;
            throw Error((folder / kGraph).string() + " has no " + name + ", which " + kManifest +
                        " names; the two are not of one export: export again.");
        }
    }

    const Manifest manifest;
    // ONNX Runtime counts these: every session of a process has the same.
    Ort::Env env{ORT_LOGGING_LEVEL_ERROR, "ingot"};
    Ort::Session session{nullptr};
    std::set<std::string> inputs;
    bool shared = false;  // whether a state is one buffer, read and appended to in place
};

class OrtBackend final : public Backend {
  public:
    explicit OrtBackend(std::shared_ptr<Model> model)
        : model_(std::move(model)), manifest_(model_->manifest) {}

    std::unique_ptr<Backend> fork() const override { return std::make_unique<OrtBackend>(model_); }

    void reset(std::int64_t batch, std::int64_t capacity) override {
        // The old buffers go first, so that two of them need not fit.
        states_.clear();
        for (const StateInfo &state : manifest_.states) {
            const auto shape = state_shape(state, batch, state.shared ? capacity : 0);
            const std::size_t count = elements(shape);
            const auto type = element_type(state.dtype, state.input);
            Ort::Value zeros =
                Ort::Value::CreateTensor(allocator_, shape.data(), shape.size(), type);
            const std::size_t width = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
            if (count > 0) std::memset(zeros.GetTensorMutableRawData(), 0, count * width);
            states_.push_back(std::move(zeros));
        }
    }

    View run(const Feeds &feeds) override {
        Ort::IoBinding binding(model_->session);
        // Tensors over the caller's memory; ONNX Runtime reads inputs only, whatever its types say.
        std::vector<Ort::Value> held;
        const auto bind = [&](const char *name, const std::int64_t *data, std::int64_t columns) {
            if (model_->inputs.count(name) == 0) return;
            const std::array<std::int64_t, 2> shape{feeds.batch, columns};
            held.push_back(Ort::Value::CreateTensor<std::int64_t>(
                memory_, const_cast<std::int64_t *>(data),
                static_cast<std::size_t>(feeds.batch * columns), shape.data(), shape.size()));
            binding.BindInput(name, held.back());
        };
        bind("input_ids", feeds.ids, feeds.tokens);
        bind("attention_mask", feeds.mask, feeds.columns);
        bind("position_ids", feeds.positions, feeds.tokens);
        binding.BindOutput(manifest_.main_output.c_str(), memory_);
        for (std::size_t n = 0; n < states_.size(); ++n) {
            const StateInfo &state = manifest_.states[n];
            binding.BindInput(state.input.c_str(), states_[n]);
            if (state.shared) {
                binding.BindOutput(state.output.c_str(), states_[n]);
            } else {
                binding.BindOutput(state.output.c_str(), memory_);
            }
        }
        model_->session.Run(Ort::RunOptions{nullptr}, binding);
        std::vector<Ort::Value> results = binding.GetOutputValues();
        main_ = std::move(results.at(0));
        for (std::size_t n = 0; n < states_.size(); ++n) {
            if (!manifest_.states[n].shared) states_[n] = std::move(results.at(n + 1));
        }
        return view(feeds);
    }

    std::vector<StateCopy> state(std::int64_t seen) const override {
        std::vector<StateCopy> result;
        for (std::size_t n = 0; n < states_.size(); ++n) {
            const StateInfo &info = manifest_.states[n];
            StateCopy copy{info.output, sizes(states_[n]), {}};
            // A shared buffer as blocks of rows along its axis, of which the first `seen` are used.
            std::vector<std::int64_t> before, after;
            std::int64_t stride = 1, rows = 1;
            if (info.shared && info.axis) {
                const auto axis = copy.shape.begin() + static_cast<std::ptrdiff_t>(*info.axis);
                before.assign(copy.shape.begin(), axis);
                after.assign(axis + 1, copy.shape.end());
                stride = *axis;
                rows = *axis = seen;
            } else {
                after = copy.shape;
            }
            const std::size_t blocks = elements(before), inner = elements(after);
            const std::size_t used = static_cast<std::size_t>(rows) * inner;
            copy.values.resize(blocks * used);
            for (std::size_t block = 0; block < blocks && used > 0; ++block) {
                read(states_[n], block * static_cast<std::size_t>(stride) * inner, used,
                     copy.values.data() + block * used);
            }
            result.push_back(std::move(copy));
        }
        return result;
    }

    bool one_by_one() const override { return model_->shared; }

  private:
    View view(const Feeds &feeds) {
        View result{nullptr, sizes(main_)};
        if (result.shape.size() < 2 || result.shape[0] != feeds.batch) {
            throw Error(manifest_.main_output + " has another shape than [batch, ...]; export again.");
        }
        const auto type = main_.GetTensorTypeAndShapeInfo().GetElementType();
        if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
            result.data = main_.GetTensorData<float>();
        } else {
            widened_.resize(elements(result.shape));
            read(main_, 0, widened_.size(), widened_.data());
            result.data = widened_.data();
        }
        return result;
    }

    std::shared_ptr<Model> model_;
    const Manifest &manifest_;
    Ort::AllocatorWithDefaultOptions allocator_;
    Ort::MemoryInfo memory_ = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    std::vector<Ort::Value> states_;  // of manifest_.states, in order
    Ort::Value main_{nullptr};
    std::vector<float> widened_;  // the main output of a half-precision graph
};

// Turns ONNX Runtime's exceptions into ours.
class Guarded final : public Backend {
  public:
    explicit Guarded(std::unique_ptr<Backend> inner) : inner_(std::move(inner)) {}

    std::unique_ptr<Backend> fork() const override {
        return std::make_unique<Guarded>(inner_->fork());
    }

    void reset(std::int64_t batch, std::int64_t capacity) override {
        guard([&] { inner_->reset(batch, capacity); });
    }

    View run(const Feeds &feeds) override {
        return guard([&] { return inner_->run(feeds); });
    }

    std::vector<StateCopy> state(std::int64_t seen) const override {
        return guard([&] { return inner_->state(seen); });
    }

    bool one_by_one() const override { return inner_->one_by_one(); }

  private:
    template <typename Call>
    static auto guard(Call call) -> decltype(call()) {
        try {
            return call();
        } catch (const Ort::Exception &error) {
            throw Error(std::string("ONNX Runtime could not run this ingot: ") + error.what() +
                        "; if its files are those of one export, report this.");
        }
    }

    std::unique_ptr<Backend> inner_;
};

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const fs::path &folder, const Manifest &manifest,
                                          int threads) {
    const std::string version = OrtGetApiBase()->GetVersionString();
    if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
        throw Error("ONNX Runtime " + version + " is installed and this library needs 1." +
                    std::to_string(ORT_API_VERSION) + " or later; put a later libonnxruntime.so first.");
    }
    try {
        auto model = std::make_shared<Model>(folder, manifest, threads);
        return std::make_unique<Guarded>(std::make_unique<OrtBackend>(std::move(model)));
    } catch (const Ort::Exception &error) {
        const auto made = manifest.tools.find("onnxruntime");
        throw Error("ONNX Runtime " + version + " cannot load " + (folder / kGraph).string() +
                    " (made with " + (made == manifest.tools.end() ? "another version" : made->second) +
                    "): " + error.what() + "; export again with this version.");
    }
}

}  // namespace ingot
