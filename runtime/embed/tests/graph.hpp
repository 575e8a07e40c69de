// Graphs by hand, which give constants whatever they are fed: an export makes none that is wrong.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

// ONNX's numbers of element types.
constexpr int kFloat = 1, kInt64 = 7, kString = 8, kDouble = 11, kHalf = 10, kBrain = 16;

// One field of a protobuf message: a number, or bytes (text and messages).
std::string field(int number, std::int64_t value);
std::string field(int number, const std::string &bytes);

struct Constant {
    std::string name;
    int type;
    std::vector<std::int64_t> sizes;
    // Given as a list of one tensor.
    bool sequence = false;
};

// A model with inputs of any shape, input_ids among them, and outputs that declare no shape. `more`
// are further fields of its graph.
std::string constants(const std::vector<std::pair<std::string, int>> &inputs,
                      const std::vector<Constant> &outputs, const std::string &more = "");
