// The backend over ONNX Runtime's CPU provider.
//
// A cache whose past and present may share a buffer is allocated once, at its capacity, and appended
// to in place. Another state is handed on from output to input without a copy.
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <set>

#include "backend.hpp"
#include "graph_files.hpp"
#include "json_file.hpp"
#include "memory.hpp"

namespace ingot {
namespace {

namespace fs = std::filesystem;

// ONNX Runtime 1.31's Linux packages keep telemetry of every session in a database below the user's
// ~/.cache, for a thread of theirs to send to Microsoft; at exit that thread reads freed memory. A library
// in somebody's program must do neither unasked: ORT_DISABLE_TELEMETRY=0 in the environment asks for it.
// Set as this library is loaded, since setenv may not run beside other threads.
[[maybe_unused]] const int kNoTelemetry = setenv("ORT_DISABLE_TELEMETRY", "1", 0);

// Letters of a message of ONNX Runtime's, which may quote a graph.
constexpr std::size_t kMostQuoted = 400;

ONNXTensorElementDataType element_type(const std::string &dtype, const std::string &name) {
    if (dtype == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    if (dtype == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    throw Error(name + " is " + dtype +
                ", and only float32 and float16 run on ONNX Runtime here; export with --precision "
                "fp32.");
}

const char *name_of(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return "float32";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return "float16";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return "bfloat16";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return "int64";
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_STRING: return "string";
        default: return "another type";
    }
}

[[noreturn]] void other_export(const std::string &what) {
    throw Error(what + "; the graph and " + kManifest + " are not of one export: export again.");
}

// Refuses what the graph computed where it is not the tensor that the manifest says, before a byte
// of it is read: what a graph declares of its outputs may be less than that.
void expect(const Ort::Value &value, const std::string &name, const std::string &dtype,
            const std::vector<std::int64_t> &shape) {
    if (!value || !value.HasValue() || !value.IsTensor()) other_export(name + " is no tensor");
    const Ort::TensorTypeAndShapeInfo found = value.GetTensorTypeAndShapeInfo();
    if (name_of(found.GetElementType()) != dtype || found.GetShape() != shape) {
        other_export(name + " came as " + name_of(found.GetElementType()) + " " +
                     sizes_of(found.GetShape()) + " where " + dtype + " " + sizes_of(shape) +
                     " was expected");
    }
}

// The folder's graph may open no file that is not listed, and so not compared, before.
void check_external_files(const fs::path &graph, const Manifest &manifest) {
    std::ifstream file(graph, std::ios::binary);
    const std::string model((std::istreambuf_iterator<char>(file)),
                            std::istreambuf_iterator<char>());
    try {
        for (const std::string &name : external_files(model)) {
            if (manifest.files.count(name) > 0) continue;
            throw Error(graph.string() + " reads \"" + plain(name) + "\", which " + kManifest +
                        " does not list, so nobody has checked it; export again.");
        }
    } catch (const std::invalid_argument &error) {
        throw Error(graph.string() + " is no ONNX graph (" + error.what() + "); export again.");
    }
}

// The sizes of a state.
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
    Model(const fs::path &folder, const Manifest &given, int threads, const fs::path &operators)
        : manifest(given) {
        Ort::SessionOptions options;
        options.SetIntraOpNumThreads(threads);
        // Warnings about unused constants of the function bodies are of no use to a user.
        options.SetLogSeverityLevel(3);
        check_external_files(folder / kGraph, manifest);
        if (!operators.empty()) options.RegisterCustomOpsLibrary(operators.c_str());
        session = Ort::Session(env, (folder / kGraph).c_str(), options);
        for (const TensorInfo &input : manifest.inputs) inputs.insert(input.name);
        for (const StateInfo &state : manifest.states) element_type(state.dtype, state.input);
        element_type(main_output(manifest).dtype, manifest.main_output);
        check_tensors(folder);
    }

    // What the graph declares is what the manifest says. The rest shows when it has run.
    void check_tensors(const fs::path &folder) const {
        const Ort::AllocatorWithDefaultOptions allocator;
        std::set<std::string> has;
        for (std::size_t n = 0; n < session.GetInputCount(); ++n) {
            const std::string name = session.GetInputNameAllocated(n, allocator).get();
            has.insert(name);
            check_declared(name, session.GetInputTypeInfo(n), manifest.inputs);
        }
        // What may be left out is no input to ONNX Runtime, and need not be named.
        for (std::size_t n = 0; n < session.GetOverridableInitializerCount(); ++n) {
            const std::string name =
                session.GetOverridableInitializerNameAllocated(n, allocator).get();
            if (inputs.count(name) == 0) continue;
            has.insert(name);
            check_declared(name, session.GetOverridableInitializerTypeInfo(n), manifest.inputs);
        }
        for (const TensorInfo &input : manifest.inputs) need(folder, has, input.name);
        has.clear();
        for (std::size_t n = 0; n < session.GetOutputCount(); ++n) {
            const std::string name = session.GetOutputNameAllocated(n, allocator).get();
            has.insert(name);
            check_declared(name, session.GetOutputTypeInfo(n), manifest.outputs);
        }
        for (const TensorInfo &output : manifest.outputs) need(folder, has, output.name);
    }

    static void need(const fs::path &folder, const std::set<std::string> &has,
                     const std::string &name) {
        if (has.count(name) > 0) return;
        throw Error((folder / kGraph).string() + " has no " + name + ", which " + kManifest +
                    " names; the two are not of one export: export again.");
    }

    static void check_declared(const std::string &name, const Ort::TypeInfo &type,
                               const std::vector<TensorInfo> &named) {
        const auto said = std::find_if(named.begin(), named.end(), [&](const TensorInfo &tensor) {
            return tensor.name == name;
        });
        if (said == named.end())
            other_export("the graph has \"" + plain(name) + "\", which is not named there");
        if (type.GetONNXType() != ONNX_TYPE_TENSOR)
            other_export(name + " is no tensor in the graph");
        const auto declared = type.GetTensorTypeAndShapeInfo();
        bool same = name_of(declared.GetElementType()) == said->dtype;
        // A graph need not say a shape, and then has no sizes here.
        const std::vector<std::int64_t> shape = declared.GetShape();
        same = same && (shape.empty() || shape.size() == said->shape.size());
        for (std::size_t n = 0; same && n < shape.size(); ++n) {
            // Of a size that is not fixed in the graph, -1 is known.
            same = shape[n] < 0 || said->shape[n].size == shape[n];
        }
        if (!same) other_export("the graph has another type or shape of " + name);
    }

    const Manifest manifest;
    // ONNX Runtime counts these: every session of a process has the same.
    Ort::Env env{ORT_LOGGING_LEVEL_ERROR, "ingot"};
    Ort::Session session{nullptr};
    std::set<std::string> inputs;
};

class OrtBackend final : public Backend {
  public:
    explicit OrtBackend(std::shared_ptr<Model> model)
        : model_(std::move(model)), manifest_(model_->manifest) {}

    std::unique_ptr<Backend> fork() const override { return std::make_unique<OrtBackend>(model_); }

    void reset(std::int64_t batch, std::int64_t capacity) override {
        // The old buffers go first, so that two of them need not fit.
        states_.clear();
        std::uint64_t bytes = 0;
        for (const StateInfo &state : manifest_.states) {
            const auto shape = state_shape(state, batch, state.shared ? capacity : 0);
            const std::size_t count = elements(shape);
            const auto type = element_type(state.dtype, state.input);
            const std::size_t width = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
            need_memory(bytes += count * width);
            Ort::Value zeros =
                Ort::Value::CreateTensor(allocator_, shape.data(), shape.size(), type);
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
        // All of them are what the graph gives by itself.
        if (feeds.kept < feeds.tokens && model_->inputs.count(kLogitsToKeep) > 0) {
            const std::array<std::int64_t, 1> shape{1};
            held.push_back(Ort::Value::CreateTensor<std::int64_t>(
                memory_, const_cast<std::int64_t *>(&feeds.kept), 1, shape.data(), shape.size()));
            binding.BindInput(kLogitsToKeep, held.back());
        }
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
        const TensorInfo &main = main_output(manifest_);
        const std::vector<std::int64_t> shape = main_shape(main, feeds);
        expect(results.at(0), main.name, main.dtype, shape);
        for (std::size_t n = 0; n < states_.size(); ++n) {
            const StateInfo &state = manifest_.states[n];
            const std::int64_t length = feeds.past + feeds.tokens;
            expect(results.at(n + 1), state.output, state.dtype,
                   state.shared ? sizes(states_[n]) : state_shape(state, feeds.batch, length));
            if (!state.shared) states_[n] = std::move(results.at(n + 1));
        }
        main_ = std::move(results.at(0));
        return view(shape);
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

    bool one_by_one() const override { return by_token(manifest_); }

  private:
    View view(const std::vector<std::int64_t> &shape) {
        View result{nullptr, shape};
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
            throw Error(
                "ONNX Runtime could not run this ingot: " + plain(error.what(), kMostQuoted) +
                "; if its files are those of one export, report this.");
        }
    }

    std::unique_ptr<Backend> inner_;
};

}  // namespace

std::unique_ptr<Backend> open_onnxruntime(const fs::path &folder, const Manifest &manifest,
                                          int threads, const fs::path &operators) {
    const std::string version = OrtGetApiBase()->GetVersionString();
    if (OrtGetApiBase()->GetApi(ORT_API_VERSION) == nullptr) {
        throw Error("ONNX Runtime " + version + " is installed and this library needs 1." +
                    std::to_string(ORT_API_VERSION) + " or later; put a later libonnxruntime.so first.");
    }
    try {
        auto model = std::make_shared<Model>(folder, manifest, threads, operators);
        return std::make_unique<Guarded>(std::make_unique<OrtBackend>(std::move(model)));
    } catch (const Ort::Exception &error) {
        const auto made = manifest.tools.find("onnxruntime");
        throw Error("ONNX Runtime " + version + " cannot load " + (folder / kGraph).string() +
                    " (made with " +
                    (made == manifest.tools.end() ? "another version" : made->second) +
                    "): " + plain(error.what(), kMostQuoted) + "; export again with this version.");
    }
}

}  // namespace ingot
