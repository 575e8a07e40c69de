// ingot.json, schema version 1: what a session must know of an ingot.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "api.h"

namespace ingot {

constexpr std::int64_t kSchemaVersion = 1;
constexpr const char *kManifest = "ingot.json";
constexpr const char *kGraph = "model.onnx";
constexpr const char *kEngine = "model.engine";
// Ingot's own kernels, in an ingot that runs on them.
constexpr const char *kOperators = "libingot_ort.so";
// The input [1] by which a call asks a graph for the logits of its last tokens alone; 0 is for all.
constexpr const char *kLogitsToKeep = "logits_to_keep";

// One dimension: a size, or a name such as "batch" where the size is not fixed.
struct Dimension {
    std::int64_t size = -1;
    std::string name;

    bool fixed() const { return name.empty(); }
};

struct TensorInfo {
    std::string name;
    std::string dtype;
    std::vector<Dimension> shape;
};

// One state: the graph input it enters by and the output that replaces it.
struct StateInfo {
    std::string kind;  // key, value, conv or ssm
    std::string input;
    std::string output;
    std::string dtype;
    std::vector<Dimension> input_shape;  // named sizes are "batch" and "past_sequence" alone
    // The axis that grows by the new tokens of each call, if any.
    std::optional<std::size_t> axis;
    // Whether input and output may be one buffer: of fixed capacity along `axis`, where there is one.
    bool shared = false;
};

// One optimisation profile of an engine: input name -> its least, usual and largest shape.
struct ProfileInfo {
    struct Range {
        std::vector<std::int64_t> least, usual, most;
    };
    std::map<std::string, Range> shapes;
};

// What a TensorRT engine was built by and for.
struct EngineInfo {
    std::string builder;  // tensorrt or tensorrt-rtx
    std::string version;
    std::vector<std::int64_t> compute_capabilities;  // major times ten plus minor
    std::string graph_sha256;
    std::map<std::string, std::int64_t> plugins;  // nodes by operator
    std::vector<std::string> libraries;           // of the folder, needed by the engine
    bool embedded = false;                        // the engine file holds its plugins itself
    std::vector<ProfileInfo> profiles;
};

struct FileInfo {
    std::uint64_t bytes = 0;
    std::string sha256;
};

struct Generation {
    std::vector<std::int64_t> eos_token_ids;
    std::int64_t pad_token_id = 0;
    std::optional<std::int64_t> context_length;  // none where the state has a fixed size
    // Pieces of a prompt of more tokens do not compute what the whole does; none for most models.
    std::optional<std::int64_t> switch_length;
};

struct INGOT_API Manifest {
    std::string model_type;
    std::string task;    // generate, features or classify
    std::string target;  // onnx, ort, trt or trt-rtx
    std::string precision;
    std::string main_output;
    std::vector<TensorInfo> inputs;
    std::vector<TensorInfo> outputs;
    std::vector<StateInfo> states;
    std::int64_t vocab_size = 0;
    Generation generation;
    std::vector<std::string> labels;  // of a classifier's classes
    std::map<std::string, std::string> tools;
    std::optional<EngineInfo> engine;
    std::map<std::string, FileInfo> files;
    std::string verdict;  // "passed", "passed, in part", "failed" or "skipped"
    std::string kernels;  // that run an ort ingot: portable or ingot; ONNX Runtime's where it is empty

    // Reads and checks ingot.json. Throws Error: no manifest, a damaged one, another schema version.
    static Manifest read(const std::filesystem::path &folder);

    // Proves that the folder holds the files described here; `hashes` compares SHA-256 too, not only
    // sizes. Throws Error naming the first file that is missing or changed.
    void check_files(const std::filesystem::path &folder, bool hashes = true) const;
};

// SHA-256 of a file in hexadecimal. Throws Error where it cannot be read.
INGOT_API std::string sha256(const std::filesystem::path &file);

}  // namespace ingot
