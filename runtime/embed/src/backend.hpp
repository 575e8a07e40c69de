// What a session asks of the runtime that computes the graph.
#pragma once

#include <ingot/session.hpp>

#include <memory>

#include "tokens.hpp"

namespace ingot {

class Backend {
  public:
    virtual ~Backend() = default;

    // Another one over the same weights, without states; `reset` it first.
    virtual std::unique_ptr<Backend> fork() const = 0;

    // Zero states for `batch` sequences with room for `capacity` tokens.
    virtual void reset(std::int64_t batch, std::int64_t capacity) = 0;

    // Runs the graph and replaces the states. Returns the main output, valid until the next call: of
    // the last tokens that are wanted where the graph asks for them, else of all.
    virtual View run(const Feeds &feeds) = 0;

    // A copy of every state, cut to `seen` tokens.
    virtual std::vector<StateCopy> state(std::int64_t seen) const = 0;

    // Whether it refuses several rows of several tokens after a past; then they are fed one by one.
    virtual bool one_by_one() const { return false; }
};

// The library of kernels that a graph needs beside ONNX Runtime, as an absolute path; empty where it
// needs none. `named` is the one that the caller vouches for.
//
// Throws Error: none is named, or one that is not what the ingot was made with.
std::filesystem::path operators_for(const std::filesystem::path &folder, const Manifest &manifest,
                                    const std::filesystem::path &named);

// `operators` is loaded before the graph, where it is not empty.
std::unique_ptr<Backend> open_onnxruntime(const std::filesystem::path &folder,
                                          const Manifest &manifest, int threads,
                                          const std::filesystem::path &operators);

// `hashed` says that the folder's files were found to be the manifest's just before.
std::unique_ptr<Backend> open_tensorrt(const std::filesystem::path &folder, const Manifest &manifest,
                                       bool hashed);

// The sizes of a state's input at a length of the past.
std::vector<std::int64_t> state_shape(const StateInfo &state, std::int64_t batch,
                                      std::int64_t length);

// Whether a graph takes the number of the last tokens whose logits are wanted.
bool asks_for_last(const Manifest &manifest);

// Whether several rows of several tokens after a past are fed a token at a time: ONNX Runtime's
// GroupQueryAttention, which appends to shared buffers, refuses them.
bool by_token(const Manifest &manifest);

// The output that a call returns, and its sizes for a call.
const TensorInfo &main_output(const Manifest &manifest);
std::vector<std::int64_t> main_shape(const TensorInfo &main, const Feeds &feeds);

// A shape as messages have it, such as [2, 1, 512].
std::string sizes_of(const std::vector<std::int64_t> &shape);

// The elements of a shape. Throws Error where that is more than memory can hold.
std::size_t elements(const std::vector<std::int64_t> &shape);

}  // namespace ingot
