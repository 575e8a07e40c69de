// Graphs that give other tensors than ingot.json says: refused before a byte of one is read.
#include <doctest/doctest.h>

#include "folder.hpp"
#include "graph.hpp"

namespace {

using ingot::Ids;
using nlohmann::json;

using Sizes = std::vector<std::int64_t>;

const char *const kAgree = "are not of one export: export again.";

// An ingot whose graph gives constants: logits of 512 for two rows of 40 tokens, and one state or
// none.
class WithGraph : public Copy {
  public:
    explicit WithGraph(const json &state = nullptr) : Copy("olmoe-ort") {
        edit([&](json &raw) {
            all_logits(raw);
            const std::string columns =
                state.is_null() || state["axis"].is_null() ? "sequence" : "total_sequence";
            raw["inputs"] = {
                {{"name", "input_ids"}, {"dtype", "int64"}, {"shape", {"batch", "sequence"}}},
                {{"name", "attention_mask"}, {"dtype", "int64"}, {"shape", {"batch", columns}}}};
            raw["outputs"] = json::array({raw["outputs"][0]});
            raw["states"] = json::array();
            if (state.is_null()) return;
            raw["states"].push_back(state);
            for (const std::string side : {"input", "output"}) {
                raw[side + "s"].push_back({{"name", state[side]},
                                           {"dtype", state["dtype"]},
                                           {"shape", state[side + "_shape"]}});
            }
        });
    }

    void set_graph(const std::vector<Constant> &outputs, const std::string &more = "") const {
        std::vector<std::pair<std::string, int>> inputs;
        const json raw = json::parse(text_of(path() / "ingot.json"));
        for (const json &input : raw["inputs"]) {
            const std::string dtype = input["dtype"];
            inputs.emplace_back(input["name"], dtype == "int64"     ? kInt64
                                               : dtype == "float32" ? kFloat
                                                                    : kHalf);
        }
        put("model.onnx", constants(inputs, outputs, more));
    }

    // The message of a call of two rows of 40 tokens, of everything that reads what it gives, and
    // of `generate`.
    std::vector<std::string> messages() const {
        const Ids ids(80, 3), mask(80, 1);
        const std::string stepped = refusal([&] {
            ingot::Session session(path());
            session.reset(2, 64);
            std::string failed;
            try {
                const ingot::View view = session.step(ids, mask, 2, 40);
                // To the end of what it says to be there.
                double sum = view.data[0];
                for (std::size_t n = 0; n < 2 * 40 * 512; ++n) sum += view.data[n];
                CHECK(sum == 0.0);
                for (const ingot::StateCopy &state : session.state()) {
                    for (const float value : state.values) CHECK(value == 0.0F);
                }
            } catch (const ingot::Error &error) {
                // The state is as the graph left it, so nothing goes on from it.
                CHECK(contains(refusal([&] { session.state(); }), "call reset first"));
                CHECK(
                    contains(refusal([&] { session.step(ids, mask, 2, 40); }), "call reset first"));
                throw;
            }
        });
        const std::string generated = refusal([&] {
            ingot::GenerateOptions options;
            options.max_new_tokens = 1;
            ingot::Session(path()).generate({Ids(40, 3), Ids(40, 3)}, options);
        });
        return {stepped, generated};
    }
};

json cache(bool shared) {
    return {{"kind", "key"},
            {"input", "past"},
            {"output", "present"},
            {"dtype", "float32"},
            {"input_shape", {"batch", 3, "past_sequence", 8}},
            {"output_shape", {"batch", 3, "total_sequence", 8}},
            {"axis", 2},
            {"shared", shared}};
}

json window() {
    json state = cache(false);
    state.update({{"kind", "conv"},
                  {"axis", nullptr},
                  {"input_shape", {"batch", 6, 3}},
                  {"output_shape", {"batch", 6, 3}}});
    return state;
}

}  // namespace

TEST_SUITE_BEGIN("outputs");

TEST_CASE("logits of another rank or of other sizes") {
    const WithGraph ingot;
    ingot.set_graph({{"logits", kFloat, {2, 40, 512}}});
    for (const std::string &message : ingot.messages()) CHECK(message == "");
    for (const Sizes &sizes :
         {Sizes{2, 2000000}, {2, 1, 2000000}, {2, 1, 512},     {2, 39, 512}, {2, 41, 512},
          {1, 40, 512},      {3, 40, 512},    {2, 40, 511},    {2, 40, 513}, {2, 40, 1},
          {2, 40, 0},        {2, 0, 512},     {0, 40, 512},    {40, 2, 512}, {80, 512},
          {40960},           {2, 40, 1, 512}, {2, 40, 512, 1}, {1},          {}}) {
        CAPTURE(sizes.size());
        ingot.set_graph({{"logits", kFloat, sizes}});
        for (const std::string &message : ingot.messages()) {
            CAPTURE(message);
            CHECK(contains(message, "logits came as float32 ["));
            CHECK(contains(
                message,
                "where float32 [2, 40, 512] was expected; the graph and ingot.json are not"));
        }
    }
}

TEST_CASE("logits of more or fewer tokens than were asked for") {
    const WithGraph ingot;
    ingot.edit([](json &raw) {
        raw["inputs"].push_back(
            {{"name", "logits_to_keep"}, {"dtype", "int64"}, {"shape", {1}}});
        raw["outputs"][0]["shape"][1] = "kept_sequence";
    });
    const auto message = [&](std::int64_t kept, std::int64_t made) {
        ingot.set_graph({{"logits", kFloat, {2, made, 512}}});
        return refusal([&] {
            const Ids ids(80, 3), mask(80, 1);
            ingot::Session session(ingot.path());
            session.reset(2, 40);
            const ingot::View view = session.step(ids, mask, 2, 40, kept);
            CHECK(view.shape == Sizes{2, made, 512});
        });
    };
    for (const std::int64_t kept : {1, 3}) {
        CHECK(message(kept, kept) == "");
        for (const std::int64_t made : {kept - 1, kept + 1, std::int64_t{40}}) {
            CHECK(contains(message(kept, made), kAgree));
        }
    }
}

TEST_CASE("logits of another type, or no tensor") {
    const WithGraph ingot;
    for (const int type : {kString, kInt64, kDouble, kHalf, kBrain}) {
        CAPTURE(type);
        ingot.set_graph({{"logits", type, {2, 40, 512}}});
        for (const std::string &message : ingot.messages())
            CHECK(contains(message, "another type or shape of logits"));
    }
    ingot.set_graph({{"logits", kFloat, {2, 40, 512}, true}});
    for (const std::string &message : ingot.messages())
        CHECK(contains(message, "logits is no tensor in the graph"));
}

TEST_CASE("half-precision logits are widened at the sizes that they have") {
    const WithGraph ingot;
    ingot.edit([](json &raw) { raw["outputs"][0]["dtype"] = "float16"; });
    ingot.set_graph({{"logits", kHalf, {2, 40, 512}}});
    for (const std::string &message : ingot.messages()) CHECK(message == "");
    for (const Sizes &sizes : {Sizes{2, 1, 512}, {2, 40, 0}, {2, 4000000}, {}}) {
        ingot.set_graph({{"logits", kHalf, sizes}});
        for (const std::string &message : ingot.messages())
            CHECK(contains(message, "logits came as float16 ["));
    }
    ingot.set_graph({{"logits", kFloat, {2, 40, 512}}});
    for (const std::string &message : ingot.messages()) CHECK(contains(message, kAgree));
}

TEST_CASE("the features and the classes of a graph") {
    const WithGraph ingot;
    const auto message = [&](const Sizes &sizes) {
        ingot.set_graph({{"logits", kFloat, sizes}});
        return refusal([&] {
            ingot::Session session(ingot.path());
            session.reset(2, 3);
            session.step(Ids(6, 1), Ids(6, 1), 2, 3);
        });
    };
    ingot.edit([](json &raw) {
        raw["task"] = "features";
        raw["outputs"][0]["shape"] = {"batch", "sequence", 64};
    });
    CHECK(message({2, 3, 64}) == "");
    for (const Sizes &sizes : {Sizes{2, 3, 63}, {2, 64}, {2, 1, 64}, {3, 2, 64}, {2, 3, 0}})
        CHECK(contains(message(sizes), kAgree));
    ingot.edit([](json &raw) {
        raw["task"] = "classify";
        raw["labels"] = {"no", "yes", "perhaps"};
        raw["outputs"][0]["shape"] = {"batch", 3};
    });
    CHECK(message({2, 3}) == "");
    for (const Sizes &sizes : {Sizes{2, 2}, {2, 4}, {3, 2}, {1, 3}, {6}, {2, 3, 1}, {2, 0}})
        CHECK(contains(message(sizes), kAgree));
}

TEST_CASE("states of another rank, size, axis or type") {
    for (const bool shared : {false, true}) {
        CAPTURE(shared);
        const WithGraph ingot(cache(shared));
        // A shared buffer has its capacity, and the rest the tokens so far.
        const std::int64_t length = shared ? 64 : 40;
        ingot.set_graph({{"logits", kFloat, {2, 40, 512}}, {"present", kFloat, {2, 3, length, 8}}});
        for (const std::string &message : ingot.messages()) {
            // `generate` has another capacity.
            if (!shared) CHECK(message == "");
        }
        for (const Sizes &sizes : {Sizes{2, 3, 39, 8},
                                   {2, 3, 42, 8},
                                   {2, 3, 1, 8},
                                   {2, 3, 0, 8},
                                   {2, 40, 3, 8},
                                   {3, 2, 40, 8},
                                   {1, 3, 40, 8},
                                   {2, 3, 40, 9},
                                   {2, 3, 40},
                                   {2, 960},
                                   {1},
                                   {}}) {
            ingot.set_graph({{"logits", kFloat, {2, 40, 512}}, {"present", kFloat, sizes}});
            for (const std::string &message : ingot.messages()) CHECK_FALSE(message.empty());
        }
        for (const int type : {kHalf, kDouble, kInt64, kString}) {
            ingot.set_graph(
                {{"logits", kFloat, {2, 40, 512}}, {"present", type, {2, 3, length, 8}}});
            for (const std::string &message : ingot.messages())
                CHECK(contains(message, "type or shape of present"));
        }
        ingot.set_graph(
            {{"logits", kFloat, {2, 40, 512}}, {"present", kFloat, {2, 3, 40, 8}, true}});
        for (const std::string &message : ingot.messages())
            CHECK(contains(message, "present is no tensor"));
    }
    const WithGraph fixed(window());
    fixed.set_graph({{"logits", kFloat, {2, 40, 512}}, {"present", kFloat, {2, 6, 3}}});
    for (const std::string &message : fixed.messages()) CHECK(message == "");
    for (const Sizes &sizes : {Sizes{2, 6, 4}, {2, 3, 6}, {1, 6, 3}, {2, 6, 0}, {2, 18}, {}}) {
        fixed.set_graph({{"logits", kFloat, {2, 40, 512}}, {"present", kFloat, sizes}});
        for (const std::string &message : fixed.messages())
            CHECK(contains(message, "present came as float32"));
    }
}

TEST_CASE("external data that nobody has listed, wherever in the graph") {
    const WithGraph ingot;
    write_text(ingot.path() / "w.bin", std::string(64, '\0'));
    const auto tensor = [](const std::string &location) {
        return field(1, 16) + field(2, kFloat) + field(8, "w") + field(14, 1) +
               field(13, field(1, "location") + field(2, location));
    };
    const auto message = [&](const std::string &more) {
        ingot.set_graph({{"logits", kFloat, {2, 40, 512}}}, more);
        return refusal(ingot.path());
    };
    const auto in_a_node = [](const std::string &attribute) {
        return field(1, field(4, "If") + field(5, attribute));
    };
    const std::string w = tensor("w.bin");
    std::string deep = field(5, w);
    for (int n = 0; n < 20; ++n) deep = in_a_node(field(6, deep));
    for (const std::string &more :
         {field(5, w), field(15, field(1, w)), field(15, field(2, w)), in_a_node(field(5, w)),
          in_a_node(field(10, w)), in_a_node(field(6, field(5, w))),
          in_a_node(field(11, field(5, w))), in_a_node(field(22, field(1, w))),
          in_a_node(field(23, field(2, w))), deep,
          // A tensor in two parts, which are one to protobuf.
          in_a_node(field(5, field(13, field(1, "location") + field(2, "w.bin"))) +
                    field(5, field(14, 1)))}) {
        CHECK(
            contains(message(more), "model.onnx reads \"w.bin\", which ingot.json does not list"));
    }
    for (const char *location : {"", "../w.bin", "/etc/passwd", "./w.bin", "W.BIN", "a\x1b[2J\n"}) {
        CAPTURE(location);
        const std::string found = message(field(5, tensor(location)));
        CHECK(contains(found, "which ingot.json does not list"));
        CHECK(found.find('\x1b') == std::string::npos);
    }
    // What follows the location under its key, of another kind than text, changes nothing.
    CHECK(contains(
        message(field(5, field(8, "w") + field(13, field(1, "location") + field(2, "w.bin") +
                                                       field(1, 5) + field(2, 5)))),
        "reads \"w.bin\""));
    ingot.put("w.bin", std::string(64, '\0'));
    CHECK(message(field(5, w)) == "");

    for (int n = 0; n < 5000; ++n) deep = in_a_node(field(6, deep));
    for (const std::string &more : {deep, field(1, "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
                                    std::string("\x0b"), field(5, std::string(1, '\x0a'))}) {
        CHECK(contains(message(more), "model.onnx is no ONNX graph ("));
    }
}

TEST_SUITE_END();
