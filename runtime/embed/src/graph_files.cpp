// ONNX is protobuf, of which this reads the few fields on the way to external data, in onnx.proto's
// names and numbers. A message that is given in parts is one message to protobuf, so every part of
// one is read.
#include "graph_files.hpp"

#include <cstdint>
#include <stdexcept>
#include <vector>

namespace ingot {
namespace {

// Protobuf's own limit of messages within each other.
constexpr std::size_t kMostNested = 100;

[[noreturn]] void broken(const std::string &what) { throw std::invalid_argument(what); }

enum class Message {
    model,
    graph,
    node,
    attribute,
    tensor,
    sparse_tensor,
    function,
    training,
    entry
};

// Which message a field of another one is.
struct Part {
    Message of;
    std::uint64_t field;
    Message is;
};

constexpr Part kParts[] = {
    {Message::model, 7, Message::graph},               // graph
    {Message::model, 20, Message::training},           // training_info
    {Message::model, 25, Message::function},           // functions
    {Message::training, 1, Message::graph},            // initialization
    {Message::training, 2, Message::graph},            // algorithm
    {Message::function, 7, Message::node},             // node
    {Message::function, 11, Message::attribute},       // attribute_proto
    {Message::graph, 1, Message::node},                // node
    {Message::graph, 5, Message::tensor},              // initializer
    {Message::graph, 15, Message::sparse_tensor},      // sparse_initializer
    {Message::node, 5, Message::attribute},            // attribute
    {Message::attribute, 5, Message::tensor},          // t
    {Message::attribute, 6, Message::graph},           // g
    {Message::attribute, 10, Message::tensor},         // tensors
    {Message::attribute, 11, Message::graph},          // graphs
    {Message::attribute, 22, Message::sparse_tensor},  // sparse_tensor
    {Message::attribute, 23, Message::sparse_tensor},  // sparse_tensors
    {Message::sparse_tensor, 1, Message::tensor},      // values
    {Message::sparse_tensor, 2, Message::tensor},      // indices
    {Message::tensor, 13, Message::entry},             // external_data
};

// The bytes of one message, taken from the front.
class Wire {
  public:
    explicit Wire(std::string_view bytes) : bytes_(bytes) {}

    bool ended() const { return bytes_.empty(); }

    std::uint64_t varint() {
        std::uint64_t result = 0;
        for (unsigned shift = 0; shift < 70; shift += 7) {
            const auto byte = static_cast<unsigned char>(take(1)[0]);
            if (shift < 64) result |= static_cast<std::uint64_t>(byte & 0x7f) << shift;
            if (byte < 0x80) return result;
        }
        broken("it has a number of more than ten bytes");
    }

    std::string_view take(std::uint64_t count) {
        if (count > bytes_.size()) broken("it is cut short");
        const std::string_view result = bytes_.substr(0, static_cast<std::size_t>(count));
        bytes_.remove_prefix(static_cast<std::size_t>(count));
        return result;
    }

    // The number of the field that comes next where it holds bytes or a message, and those; 0 of
    // another.
    std::uint64_t field(std::string_view &held) {
        // Protobuf's tags have 32 bits, and what is above is dropped.
        const auto tag = static_cast<std::uint32_t>(varint());
        switch (tag & 7) {
            case 0: varint(); return 0;
            case 1: take(8); return 0;
            case 2: held = take(varint()); return tag >> 3;
            case 5: take(4); return 0;
            // Groups, which ONNX has none of.
            default: broken("it has a field of another kind than ONNX has");
        }
    }

  private:
    std::string_view bytes_;
};

// What an entry says under the key "location". Of a field that stands there twice protobuf takes
// the last.
void read_entry(std::string_view bytes, std::set<std::string> &found) {
    std::string_view key, value, held;
    for (Wire wire(bytes); !wire.ended();) {
        const std::uint64_t field = wire.field(held);
        if (field == 1) key = held;
        if (field == 2) value = held;
    }
    if (key == "location") found.emplace(value);
}

}  // namespace

std::set<std::string> external_files(std::string_view model) {
    struct Open {
        Message is;
        Wire wire;
    };
    std::set<std::string> found;
    // The messages that are being read, each inside of the one before: no recursion, since the
    // graph says how deep it is.
    std::vector<Open> open{{Message::model, Wire(model)}};
    while (!open.empty()) {
        if (open.back().wire.ended()) {
            open.pop_back();
            continue;
        }
        const Message inside = open.back().is;
        std::string_view held;
        const std::uint64_t field = open.back().wire.field(held);
        for (const Part &part : kParts) {
            if (part.of != inside || part.field != field) continue;
            if (part.is == Message::entry) {
                read_entry(held, found);
            } else if (open.size() > kMostNested) {
                broken("it is nested more than " + std::to_string(kMostNested) + " deep");
            } else {
                open.push_back({part.is, Wire(held)});
            }
        }
    }
    return found;
}

}  // namespace ingot
