// Engines, over stand-ins for TensorRT and CUDA (fake/): what is checked before one is read, and what it
// is fed. What TensorRT itself computes needs a GPU.
#include <doctest/doctest.h>

#include "folder.hpp"

namespace {

using nlohmann::json;

// An ingot with an engine as an export would make it for the stand-ins.
class WithEngine : public Copy {
  public:
    WithEngine() : Copy("olmoe-ort") {
        put("model.engine", "code");
        put("libingot_trt.so", "more code");
        edit([](json &raw) {
            all_logits(raw);
            raw["target"] = "trt";
            raw["engine"] = {{"builder", "tensorrt"},
                             {"version", INGOT_FAKE_VERSION},
                             {"compute_capabilities", {80, 90}},
                             {"graph_sha256", raw["files"]["model.onnx"]["sha256"]},
                             {"plugins", {{"MoeDispatch", 2}}},
                             {"libraries", {"libingot_trt.so"}},
                             {"embedded", true},
                             {"profiles", json::array({{{"name", "prefill"}, {"shapes", {}}}})}};
            const json sizes = {{1, 1}, {1, 8}, {2, 16}};
            raw["engine"]["profiles"][0]["shapes"] = {{"input_ids", sizes}};
            for (json &state : raw["states"]) state["shared"] = false;
        });
    }

    std::string refused_with(const char *key, const json &value) const {
        edit([&](json &raw) { raw["engine"][key] = value; });
        return refusal(path());
    }

    // An engine that the stand-in reads, whose only states are those given.
    void stand_in(const std::vector<json> &states, const std::string &recipe = "a recipe") const {
        put("model.engine", recipe);
        edit([&](json &raw) {
            raw["engine"]["embedded"] = false;
            raw["engine"]["profiles"].push_back(raw["engine"]["profiles"][0]);
            const json model = raw["states"][0], all = raw["inputs"];
            raw["states"] = raw["inputs"] = json::array();
            for (const json &input : all) {
                if (input["dtype"] == "int64") raw["inputs"].push_back(input);
            }
            raw["outputs"] = json::array({raw["outputs"][0]});
            for (const json &changes : states) {
                json state = model;
                state.update(changes);
                raw["states"].push_back(state);
                for (const std::string side : {"input", "output"}) {
                    raw[side + "s"].push_back({{"name", state[side]},
                                               {"dtype", state["dtype"]},
                                               {"shape", state[side + "_shape"]}});
                }
            }
        });
    }
};

const json kPast = {{"input", "past"},
                    {"output", "present"},
                    {"shared", false},
                    {"input_shape", {"batch", 1, "past_sequence", 1}},
                    {"output_shape", {"batch", 1, "total_sequence", 1}}};
const json kSum = {{"kind", "ssm"},
                   {"input", "sum_before"},
                   {"output", "sum_after"},
                   {"shared", false},
                   {"axis", nullptr},
                   {"input_shape", {"batch", 1}},
                   {"output_shape", {"batch", 1}}};

}  // namespace

TEST_SUITE_BEGIN("tensorrt");

TEST_CASE("another builder, version or device") {
    CHECK(contains(WithEngine().refused_with("builder", "tensorrt-rtx"), "is of tensorrt-rtx and this"));
    CHECK(contains(WithEngine().refused_with("version", "9.0.0.1"),
                   std::string("was built by tensorrt 9.0.0.1 and ") + INGOT_FAKE_VERSION +
                       " is installed; an engine runs on the version that built it"));
    CHECK(contains(WithEngine().refused_with("compute_capabilities", {80, 120}),
                   "was built for compute capability 8.0, 12.0 and this GPU has 9.0"));
}

TEST_CASE("an engine that cannot run outside of Python, or is of another graph") {
    const WithEngine ingot;
    ingot.edit([](json &raw) {
        raw["engine"]["libraries"] = json::array();
        raw["files"].erase("libingot_trt.so");
        raw["engine"]["embedded"] = false;
    });
    CHECK(contains(refusal(ingot.path()), "was built without libingot_trt.so"));
    CHECK(contains(WithEngine().refused_with("graph_sha256", std::string(64, '0')),
                   "an engine of another model.onnx"));
    CHECK(contains(WithEngine().refused_with("profiles", json::array()),
                   "engine.profiles is a list of 0"));
    for (const char *name : {"../evil.so", "/evil.so", "below/evil.so", "evil.so;", "..", ""}) {
        CAPTURE(name);
        const std::string message = WithEngine().refused_with("libraries", {name});
        CHECK(contains(message, "engine.libraries[0] is \""));
        CHECK(contains(message, "and must be a file of the folder"));
    }
    CHECK(contains(WithEngine().refused_with("libraries", {"libingot_trt.so", "other.so"}),
                   "files lacks other.so"));
    // A program that no engine asks for.
    CHECK(contains(WithEngine().refused_with("libraries", json::array()),
                   "libingot_trt.so, which is a program"));
}

TEST_CASE("changed code is not loaded, whether or not hashes are asked for") {
    for (const char *name : {"model.engine", "libingot_trt.so"}) {
        const WithEngine ingot;
        std::string text = text_of(ingot.path() / name);
        text[0] = 'C';
        write_text(ingot.path() / name, text);
        ingot::Options sizes_only;
        sizes_only.verify = false;
        const std::string message = refusal(ingot.path(), sizes_only);
        CHECK(contains(message, name));
        CHECK(contains(message, "an engine is code, so it is not loaded"));
    }
}

TEST_CASE("an engine that TensorRT cannot read, or that is left alone") {
    const WithEngine ingot;
    const std::string message = refusal(ingot.path());
    CHECK(contains(message, "model.engine cannot be read (TensorRT: no message)"));
    ingot::Options graph_only;
    graph_only.graph_only = true;
    CHECK(refusal(ingot.path(), graph_only).empty());
}

TEST_CASE("an engine is fed each call's shapes, and its states in turn") {
    const WithEngine ingot;
    ingot.stand_in({kPast});
    ingot::Session session(ingot.path());
    CHECK(contains(refusal([&] { session.reset(3, 1); }), "more than this engine was built for (2 of 16)"));
    CHECK(contains(refusal([&] { session.reset(1, 17); }), "export with a larger --max-batch or --max-seq"));

    const std::vector<ingot::Ids> prompts = {{5, 400, 17, 9}, {33, 2}};
    ingot::GenerateOptions options;
    options.max_new_tokens = 12;
    const std::vector<ingot::Ids> rows = session.generate(prompts, options);
    // Beside it runs a fork, with states of its own over the same engine.
    ingot::Session fork = session.fork();
    CHECK(fork.generate({prompts[0]}, options)[0] == rows[0]);
    std::vector<float> states;
    for (std::size_t row = 0; row < prompts.size(); ++row) {
        // The stand-in's recipe, by its definition.
        ingot::Ids sequence = prompts[row];
        const auto padding = static_cast<std::int64_t>(4 - sequence.size());
        std::int64_t sum = 0;
        states.insert(states.end(), static_cast<std::size_t>(padding), 1.0F);
        for (std::size_t n = 0; n < 12 + prompts[row].size() - 1; ++n) {
            const std::int64_t value = sequence[n] + 1000 * static_cast<std::int64_t>(n);
            states.push_back(static_cast<float>(value));
            sum += value;
            if (n + 1 < prompts[row].size()) continue;
            sequence.push_back((sum + 7 * (padding + static_cast<std::int64_t>(n) + 1)) % 512);
        }
        CHECK(rows[row] ==
              ingot::Ids(sequence.begin() + static_cast<std::ptrdiff_t>(prompts[row].size()),
                         sequence.end()));
    }
    const std::vector<ingot::StateCopy> found = session.state();
    REQUIRE(found.size() == 1);
    CHECK(found[0].shape == ingot::Ids{2, 1, 15, 1});
    CHECK(found[0].values == states);
}

TEST_CASE("an engine whose tensors are others than the manifest's is not run") {
    const auto message = [](const char *recipe, const json &past) {
        const WithEngine ingot;
        ingot.stand_in({past}, recipe);
        return refusal([&] {
            ingot::Session session(ingot.path());
            session.reset(2, 8);
            session.step(ingot::Ids{5, 400, 1, 2}, ingot::Ids{1, 1, 1, 1}, 2, 2);
        });
    };
    CHECK(message("a recipe", kPast).empty());
    CHECK(contains(message("a recipe of halves", kPast),
                   "the engine has past of another type than float32"));
    CHECK(contains(message("a recipe of fewer", kPast),
                   "the engine has logits of another shape than [2, 2, 512]"));
    json wide = kPast, unknown = kPast;
    wide["input_shape"] = {"batch", 2, "past_sequence", 1};
    wide["output_shape"] = {"batch", 2, "total_sequence", 1};
    CHECK(contains(message("a recipe", wide),
                   "the engine has present of another shape than [2, 2, 2, 1]"));
    unknown["output"] = "future";
    CHECK(
        contains(message("a recipe", unknown), "the engine has no future, which ingot.json names"));
}

TEST_CASE("a state of fixed size is zero after a reset, in either turn") {
    const WithEngine ingot;
    ingot.stand_in({kPast, kSum});
    ingot::Session session(ingot.path());
    for (const std::size_t calls : {1, 2, 3}) {
        session.reset(2, 8);
        CHECK(session.state()[1].values == std::vector<float>{0, 0});
        for (std::size_t n = 0; n < calls; ++n) session.step(ingot::Ids{5, 400}, ingot::Ids{1, 1}, 2, 1);
        const auto times = static_cast<float>(calls);
        CHECK(session.state()[1].values == std::vector<float>{5 * times, 400 * times});
    }
}

TEST_SUITE_END();

// Run with a broken file in place of one stand-in.
TEST_SUITE_BEGIN("no_tensorrt");

TEST_CASE("a machine without TensorRT") {
    CHECK(contains(refusal(WithEngine().path()), "cannot be opened; install TensorRT"));
}

TEST_SUITE_END();

TEST_SUITE_BEGIN("no_driver");

TEST_CASE("a machine without a GPU") {
    CHECK(contains(refusal(WithEngine().path()), "has no NVIDIA driver (libcuda.so.1); run an ort ingot"));
}

TEST_SUITE_END();
