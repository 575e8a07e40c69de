#include "manifest_rules.hpp"

#include <algorithm>
#include <filesystem>
#include <ingot/error.hpp>
#include <set>
#include <stdexcept>

#include "field.hpp"
#include "json_file.hpp"

namespace ingot {
namespace {

namespace fs = std::filesystem;

constexpr std::size_t kMostTensors = 1 << 14;  // and files
constexpr std::size_t kMostAxes = 8;
// Of a state of one sequence: 16 GiB in float32.
constexpr std::int64_t kMostElements = std::int64_t{1} << 32;

// A value that is not what the rules say; `parse_manifest` adds the file's name and what to do.
[[noreturn]] void damaged(const std::string &what) { throw std::invalid_argument(what); }

std::string tensor_name(const Field &value) {
    return value.matching(kTensor, "the name of a tensor");
}

// The axes of one shape.
std::vector<Dimension> shape(const Field &values) {
    std::vector<Dimension> result;
    for (const Field &value : values.items(kMostAxes)) {
        Dimension dimension;
        if (value.is_text()) {
            dimension.name = value.matching(kSymbol, "a size or the name of one");
        } else {
            dimension.size = value.whole(0, kMostSize);
        }
        result.push_back(dimension);
    }
    if (result.empty()) values.refuse("a list of at least one size");
    return result;
}

bool same(const std::vector<Dimension> &a, const std::vector<Dimension> &b) {
    return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                      [](const Dimension &x, const Dimension &y) {
                          return x.size == y.size && x.name == y.name;
                      });
}

// The shape of a state's output.
std::vector<Dimension> after(const StateInfo &state) {
    std::vector<Dimension> result = state.input_shape;
    if (state.axis) result[*state.axis].name = "total_sequence";
    return result;
}

// Whether a shape is what is written: names of sizes, and a size that is given.
bool is(const std::vector<Dimension> &shape, const std::vector<std::string> &names,
        std::int64_t last = -1) {
    const std::size_t fixed = last < 0 ? 0 : 1;
    if (shape.size() != names.size() + fixed) return false;
    for (std::size_t n = 0; n < names.size(); ++n) {
        if (shape[n].name != names[n]) return false;
    }
    return fixed == 0 || (shape.back().fixed() && shape.back().size == last);
}

std::vector<TensorInfo> tensors(const Field &values) {
    std::vector<TensorInfo> result;
    std::set<std::string> names;
    for (const Field &value : values.items(kMostTensors)) {
        value.only({"name", "dtype", "shape"});
        result.push_back({tensor_name(value.at("name")),
                          value.at("dtype").one_of({"float32", "float16", "bfloat16", "int64"}),
                          shape(value.at("shape"))});
        if (!names.insert(result.back().name).second) {
            damaged(values.name() + " has " + result.back().name + " twice");
        }
    }
    return result;
}

const TensorInfo *find(const std::vector<TensorInfo> &tensors, const std::string &name) {
    for (const TensorInfo &tensor : tensors) {
        if (tensor.name == name) return &tensor;
    }
    return nullptr;
}

// A state's axes are the batch, fixed sizes and, of a cache, the past: one axis, of which its
// output has as many more as there are new tokens.
StateInfo state(const Field &value) {
    StateInfo result;
    value.only(
        {"kind", "input", "output", "dtype", "input_shape", "output_shape", "axis", "shared"});
    result.kind = value.at("kind").one_of({"key", "value", "conv", "ssm"});
    result.input = tensor_name(value.at("input"));
    result.output = tensor_name(value.at("output"));
    result.dtype = value.at("dtype").one_of({"float32", "float16", "bfloat16"});
    const Field input_shape = value.at("input_shape");
    result.input_shape = shape(input_shape);
    result.shared = value.at("shared").truth();
    const bool grows = result.kind == "key" || result.kind == "value";
    std::int64_t elements = 1, growing = 0;
    bool fits = result.input_shape[0].name == "batch";
    for (std::size_t n = 1; n < result.input_shape.size(); ++n) {
        const Dimension &dimension = result.input_shape[n];
        if (!dimension.fixed()) {
            fits = fits && grows && growing == 0 && dimension.name == "past_sequence";
            growing = static_cast<std::int64_t>(n);
        } else if (dimension.size > 0 && elements > kMostElements / dimension.size) {
            input_shape.refuse("of at most " + std::to_string(kMostElements) + " elements");
        } else {
            elements *= dimension.size;
        }
    }
    if (!fits || grows != (growing > 0)) {
        input_shape.refuse(grows ? "batch, then sizes and one past_sequence"
                                 : "batch, and then sizes");
    }
    const Field axis = value.at("axis");
    if (grows) {
        result.axis = static_cast<std::size_t>(axis.whole(growing, growing));
    } else if (!axis.null()) {
        axis.refuse("null for a " + result.kind + " state");
    }
    if (!same(shape(value.at("output_shape")), after(result))) {
        value.at("output_shape").refuse("input_shape with total_sequence for past_sequence");
    }
    return result;
}

EngineInfo engine(const Field &value) {
    EngineInfo result;
    value.only({"builder", "version", "compute_capabilities", "graph_sha256", "plugins",
                "libraries", "embedded", "profiles"});
    result.builder = value.at("builder").one_of({"tensorrt", "tensorrt-rtx"});
    result.version = value.at("version").matching(kVersion, "a version");
    result.compute_capabilities = value.at("compute_capabilities").wholes(10, 9999, 64);
    if (result.compute_capabilities.empty())
        value.at("compute_capabilities").refuse("a list of at least one");
    result.graph_sha256 = value.at("graph_sha256").sha256();
    for (const auto &[name, count] : value.at("plugins").entries(256)) {
        if (!kOperator.spell(name)) damaged(count.name() + " is not named like an operator");
        result.plugins[name] = count.whole(1, kMostSize);
    }
    for (const Field &library : value.at("libraries").items(16)) {
        // A library is code: it must be one of this folder, where its hash is checked.
        const std::string name = library.text();
        if (!is_relative_name(name) || name.find('/') != std::string::npos)
            library.refuse("a file of the folder");
        result.libraries.push_back(name);
    }
    result.embedded = value.at("embedded").truth();
    for (const Field &profile : value.at("profiles").items(16)) {
        profile.only({"name", "shapes"});
        profile.at("name").matching(kProfile, "letters, digits and _");
        ProfileInfo made;
        for (const auto &[name, range] : profile.at("shapes").entries(kMostTensors)) {
            const std::vector<Field> ends = range.items(3);
            if (ends.size() != 3) range.refuse("the least, the usual and the largest shape");
            ProfileInfo::Range read{ends[0].wholes(0, kMostSize, kMostAxes),
                                    ends[1].wholes(0, kMostSize, kMostAxes),
                                    ends[2].wholes(0, kMostSize, kMostAxes)};
            bool ordered =
                read.least.size() == read.usual.size() && read.usual.size() == read.most.size();
            for (std::size_t n = 0; ordered && n < read.least.size(); ++n) {
                ordered = read.least[n] <= read.usual[n] && read.usual[n] <= read.most[n];
            }
            if (!ordered) range.refuse("three shapes of one rank, none larger than the next");
            made.shapes[name] = read;
        }
        result.profiles.push_back(made);
    }
    if (result.profiles.empty()) value.at("profiles").refuse("a list of at least one profile");
    return result;
}

Generation generation(const Field &value, std::int64_t vocab_size) {
    Generation result;
    result.eos_token_ids = value.at("eos_token_ids").wholes(0, vocab_size - 1, 4096);
    result.pad_token_id = value.at("pad_token_id").whole(0, vocab_size - 1);
    const Field longest = value.at("context_length");
    if (!longest.null()) result.context_length = longest.whole(1, kMostSize);
    if (value.has("switch_length")) {
        result.switch_length = value.at("switch_length").whole(1, kMostSize);
    }
    return result;
}

// The graph's inputs are those that a session feeds, and its outputs those that it reads.
void check_tensors(const Manifest &manifest) {
    std::set<std::string> state_inputs, state_outputs;
    bool grows = false;
    for (const StateInfo &state : manifest.states) {
        const TensorInfo *input = find(manifest.inputs, state.input);
        const TensorInfo *output = find(manifest.outputs, state.output);
        if (!state_inputs.insert(state.input).second ||
            !state_outputs.insert(state.output).second) {
            damaged("two states are " + state.input + " or " + state.output);
        }
        if (input == nullptr || output == nullptr) {
            damaged("inputs and outputs lack " + state.input + " or " + state.output);
        }
        if (input->dtype != state.dtype || output->dtype != state.dtype ||
            !same(input->shape, state.input_shape) || !same(output->shape, after(state))) {
            damaged(state.input + " is another tensor in states than in inputs or outputs");
        }
        grows = grows || state.axis;
    }
    for (const char *name : {"input_ids", "attention_mask"}) {
        if (find(manifest.inputs, name) == nullptr) damaged(std::string("inputs lacks ") + name);
    }
    for (const TensorInfo &input : manifest.inputs) {
        if (input.name == kLogitsToKeep) {
            if (manifest.task != "generate" || (manifest.target != "onnx" && manifest.target != "ort")) {
                damaged("inputs has " + input.name +
                        ", which is for the task generate and the targets onnx and ort");
            }
            if (input.dtype != "int64" || !is(input.shape, {}, 1)) {
                damaged(input.name + " is not of int64 and of one number");
            }
            continue;
        }
        if (state_inputs.count(input.name) > 0) continue;
        const bool mask = input.name == "attention_mask";
        if (!mask && input.name != "input_ids" && input.name != "position_ids") {
            damaged("inputs has " + input.name + ", which no session feeds");
        }
        if (input.dtype != "int64" ||
            !is(input.shape, {"batch", mask && grows ? "total_sequence" : "sequence"})) {
            damaged(input.name + " is not of int64 and of the shape that a session feeds");
        }
    }
    const TensorInfo *main = find(manifest.outputs, manifest.main_output);
    if (main == nullptr) damaged("outputs lacks " + manifest.main_output + ", the main output");
    const auto labels = static_cast<std::int64_t>(manifest.labels.size());
    const bool classify = manifest.task == "classify";
    const bool features = manifest.task == "features";
    const std::int64_t width = classify   ? labels
                               : features ? (main->shape.empty() ? 0 : main->shape.back().size)
                                          : manifest.vocab_size;
    const bool some = find(manifest.inputs, kLogitsToKeep) != nullptr;
    const std::vector<std::string> sizes =
        classify ? std::vector<std::string>{"batch"}
                 : std::vector<std::string>{"batch", some ? "kept_sequence" : "sequence"};
    if (main->dtype == "int64" || state_outputs.count(main->name) > 0 || width < 1 ||
        !is(main->shape, sizes, width)) {
        damaged(main->name + " is not of a floating-point type and of the shape that " +
                manifest.task + " has: the batch" + (classify ? "" : ", the new tokens") + " and " +
                (classify   ? "the labels"
                 : features ? "the hidden size"
                            : "vocab_size"));
    }
}

// One name is one file on every system, and none but the engine's libraries and that of the kernels
// is a program.
void check_names(const Manifest &manifest) {
    std::vector<std::string> libraries;
    if (manifest.engine) libraries = manifest.engine->libraries;
    if (manifest.kernels == "ingot") libraries.push_back(kOperators);
    std::set<std::string> seen;
    for (const auto &[name, info] : manifest.files) {
        std::string lower = name;
        // std::tolower follows the locale of whoever embeds this.
        for (char &c : lower) c = c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
        if (!seen.insert(lower).second)
            damaged("files holds " + name + " twice, but for capital letters");
        for (std::size_t n = name.find('/'); n != std::string::npos; n = name.find('/', n + 1)) {
            const std::string above = name.substr(0, n);
            if (manifest.files.count(above) > 0)
                damaged("files holds " + above + ", and " + name + " below it");
        }
        const std::string ending = fs::path(lower).extension().string();
        for (const char *code : {".py", ".pyc", ".pyd", ".pyi", ".pth", ".so"}) {
            if (ending != code || std::count(libraries.begin(), libraries.end(), name) > 0)
                continue;
            damaged("files holds " + name + ", which is a program; an ingot holds none");
        }
    }
}

// Everything that is opened is listed, so that its size and hash are compared before.
void check_listed(const Manifest &manifest) {
    std::set<std::string> opened{kGraph};
    if (manifest.kernels == "ingot") opened.insert(kOperators);
    if (manifest.engine) {
        opened.insert(kEngine);
        opened.insert(manifest.engine->libraries.begin(), manifest.engine->libraries.end());
    }
    for (const std::string &name : opened) {
        if (manifest.files.count(name) == 0) damaged("files lacks " + name);
    }
}

// What no session needs is typed as well, so that every reader refuses the same folders.
void check_notes(const Field &raw) {
    const Field source = raw.at("source"), graph = raw.at("graph");
    source.at("checkpoint").text();
    if (!source.at("revision").null()) source.at("revision").text();
    source.at("sha256").sha256();
    if (source.has("adapter")) {
        const Field adapter = source.at("adapter");
        adapter.at("name").text();
        if (!adapter.at("revision").null()) adapter.at("revision").text();
        adapter.at("sha256").sha256();
    }
    graph.at("opset").whole(1, 1000);
    graph.at("nodes").whole(0, kMostSize);
    for (const auto &[name, count] : graph.at("operators").entries(4096)) {
        if (!kOperator.spell(name)) damaged(count.name() + " is not named like an operator");
        count.whole(0, kMostSize);
    }
    graph.at("unread_bytes").whole(0, kMostBytes);
    const std::int64_t parameters = raw.at("parameters").whole(1, kMostBytes);
    raw.at("active_parameters").whole(0, parameters);
    raw.at("weight_bytes").whole(0, kMostBytes);
}

// How weights are stored in whole numbers, with scales that the kernels read. The graph's operators
// have it as attributes.
void quantization(const Field &chosen, const std::string &scales) {
    const auto number_of = [](const Field &value, std::initializer_list<std::int64_t> known,
                              const char *expected) {
        const std::int64_t number = value.whole(0, 128);
        if (std::find(known.begin(), known.end(), number) == known.end()) value.refuse(expected);
    };
    chosen.only({"block", "symmetric", "accuracy", "method", "bits", "calibration", "blocks", "scales"});
    const auto block = [&](const Field &value) {
        number_of(value, {32, 64, 128}, "one of 32, 64, 128");
    };
    block(chosen.at("block"));
    chosen.at("symmetric").truth();
    chosen.at("accuracy").one_of({"exact", "fast"});
    chosen.at("method").one_of({"nearest", "importance", "gptq", "given"});
    const std::string found =
        chosen.has("scales") ? chosen.at("scales").one_of({"float32", "float16"}) : "float32";
    if (found != scales) {
        damaged("quantization has scales in " + found + ", and the kernels of this ingot read " + scales);
    }
    for (const auto &[name, bits] : chosen.at("bits").entries(kMostTensors)) {
        if (!kTensor.spell(name)) damaged(bits.name() + " is not named like a tensor");
        number_of(bits, {4, 8, 32}, "one of 4, 8, 32");
    }
    if (chosen.has("blocks")) {
        for (const auto &[name, size] : chosen.at("blocks").entries(kMostTensors)) {
            if (!kTensor.spell(name)) damaged(size.name() + " is not named like a tensor");
            block(size);
        }
    }
    if (chosen.has("calibration")) {
        const Field calibration = chosen.at("calibration");
        calibration.at("sha256").sha256();
        calibration.at("tokens").whole(1, kMostSize);
    }
}

Manifest manifest(const Field &raw) {
    Manifest result;
    raw.only({"model_type",    "task",
              "target",        "precision",
              "main_output",   "inputs",
              "outputs",       "states",
              "vocab_size",    "source",
              "generation",    "graph",
              "parameters",    "active_parameters",
              "weight_bytes",  "tools",
              "labels",        "engine",
              "files",         "validation",
              "schema_version", "weights",
              "quantization",  "kernels",
              "activations"});
    // Any architecture: the graph is all that a session knows of it.
    result.model_type = raw.at("model_type").matching(kPackage, "the name of an architecture");
    result.task = raw.at("task").one_of({"generate", "features", "classify"});
    result.target = raw.at("target").one_of({"onnx", "ort", "trt", "trt-rtx"});
    result.precision = raw.at("precision").one_of({"float32", "float16", "bfloat16"});
    // What matrices are stored in; the graph casts them, so a session need not know.
    bool in_numbers = false;
    if (raw.has("weights")) {
        const Field stored = raw.at("weights");
        const std::string said =
            stored.one_of({"checkpoint", "float16", "bfloat16", "int4", "int8"});
        in_numbers = said == "int4" || said == "int8";
        if (in_numbers && result.target != "ort") {
            stored.refuse("of floats, but for the target ort, and the target is " + result.target);
        }
        if (result.precision != "float32") {
            stored.refuse("left out, but for a precision of float32");
        }
    }
    if (raw.has("quantization") != in_numbers) {
        damaged("quantization goes with weights in whole numbers, each with the other");
    }
    if (raw.has("kernels")) {
        const Field kernels = raw.at("kernels");
        result.kernels = kernels.one_of({"portable", "ingot"});
        if (result.target != "ort") {
            kernels.refuse("left out, but for the target ort, and the target is " + result.target);
        }
        if (result.kernels == "portable" && in_numbers) {
            kernels.refuse("others, for standard operators read no weights in whole numbers");
        }
    }
    if (raw.has("activations")) {
        const Field activations = raw.at("activations");
        activations.one_of({"bfloat16"});
        const std::string stored = raw.has("weights") ? raw.at("weights").text() : "";
        if (result.kernels != "ingot" || (stored != "checkpoint" && stored != "bfloat16")) {
            activations.refuse("left out, but for kernels ingot and weights in bfloat16");
        }
    }
    if (in_numbers) {
        quantization(raw.at("quantization"), result.kernels == "ingot" ? "float16" : "float32");
    }
    result.main_output = tensor_name(raw.at("main_output"));
    result.inputs = tensors(raw.at("inputs"));
    result.outputs = tensors(raw.at("outputs"));
    for (const Field &value : raw.at("states").items(kMostTensors)) {
        result.states.push_back(state(value));
        // Caches of ONNX Runtime's kernels too, and every state of our own.
        const StateInfo &made = result.states.back();
        if (made.shared && (result.target != "ort" || (!made.axis && result.kernels != "ingot"))) {
            value.at("shared").refuse("false, but for what kernels of the target ort write in place");
        }
    }
    result.vocab_size = raw.at("vocab_size").whole(1, kMostSize);
    result.generation = generation(raw.at("generation"), result.vocab_size);
    for (const Field &label : raw.at("labels").items(1 << 20))
        result.labels.push_back(label.text());
    for (const auto &[name, version] : raw.at("tools").entries(256)) {
        if (!kPackage.spell(name)) damaged(version.name() + " is not named like a package");
        result.tools[name] = version.matching(kVersion, "a version");
    }
    for (const auto &[name, value] : raw.at("files").entries(kMostTensors)) {
        if (!is_relative_name(name))
            damaged(value.name() + " is not named like a file below the folder");
        value.only({"bytes", "sha256"});
        const auto bytes = static_cast<std::uint64_t>(value.at("bytes").whole(0, kMostBytes));
        result.files[name] = {bytes, value.at("sha256").sha256()};
    }
    if (!raw.at("engine").null()) {
        result.engine = engine(raw.at("engine"));
        if (result.target != "trt" && result.target != "trt-rtx") {
            damaged("engine is there and target is " + result.target + ", which has none");
        }
    }
    const Field validation = raw.at("validation");
    result.verdict = validation.has("verdict")
                         ? validation.at("verdict").one_of(
                               {"passed", "passed, in part", "failed", "skipped"})
                         : "skipped";
    check_notes(raw);
    check_tensors(result);
    check_names(result);
    check_listed(result);
    return result;
}

}  // namespace

bool is_relative_name(const std::string &name) {
    // No dot, hyphen or space where a part of it begins, no dot or space where one ends, and no
    // letter that is special on any system or to any shell.
    constexpr Letters kPart{"_", "_ .+@=,()-", 128, true};
    std::size_t parts = 0;
    for (std::size_t begin = 0; begin <= name.size(); ++parts) {
        const std::size_t end = std::min(name.find('/', begin), name.size());
        const std::string part = name.substr(begin, end - begin);
        if (!kPart.spell(part) || part.back() == '.' || part.back() == ' ') return false;
        begin = end + 1;
    }
    return parts <= 8 && name.size() <= 255;
}

Manifest parse_manifest(std::string_view text, const std::string &path) {
    try {
        const nlohmann::json held = parse_json(text);
        const Field raw(held, "");
        const std::int64_t version = raw.at("schema_version").whole(INT64_MIN, INT64_MAX);
        if (version != kSchemaVersion) {
            throw Error(path + " has schema version " + std::to_string(version) +
                        "; this library reads " + std::to_string(kSchemaVersion) +
                        ": export again, or use the version of Ingot that wrote it.");
        }
        return manifest(raw);
    } catch (const std::invalid_argument &error) {
        throw Error(path + " is damaged (" + error.what() + "); export again.");
    }
}

}  // namespace ingot
