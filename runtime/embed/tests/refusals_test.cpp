// Folders that are not to be run: each is refused with one sentence that says why.
#include <doctest/doctest.h>

#include "folder.hpp"

namespace {

namespace fs = std::filesystem;
using nlohmann::json;

void set_verdict(json &raw) { raw["validation"]["verdict"] = "failed"; }

// One sentence for a person: it names what to do after a semicolon or comma, and ends in a full stop.
bool is_sentence(const std::string &text) {
    return text.size() > 20 && text.back() == '.' && text.find('\n') == std::string::npos;
}

// Every value of a document, by its path.
void each_path(const json &value, const json::json_pointer &at,
               const std::function<void(const json::json_pointer &)> &visit) {
    if (!at.empty()) visit(at);
    if (value.is_object()) {
        for (const auto &[name, inner] : value.items()) each_path(inner, at / name, visit);
    } else if (value.is_array()) {
        for (std::size_t n = 0; n < value.size(); ++n) each_path(value[n], at / n, visit);
    }
}

}  // namespace

TEST_SUITE_BEGIN("refusals");

TEST_CASE("a folder that is missing or is no ingot") {
    const std::string missing = refusal(fs::path("/nowhere/at/all"));
    CHECK(contains(missing, "/nowhere/at/all is not an ingot: it has no ingot.json"));
    CHECK(is_sentence(missing));
    CHECK(contains(refusal(fs::temp_directory_path()), "is not an ingot"));
    CHECK(contains(refusal(fs::path()), "is not an ingot"));
}

TEST_CASE("an ingot as it was made is opened") {
    for (const char *name : {"olmoe-ort", "olmoe-onnx", "mamba2-ort", "olmoe-features"}) {
        CAPTURE(name);
        CHECK(refusal(tiny(name)).empty());
    }
}

TEST_CASE("a manifest that is cut short, wherever") {
    const Copy copy("olmoe-ort");
    const std::string whole = text_of(copy.path() / "ingot.json");
    // But for the last line break, every shorter text is damaged.
    for (std::size_t size = 0; size + 2 < whole.size(); size += 97) {
        write_text(copy.path() / "ingot.json", whole.substr(0, size));
        const std::string message = refusal(copy.path());
        CHECK(contains(message, "ingot.json is damaged ("));
        CHECK(contains(message, "export again"));
    }
    for (const char *text : {"[]", "null", "3", "\xff\xfe", "{\"schema_version\": 1}"}) {
        write_text(copy.path() / "ingot.json", text);
        CHECK(contains(refusal(copy.path()), "is damaged ("));
    }
}

TEST_CASE("another schema version") {
    const Copy copy("olmoe-ort");
    copy.edit([](json &raw) { raw["schema_version"] = 2; });
    const std::string message = refusal(copy.path());
    CHECK(contains(message, "has schema version 2; this library reads 1: export again"));
    CHECK(is_sentence(message));
    copy.edit([](json &raw) { raw["schema_version"] = "1"; });
    CHECK(contains(refusal(copy.path()), "schema_version is \"1\""));
}

TEST_CASE("whatever stands in the manifest, it is read or refused") {
    const json raw = json::parse(text_of(tiny("olmoe-ort") / "ingot.json"));
    const Copy copy("olmoe-ort");
    const std::vector<json> wrong = {nullptr, -1, 1.5, 18446744073709551615u, "x", "", true,
                                     json::array(), json::object(), json::array({nullptr})};
    int refused = 0, read = 0;
    each_path(raw, json::json_pointer(), [&](const json::json_pointer &at) {
        for (const json &value : wrong) {
            json changed = raw;
            changed[at] = value;
            write_text(copy.path() / "ingot.json", changed.dump());
            CAPTURE(at.to_string());
            CAPTURE(value.dump());
            try {
                ingot::Manifest::read(copy.path()).check_files(copy.path(), false);
                ++read;
            } catch (const ingot::Error &error) {
                CHECK(is_sentence(error.what()));
                ++refused;
            }
        }
    });
    // Tool versions, operator counts and figures are of no use to a session.
    CHECK(refused > 500);
    CHECK(read > 100);
}

TEST_CASE("states whose shapes make no sense") {
    const Copy copy("olmoe-ort");
    copy.edit([](json &raw) { raw["states"][0]["axis"] = 4; });
    CHECK(contains(refusal(copy.path()), "is damaged (the axis of past_key_values.0.key)"));
    copy.edit([](json &raw) { raw["states"][0]["axis"] = nullptr; });
    CHECK(contains(refusal(copy.path()), "is shared and does not grow"));
    copy.edit([](json &raw) {
        raw["states"][0]["axis"] = 2;
        raw["states"][0]["input_shape"][1] = "heads";
    });
    CHECK(contains(refusal(copy.path()), "has a size named heads"));
}

TEST_CASE("a file that is missing, of another size or of another hash") {
    const Copy copy("olmoe-ort");
    const fs::path weights = copy.path() / "weights.safetensors";
    const std::string text = text_of(weights);
    std::string flipped = text;
    flipped[flipped.size() / 2] = static_cast<char>(flipped[flipped.size() / 2] ^ 1);

    write_text(weights, flipped);
    const std::string message = refusal(copy.path());
    CHECK(contains(message, "is not the file that was validated (its SHA-256 differs from ingot.json)"));
    CHECK(is_sentence(message));
    ingot::Options sizes_only;
    sizes_only.verify = false;
    CHECK(refusal(copy.path(), sizes_only).empty());

    write_text(weights, text + "x");
    CHECK(contains(refusal(copy.path(), sizes_only), "(its size differs from ingot.json)"));
    fs::remove(weights);
    CHECK(contains(refusal(copy.path()), "is incomplete: weights.safetensors is missing"));
    fs::create_directory(weights);
    CHECK(contains(refusal(copy.path()), "weights.safetensors is missing"));
}

TEST_CASE("a graph that the manifest does not list") {
    const Copy copy("olmoe-ort");
    copy.edit([](json &raw) { raw["files"].erase("model.onnx"); });
    CHECK(contains(refusal(copy.path()), "files lacks model.onnx"));
}

TEST_CASE("an ingot that failed its validation") {
    const Copy copy("olmoe-ort");
    copy.edit(set_verdict);
    const std::string message = refusal(copy.path());
    CHECK(contains(message, "failed its validation, so its numbers are wrong"));
    CHECK(is_sentence(message));
    ingot::Options allowed;
    allowed.allow_failed = true;
    CHECK(refusal(copy.path(), allowed).empty());
}

TEST_CASE("a target or a precision that does not run here") {
    const Copy copy("olmoe-ort");
    copy.edit([](json &raw) { raw["precision"] = "bfloat16"; });
    CHECK(contains(refusal(copy.path()), "holds a bfloat16 graph and no engine"));
    copy.edit([](json &raw) { raw["target"] = "npu"; });
    CHECK(contains(refusal(copy.path()), "is for npu; this version runs onnx, ort, trt, trt-rtx"));
    copy.edit([](json &raw) {
        raw["target"] = "ort";
        raw["precision"] = "float32";
        raw["states"][0]["dtype"] = "bfloat16";
    });
    CHECK(contains(refusal(copy.path()), "past_key_values.0.key is bfloat16"));
}

#ifndef INGOT_FAKE_VERSION
TEST_CASE("an engine, where the library was built without TensorRT") {
    const Copy copy("olmoe-ort");
    copy.put("model.engine", "code");
    copy.edit([](json &raw) {
        raw["target"] = "trt-rtx";
        raw["engine"] = {{"builder", "tensorrt-rtx"}, {"version", "1.7.1.116"},
                         {"compute_capabilities", {90}}, {"graph_sha256", ""},
                         {"plugins", json::object()},    {"libraries", json::array()},
                         {"embedded", false},            {"profiles", json::array()}};
    });
    const std::string message = refusal(copy.path());
    CHECK(contains(message, "holds a TensorRT engine and this library was built without TensorRT"));
    CHECK(is_sentence(message));
    ingot::Options graph_only;
    graph_only.graph_only = true;
    CHECK(refusal(copy.path(), graph_only).empty());
}
#endif

TEST_CASE("a graph of another export, and one that is no graph") {
    const Copy copy("olmoe-ort");
    copy.edit([](json &raw) { raw["main_output"] = "scores"; });
    CHECK(contains(refusal(copy.path()), "has no scores, which ingot.json names"));
    copy.put("model.onnx", "this is no graph");
    const std::string message = refusal(copy.path());
    CHECK(contains(message, "ONNX Runtime "));
    CHECK(contains(message, "cannot load"));
    CHECK(contains(message, "made with 1."));
}

TEST_CASE("a number of threads that ONNX Runtime would hang at") {
    ingot::Options options;
    for (const int threads : {-1, 1025}) {
        options.threads = threads;
        CHECK(contains(refusal(tiny("olmoe-ort"), options), "it must be 0 to 1024"));
    }
}

TEST_SUITE_END();
