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

// Every kind of value of a document, by its path: of a list the first two of its values.
void each_path(const json &value, const json::json_pointer &at,
               const std::function<void(const json::json_pointer &)> &visit) {
    if (!at.empty()) visit(at);
    if (value.is_object()) {
        for (const auto &[name, inner] : value.items()) each_path(inner, at / name, visit);
    } else if (value.is_array()) {
        for (std::size_t n = 0; n < std::min<std::size_t>(value.size(), 2); ++n)
            each_path(value[n], at / n, visit);
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

TEST_CASE("a manifest that is nested or larger than any needs to be") {
    const Copy copy("olmoe-ort");
    const fs::path file = copy.path() / "ingot.json";
    const std::string whole = text_of(file);
    const std::string free = "\"validation\": {";
    const std::size_t begin = whole.find(free) + free.size();
    // The figures of a validation are free, so it is the depth alone that is refused.
    const auto with = [&](const std::string &value) {
        write_text(file,
                   whole.substr(0, begin) + "\"more\": " + value + ", " + whole.substr(begin));
        return refusal(copy.path());
    };
    const auto lists = [](std::size_t depth) {
        return std::string(depth, '[') + std::string(depth, ']');
    };
    CHECK(with(lists(63)).empty());
    CHECK(contains(with(lists(64)),
                   "ingot.json is damaged (it is nested more than 64 deep); export again."));
    for (const std::size_t depth : {1000U, 200000U, 4000000U}) {
        CHECK(contains(with(lists(depth)), "nested more than 64 deep"));
        CHECK(contains(with(std::string(depth, '[')), "nested more than 64 deep"));
    }
    std::string objects;
    for (int n = 0; n < 100000; ++n) objects += "{\"a\":[";
    CHECK(contains(with(objects), "nested more than 64 deep"));
    CHECK(contains(with('"' + std::string(9000000, 'x') + '"'), "is larger than 8388608 bytes"));
    CHECK(contains(with(std::string(5000, '1') + ".."), "ingot.json is damaged ("));
    CHECK(contains(with(std::string(5000, '1')), "ingot.json is damaged ("));

    write_text(file, "\xef\xbb\xbf" + whole);
    CHECK(contains(refusal(copy.path()), "it begins with a byte order mark"));
    write_text(file, whole + std::string(1, '\0') + "[");
    CHECK(contains(refusal(copy.path()), "it holds a NUL"));
}

TEST_CASE("what a manifest holds is quoted in few printable letters") {
    const Copy copy("olmoe-ort");
    json raw = json::parse(text_of(copy.path() / "ingot.json"));
    // Figures, which nothing reads.
    raw["validation"] = {{"verdict", "passed"}};
    const std::vector<json> hostile = {std::string(5000, 'x'),
                                       "\x1b[31mred\r\n",
                                       "\u202egnp.exe",
                                       std::string("a\0b", 3),
                                       "\u009b2J",
                                       json::array({json::array({json::object()})}),
                                       json(json::value_t::object),
                                       1e308};
    each_path(raw, json::json_pointer(), [&](const json::json_pointer &at) {
        for (const json &value : hostile) {
            json changed = raw;
            changed[at] = value;
            write_text(copy.path() / "ingot.json", changed.dump());
            CAPTURE(at.to_string());
            std::string message;
            try {
                ingot::Manifest::read(copy.path());
            } catch (const ingot::Error &error) {
                message = error.what();
            }
            CHECK(message.size() < 1000);
            for (const char letter : message) CHECK_UNARY(letter >= 0x20 && letter < 0x7f);
        }
    });
    json changed = raw;
    changed["files"][std::string(1000, 'n') + "\x1b"] = raw["files"]["model.onnx"];
    write_text(copy.path() / "ingot.json", changed.dump());
    const std::string message = refusal(copy.path());
    CHECK(contains(message, "nnn...nnn"));
    CHECK(message.size() < 400);
    // What the parser quotes of a text that is no JSON.
    write_text(copy.path() / "ingot.json", "{\"" + std::string(100000, 'y') + "\x1b\"");
    CHECK(refusal(copy.path()).size() < 600);
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
    // The figures of the validation are free.
    CHECK(refused > 1000);
    CHECK(read > 20);
}

TEST_CASE("states whose shapes make no sense") {
    const Copy copy("olmoe-ort");
    const json raw = json::parse(text_of(copy.path() / "ingot.json"));
    const auto message = [&](const std::function<void(json &)> &change) {
        json changed = raw;
        change(changed["states"][0]);
        write_text(copy.path() / "ingot.json", changed.dump());
        return refusal(copy.path());
    };
    // Any axis but the one that grows, the batch's among them.
    for (const json &axis :
         {json(0), json(1), json(3), json(4), json(-1), json(nullptr), json("2"), json(2.0)}) {
        CAPTURE(axis.dump());
        CHECK(contains(message([&](json &state) { state["axis"] = axis; }),
                       "states[0].axis is " + axis.dump()));
    }
    const std::string shape =
        "states[0].input_shape is a list of 4, and must be batch, then sizes and one past_sequence";
    for (const json &sizes :
         {json{"batch", "heads", "past_sequence", 32},
          json{"batch", "past_sequence", "past_sequence", 32}, json{"batch", 2, 8, 32},
          json{2, "batch", "past_sequence", 32}, json{"batch", "batch", "past_sequence", 32},
          json{"past_sequence", 2, "past_sequence", 32}, json{1, 2, "past_sequence", 32}}) {
        CAPTURE(sizes.dump());
        CHECK(contains(message([&](json &state) { state["input_shape"] = sizes; }), shape));
    }
    CHECK(contains(message([](json &state) { state["input_shape"] = json::array(); }),
                   "a list of at least one size"));
    CHECK(contains(message([](json &state) { state["input_shape"][1] = 4294967296; }),
                   "from 0 to 2147483647"));
    CHECK(contains(message([](json &state) {
                       state["input_shape"] = {"batch", 2147483647, "past_sequence", 9};
                   }),
                   "of at most 4294967296 elements"));
    CHECK(contains(message([](json &state) { state["output_shape"][2] = 5; }),
                   "must be input_shape with total_sequence for past_sequence"));
    CHECK(contains(message([](json &state) { state["kind"] = "conv"; }),
                   "must be batch, and then sizes"));
    CHECK(contains(
        message([](json &state) { state["input_shape"][1] = 7, state["output_shape"][1] = 7; }),
        "is another tensor in states than in inputs or outputs"));
    CHECK(contains(message([](json &state) { state["dtype"] = "float16"; }),
                   "is another tensor in states"));
    CHECK(contains(message([](json &state) { state["input"] = "past_key_values.0.value"; }),
                   "two states are"));
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

TEST_CASE("a graph, or its weights, that the manifest does not list") {
    for (const bool verify : {true, false}) {
        ingot::Options options;
        options.verify = verify;
        const Copy weights("olmoe-ort");
        weights.edit([](json &raw) { raw["files"].erase("weights.safetensors"); });
        CHECK(contains(refusal(weights.path(), options),
                       "reads \"weights.safetensors\", which ingot.json does not list"));
        const Copy graph("olmoe-ort");
        graph.edit([](json &raw) { raw["files"].erase("model.onnx"); });
        CHECK(contains(refusal(graph.path(), options), "files lacks model.onnx"));
    }
}

TEST_CASE("files are named below the folder, and alike on every system") {
    const Copy copy("olmoe-ort");
    const json raw = json::parse(text_of(copy.path() / "ingot.json"));
    const auto message = [&](const std::string &name) {
        json changed = raw;
        changed["files"][name] = raw["files"]["model.onnx"];
        write_text(copy.path() / "ingot.json", changed.dump());
        return refusal(copy.path());
    };
    for (const std::string &name : {std::string("../model.onnx"),
                                    std::string("/etc/passwd"),
                                    std::string("report/../../x"),
                                    std::string("a//b"),
                                    std::string("./a"),
                                    std::string("a/."),
                                    std::string("a/"),
                                    std::string(""),
                                    std::string("a\\b"),
                                    std::string("C:x"),
                                    std::string("a\0b", 3),
                                    std::string("a\nb"),
                                    std::string("a."),
                                    std::string("a "),
                                    std::string("a./b"),
                                    std::string("-rf"),
                                    std::string(".hidden"),
                                    std::string("$(x)"),
                                    std::string("a;b"),
                                    std::string("a'b"),
                                    std::string("\u202ea"),
                                    std::string(300, 'a'),
                                    std::string("a/b/c/d/e/f/g/h/i")}) {
        CAPTURE(name);
        const std::string found = message(name);
        CHECK(contains(found, "is not named like a file below the folder"));
        CHECK(is_sentence(found));
    }
    CHECK(contains(message("MODEL.onnx"), "twice, but for capital letters"));
    CHECK(contains(message("model.onnx/x"), "files holds model.onnx, and model.onnx/x below it"));
    CHECK(contains(message("report/code.PY"), "which is a program"));
    CHECK(contains(message("some (2).json"), "some (2).json is missing"));
}

TEST_CASE("a link leads nowhere out of the folder") {
    const Copy elsewhere("olmoe-ort");
    for (const char *name : {"ingot.json", "model.onnx", "weights.safetensors"}) {
        CAPTURE(name);
        const Copy copy("olmoe-ort");
        fs::rename(copy.path() / name, copy.path() / "kept");
        fs::create_symlink("kept", copy.path() / name);
        // ONNX Runtime has rules of its own for links to weights.
        if (std::string(name) != "weights.safetensors") CHECK(refusal(copy.path()).empty());
        fs::remove(copy.path() / name);
        fs::create_symlink(elsewhere.path() / name, copy.path() / name);
        const std::string message = refusal(copy.path());
        CHECK(contains(message, std::string(name) + " is a link out of its folder"));
        CHECK(is_sentence(message));
        fs::remove(copy.path() / name);
        fs::create_symlink(name, copy.path() / name);
        CHECK(is_sentence(refusal(copy.path())));
    }
    const Copy copy("olmoe-ort");
    // The folder itself may be reached over one, and files lie below another.
    fs::create_symlink(copy.path(), elsewhere.path() / "other");
    CHECK(refusal(elsewhere.path() / "other").empty());
    fs::create_directory_symlink(elsewhere.path(), copy.path() / "report");
    copy.edit([](json &raw) { raw["files"]["report/model.onnx"] = raw["files"]["model.onnx"]; });
    CHECK(contains(refusal(copy.path()), "report/model.onnx is a link out of its folder"));
}

TEST_CASE("tensors that no session feeds or reads") {
    const Copy copy("olmoe-ort");
    const json raw = json::parse(text_of(copy.path() / "ingot.json"));
    const auto message = [&](const std::function<void(json &)> &change) {
        json changed = raw;
        change(changed);
        write_text(copy.path() / "ingot.json", changed.dump());
        return refusal(copy.path());
    };
    const json more = {{"name", "image"}, {"dtype", "float32"}, {"shape", {"batch", 3}}};
    CHECK(contains(message([&](json &m) { m["inputs"].push_back(more); }),
                   "inputs has image, which no session feeds"));
    CHECK(contains(message([](json &m) { m["inputs"].push_back(m["inputs"][0]); }),
                   "inputs has input_ids twice"));
    CHECK(contains(message([](json &m) { m["inputs"].erase(0); }), "inputs lacks input_ids"));
    CHECK(contains(message([](json &m) { m["inputs"].erase(1); }), "inputs lacks attention_mask"));
    CHECK(contains(message([](json &m) { m["more"] = 1; }),
                   "it has \"more\", which is not known here"));
    CHECK(contains(message([](json &m) { m["states"][1]["more"] = 1; }),
                   "states[1] has \"more\", which is not known"));
    CHECK(contains(message([](json &m) { m["files"]["model.onnx"]["more"] = 1; }),
                   "has \"more\", which is not known"));
    CHECK(contains(message([](json &m) { m["inputs"][0]["dtype"] = "float32"; }),
                   "input_ids is not of int64"));
    CHECK(contains(message([](json &m) { m["inputs"][0]["shape"] = {"batch"}; }),
                   "input_ids is not of int64"));
    CHECK(contains(message([](json &m) {
                       m["inputs"][1]["shape"] = {"batch", "sequence"};
                   }),
                   "attention_mask is not"));
    for (const auto &[name, value] :
         {std::pair<const char *, json>{"dtype", "float32"}, {"shape", {2}}, {"shape", {"batch"}},
          {"shape", {1, 1}}}) {
        CHECK(contains(message([&, key = name, other = value](json &m) { m["inputs"][3][key] = other; }),
                       "logits_to_keep is not of int64 and of one number"));
    }
    CHECK(contains(message([](json &m) { m["inputs"].erase(3); }), "logits is not of"));
    CHECK(contains(message([](json &m) { m["task"] = "features"; }),
                   "which is for the task generate"));
    CHECK(contains(message([](json &m) { m["generation"]["switch_length"] = 0; }), "switch_length"));
    CHECK(message([](json &m) { m["generation"]["switch_length"] = 64; }) == "");
    CHECK(message(all_logits) == "");
    const std::string logits =
        "logits is not of a floating-point type and of the shape that generate has";
    CHECK(contains(message([](json &m) { m["outputs"][0]["dtype"] = "int64"; }), logits));
    for (const json &shape :
         {json{"batch", 512}, json{"batch", "kept_sequence", 512, 1},
          json{"batch", "kept_sequence", 0}, json{"batch", "kept_sequence", 511},
          json{"batch", "sequence", 512}, json{"batch", "total_sequence", 512},
          json{"kept_sequence", "batch", 512}, json{1, "kept_sequence", 512}}) {
        CAPTURE(shape.dump());
        CHECK(contains(message([&](json &m) { m["outputs"][0]["shape"] = shape; }), logits));
    }
    CHECK(contains(message([](json &m) { m["outputs"][0]["dtype"] = "string"; }),
                   "must be one of float32, float16"));
    CHECK(contains(message([](json &m) { m["main_output"] = "present.0.key"; }),
                   "present.0.key is not of"));
    CHECK(contains(message([](json &m) {
                       all_logits(m);
                       m["task"] = "classify";
                   }),
                   "the shape that classify has"));
    CHECK(contains(message([](json &m) { m["vocab_size"] = 513; }), logits));
    CHECK(contains(message([](json &m) { m["generation"]["eos_token_ids"] = {512}; }),
                   "from 0 to 511"));
    CHECK(
        contains(message([](json &m) { m["generation"]["pad_token_id"] = -1; }), "from 0 to 511"));
    CHECK(contains(message([](json &m) { m["engine"] = "code"; }), "engine"));
    CHECK(contains(message([](json &m) { m["target"] = "onnx"; }),
                   "false, but for what kernels of the target ort write in place"));
    CHECK(contains(message([](json &m) { m["activations"] = "bfloat16"; }),
                   "left out, but for kernels ingot and weights in bfloat16"));
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
    CHECK(contains(refusal(copy.path()),
                   "target is \"npu\", and must be one of onnx, ort, trt, trt-rtx"));
    copy.edit([](json &raw) {
        raw["target"] = "ort";
        raw["precision"] = "float32";
        for (const char *tensors : {"states", "inputs", "outputs"}) {
            for (json &tensor : raw[tensors]) {
                if (tensor["dtype"] == "float32") tensor["dtype"] = "bfloat16";
            }
        }
    });
    CHECK(contains(refusal(copy.path()),
                   "past_key_values.0.key is bfloat16, and only float32 and float16 run"));
}

TEST_CASE("matrices that are stored narrower than they are computed in") {
    const Copy copy("olmoe-ort");
    copy.edit([](json &raw) { raw["weights"] = "checkpoint"; });
    CHECK(refusal(copy.path()).empty());
    copy.edit([](json &raw) { raw["weights"] = "float8"; });
    CHECK(contains(refusal(copy.path()), "weights is \"float8\", and must be one of checkpoint"));
    copy.edit([](json &raw) {
        raw["weights"] = "bfloat16";
        raw["precision"] = "float16";
    });
    CHECK(contains(refusal(copy.path()), "weights is \"bfloat16\", and must be left out"));
}

TEST_CASE("weights in whole numbers") {
    const Copy copy("olmoe-ort");
    copy.edit([](json &raw) { raw["weights"] = "int4"; });
    CHECK(contains(refusal(copy.path()), "quantization goes with weights in whole numbers"));
    copy.edit([](json &raw) {
        raw["quantization"] = {{"block", 64},
                               {"symmetric", true},
                               {"accuracy", "fast"},
                               {"method", "nearest"},
                               {"bits", {{"lm_head.weight", 8}}}};
    });
    CHECK(refusal(copy.path()).empty());
    copy.edit([](json &raw) { raw["quantization"]["block"] = 48; });
    CHECK(contains(refusal(copy.path()), "quantization.block is 48, and must be one of 32"));
    copy.edit([](json &raw) {
        raw["quantization"]["block"] = 32;
        raw["quantization"]["bits"]["lm_head.weight"] = 5;
    });
    CHECK(contains(refusal(copy.path()), "must be one of 4, 8, 32"));
    copy.edit([](json &raw) {
        raw["quantization"]["bits"] = json::object();
        raw["quantization"]["calibration"] = {{"sha256", std::string(64, 'a')},
                                              {"tokens", 4096},
                                              {"effects", {{"lm_head.weight", 0.1}}}};
    });
    CHECK(refusal(copy.path()).empty());
    copy.edit([](json &raw) { raw["quantization"]["calibration"]["tokens"] = 0; });
    CHECK(contains(refusal(copy.path()), "quantization.calibration.tokens is 0"));
    copy.edit([](json &raw) {
        raw["quantization"]["calibration"]["tokens"] = 1;
        raw["quantization"]["blocks"] = {{"lm_head.weight", 64}};
    });
    CHECK(refusal(copy.path()).empty());
    copy.edit([](json &raw) { raw["quantization"]["blocks"]["lm_head.weight"] = 48; });
    CHECK(contains(refusal(copy.path()), "is 48, and must be one of 32, 64, 128"));
    copy.edit([](json &raw) { raw["quantization"]["blocks"] = {{"$(id)", 64}}; });
    CHECK(contains(refusal(copy.path()), "is not named like a tensor"));
    copy.edit([](json &raw) {
        raw["quantization"].erase("blocks");
        raw["quantization"].erase("calibration");
        raw["target"] = "onnx";
        for (json &state : raw["states"]) state["shared"] = false;
    });
    CHECK(contains(refusal(copy.path()), "weights is \"int4\", and must be of floats"));
}

TEST_CASE("whose kernels run a graph") {
    const Copy copy("olmoe-ort");
    copy.edit([](json &raw) { raw["kernels"] = "portable"; });
    CHECK(refusal(copy.path()).empty());
    for (const json &value : {json("ort"), json(""), json(nullptr), json(1), json::array({"ingot"})}) {
        CAPTURE(value.dump());
        copy.edit([&](json &raw) { raw["kernels"] = value; });
        CHECK(contains(refusal(copy.path()), "kernels is "));
    }
    copy.edit([](json &raw) {
        raw["kernels"] = "portable";
        raw["weights"] = "int8";
        raw["quantization"] = {{"block", 64},
                               {"symmetric", true},
                               {"accuracy", "exact"},
                               {"method", "nearest"},
                               {"bits", json::object()}};
    });
    CHECK(contains(refusal(copy.path()), "standard operators read no weights in whole numbers"));
    copy.edit([](json &raw) { raw["kernels"] = "ingot"; });
    CHECK(contains(refusal(copy.path()),
                   "scales in float32, and the kernels of this ingot read float16"));
    copy.edit([](json &raw) { raw["quantization"]["scales"] = "float16"; });
    CHECK(contains(refusal(copy.path()), "files lacks libingot_ort.so"));
    copy.edit([](json &raw) { raw.erase("kernels"); });
    CHECK(contains(refusal(copy.path()),
                   "scales in float16, and the kernels of this ingot read float32"));
    for (const json &scales : {json("bfloat16"), json(16), json(nullptr)}) {
        copy.edit([&](json &raw) { raw["quantization"]["scales"] = scales; });
        CHECK(contains(refusal(copy.path()), "quantization.scales is "));
    }
    copy.edit([](json &raw) { raw["quantization"]["scales"] = "float32"; });
    CHECK(refusal(copy.path()).empty());
    copy.edit([](json &raw) {
        raw.erase("quantization");
        raw.erase("weights");
        raw["kernels"] = "ingot";
        raw["target"] = "onnx";
        for (json &state : raw["states"]) state["shared"] = false;
    });
    CHECK(contains(refusal(copy.path()), "must be left out, but for the target ort"));
    copy.edit([](json &raw) { raw.erase("kernels"); });
    copy.put("libingot_ort.so", "code");
    CHECK(contains(refusal(copy.path()), "files holds libingot_ort.so, which is a program"));
}

TEST_CASE("a library of operators that nobody vouches for, or another one") {
    const Copy copy("olmoe-own");
    const fs::path library = copy.path() / "libingot_ort.so";
    const auto check = [&](const std::string &message, const std::string &part) {
        CHECK(contains(message, part));
        CHECK(contains(message, "; name " + library.string() + " as the library of operators if you "));
        CHECK(contains(message, "or the one that `make cpu` builds of the Ingot that it was made with, "));
        CHECK(contains(message, "or export it again with --kernels ort."));
        CHECK(is_sentence(message));
    };
    ingot::Options options = vouched(copy.path());
    CHECK(refusal(copy.path(), options).empty());
    // What lies in the folder is not loaded for lying there, whatever is verified.
    for (const bool verify : {true, false}) {
        ingot::Options none;
        none.verify = verify;
        check(refusal(copy.path(), none), "no library that has them is named");
    }
    // By a name without a folder, which the system would look for elsewhere.
    const fs::path before = fs::current_path();
    fs::current_path(copy.path());
    options.operators = "libingot_ort.so";
    CHECK(refusal(copy.path(), options).empty());
    fs::current_path(before);
    check(refusal(copy.path(), options), "libingot_ort.so is missing");
    options.operators = copy.path();
    check(refusal(copy.path(), options), "is missing");

    const Copy other("mamba2-own");
    std::string changed = text_of(library);
    changed[changed.size() / 2] = static_cast<char>(changed[changed.size() / 2] ^ 1);
    write_text(other.path() / "changed.so", changed);
    for (const bool verify : {true, false}) {
        options.verify = verify;
        options.operators = other.path() / "changed.so";
        check(refusal(copy.path(), options), "was validated with another library of kernels than");
    }
    // Exchanged in the folder it is another one too, also where hashes are not compared.
    fs::remove(library);
    write_text(library, changed);
    options.operators = library;
    check(refusal(copy.path(), options), "was validated with another library of kernels than");
    options.verify = true;
    CHECK(contains(refusal(copy.path(), options), "is not the file that was validated"));
    // And with its hash it is its maker's, whom the one that is vouched for does not fit.
    copy.put("libingot_ort.so", changed);
    options.operators = other.path() / "libingot_ort.so";
    check(refusal(copy.path(), options), "was validated with another library of kernels than");
}

TEST_CASE("a library that is none is refused by ONNX Runtime") {
    const Copy copy("olmoe-own");
    copy.put("libingot_ort.so", "code");
    const std::string message = refusal(copy.path(), vouched(copy.path()));
    CHECK(contains(message, "cannot load"));
    CHECK(is_sentence(message));
}

#ifndef INGOT_FAKE_VERSION
TEST_CASE("an engine, where the library was built without TensorRT") {
    const Copy copy("olmoe-ort");
    copy.put("model.engine", "code");
    copy.edit([](json &raw) {
        all_logits(raw);
        raw["target"] = "trt-rtx";
        raw["engine"] = {{"builder", "tensorrt-rtx"},
                         {"version", "1.7.1.116"},
                         {"compute_capabilities", {90}},
                         {"graph_sha256", std::string(64, '0')},
                         {"plugins", json::object()},
                         {"libraries", json::array()},
                         {"embedded", false},
                         {"profiles", {{{"name", "prefill"}, {"shapes", json::object()}}}}};
        for (json &state : raw["states"]) state["shared"] = false;
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
    CHECK(contains(refusal(copy.path()), "outputs lacks scores, the main output"));
    copy.edit([](json &raw) { raw["outputs"][0]["name"] = "scores"; });
    CHECK(contains(refusal(copy.path()), "the graph has \"logits\", which is not named there"));
    copy.edit([](json &raw) {
        raw["main_output"] = raw["outputs"][0]["name"] = "logits";
        raw["outputs"].push_back({{"name", "scores"}, {"dtype", "float32"}, {"shape", {"batch"}}});
    });
    CHECK(contains(refusal(copy.path()), "has no scores, which ingot.json names"));
    copy.edit([](json &raw) {
        raw["outputs"].erase(raw["outputs"].size() - 1);
        raw["vocab_size"] = raw["outputs"][0]["shape"][2] = 511;
    });
    CHECK(contains(refusal(copy.path()), "the graph has another type or shape of logits"));
    copy.put("model.onnx", "this is no graph");
    CHECK(contains(refusal(copy.path()), "model.onnx is no ONNX graph ("));
    copy.put("model.onnx", "");
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
