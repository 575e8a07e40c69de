#include "graph.hpp"

namespace {

std::string varint(std::uint64_t value) {
    std::string result;
    for (; value >= 0x80; value >>= 7) result += static_cast<char>(0x80 | (value & 0x7f));
    return result + static_cast<char>(value);
}

// ValueInfoProto, without a shape.
std::string value_info(const std::string &name, int type, bool sequence) {
    const std::string tensor = field(1, field(1, static_cast<std::int64_t>(type)));
    return field(1, name) + field(2, sequence ? field(4, field(1, tensor)) : tensor);
}

std::string node(const std::string &op, const std::vector<std::string> &inputs,
                 const std::string &output, const std::string &attribute = "") {
    std::string all;
    for (const std::string &input : inputs) all += field(1, input);
    return field(
        1, all + field(2, output) + field(4, op) + (attribute.empty() ? "" : field(5, attribute)));
}

// TensorProto of int64 [N], an initializer.
std::string numbers(const std::string &name, const std::vector<std::int64_t> &values) {
    std::string all;
    for (const std::int64_t value : values) all += field(7, value);
    return field(5, field(1, static_cast<std::int64_t>(values.size())) + field(2, kInt64) + all +
                        field(8, name));
}

// AttributeProto `value`, a tensor.
std::string value_of(const std::string &tensor) {
    return field(1, "value") + field(5, tensor) + field(20, 4);
}

std::size_t width_of(int type) {
    return type == kFloat ? 4 : type == kHalf || type == kBrain ? 2 : 8;
}

}  // namespace

std::string field(int number, std::int64_t value) {
    return varint(static_cast<std::uint64_t>(number) << 3) +
           varint(static_cast<std::uint64_t>(value));
}

std::string field(int number, const std::string &bytes) {
    return varint((static_cast<std::uint64_t>(number) << 3) | 2) + varint(bytes.size()) + bytes;
}

std::string constants(const std::vector<std::pair<std::string, int>> &inputs,
                      const std::vector<Constant> &outputs, const std::string &more) {
    std::string graph = numbers("zero", {0}) + numbers("one", {1}) +
                        node("Size", {"input_ids"}, "size") +
                        node("Reshape", {"size", "one"}, "count");
    for (const Constant &output : outputs) {
        const std::string &name = output.name, made = output.sequence ? name + ".one" : name;
        std::int64_t count = 1;
        for (const std::int64_t size : output.sizes) count *= size;
        if (output.type == kString) {
            std::string tensor = field(2, kString);
            for (const std::int64_t size : output.sizes) tensor += field(1, size);
            for (std::int64_t n = 0; n < count; ++n) tensor += field(6, "x");
            graph += node("Constant", {}, made, value_of(tensor));
        } else {
            const std::string zero(width_of(output.type), '\0');
            const std::string shape = name + ".shape";
            // As many sizes as there are token ids, at most: so ONNX Runtime cannot know the shape
            // before.
            graph += node("Slice", {shape, "zero", "count"}, shape + ".used");
            graph += node("ConstantOfShape", {shape + ".used"}, made,
                          value_of(field(1, 1) + field(2, output.type) + field(9, zero)));
            graph += numbers(shape, output.sizes);
        }
        if (output.sequence) graph += node("SequenceConstruct", {made}, name);
        graph += field(12, value_info(name, output.type, output.sequence));
    }
    for (const auto &[name, type] : inputs) graph += field(11, value_info(name, type, false));
    return field(1, 8) + field(8, field(2, 17)) + field(7, graph + field(2, "constants") + more);
}
