// Fuzzes ingot.json: whatever it says, the ingot is refused in one sentence or gives its own
// tokens.
//
// INGOT_FUZZ_INGOTS is a folder of ingots, of which a manifest is put to the one of its
// architecture.
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <ingot/session.hpp>
#include <iostream>
#include <map>
#include <random>

#include "json_file.hpp"
#include "manifest_rules.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t *data, std::size_t size, std::size_t most);

namespace {

namespace fs = std::filesystem;
using ingot::Ids;
using nlohmann::json;

// Values in the text of JSON that a reader may stumble over, wherever they stand.
const std::vector<std::string> kNasty = {"0",
                                         "-1",
                                         "1",
                                         "2",
                                         "1e308",
                                         "1.5",
                                         "-0.0",
                                         "2147483647",
                                         "2147483648",
                                         "4294967296",
                                         "9223372036854775807",
                                         "9223372036854775808",
                                         "18446744073709551615",
                                         std::string(400, '9'),
                                         "NaN",
                                         "Infinity",
                                         "true",
                                         "false",
                                         "null",
                                         "\"\"",
                                         "\"x\"",
                                         "\"batch\"",
                                         "\"sequence\"",
                                         "\"past_sequence\"",
                                         "\"total_sequence\"",
                                         "\"float16\"",
                                         "\"bfloat16\"",
                                         "\"int64\"",
                                         "\"string\"",
                                         "\"logits\"",
                                         "\"input_ids\"",
                                         "\"model.onnx\"",
                                         "\"../../x\"",
                                         "\"/x\"",
                                         "\"\\u0000\"",
                                         "\"\\ud800\"",
                                         "\"\\u202e\\u001b[31m\"",
                                         "[]",
                                         "[[]]",
                                         "[0]",
                                         "[null]",
                                         "{}",
                                         "{\"a\":{}}",
                                         std::string(80, '[') + std::string(80, ']'),
                                         std::string(100000, '['),
                                         "\"" + std::string(5000, 'y') + "\""};

// The fault that a fuzzer stops at.
[[noreturn]] void fault(const std::string &what) {
    std::cerr << "fault: " << what << '\n';
    std::abort();
}

void check_sentence(const std::string &message) {
    const bool plain =
        std::all_of(message.begin(), message.end(), [](char c) { return c >= 0x20 && c < 0x7f; });
    if (!plain || message.size() > 1500 || message.back() != '.') fault("no sentence: " + message);
}

std::vector<Ids> tokens_of(const fs::path &folder) {
    ingot::Options options;
    options.verify = false;
    options.threads = 1;
    ingot::Session session(folder, options);
    const Ids ids = {5, 6, 7, 8, 9, 11}, mask = {1, 1, 1, 0, 1, 1};
    session.reset(2, 8);
    session.step(ids, mask, 2, 3);
    session.step({ids.data(), 2}, {mask.data(), 2}, 2, 1);
    session.state();
    if (session.manifest().task != "generate") return {};
    ingot::GenerateOptions generate;
    generate.max_new_tokens = 3;
    generate.stop_ids = Ids{};
    return session.generate({{3, 4, 5}, {6}}, generate);
}

// Copies of the ingots, in a folder that goes at the end.
class Ingots {
  public:
    struct Known {
        fs::path folder;
        std::vector<Ids> tokens;
    };

    Ingots() {
        const char *from = std::getenv("INGOT_FUZZ_INGOTS");
        std::string made = (fs::temp_directory_path() / "ingot-fuzz-XXXXXX").string();
        if (from == nullptr || mkdtemp(made.data()) == nullptr)
            fault("set INGOT_FUZZ_INGOTS to a folder of ingots");
        root_ = made;
        for (const fs::directory_entry &entry : fs::directory_iterator(from)) {
            if (!entry.is_directory()) continue;
            const fs::path copy = root_ / entry.path().filename();
            fs::copy(entry.path(), copy, fs::copy_options::recursive);
            known_[ingot::Manifest::read(copy).model_type] = {copy, tokens_of(copy)};
        }
    }
    ~Ingots() {
        std::error_code none;
        fs::remove_all(root_, none);
    }

    const Known *find(const std::string &model_type) const {
        const auto found = known_.find(model_type);
        return found == known_.end() ? nullptr : &found->second;
    }

  private:
    fs::path root_;
    std::map<std::string, Known> known_;
};

// Every value of a document, by its path.
void add_paths(const json &value, const json::json_pointer &at,
               std::vector<json::json_pointer> &paths) {
    if (!at.empty()) paths.push_back(at);
    if (value.is_object()) {
        for (const auto &[name, inner] : value.items()) add_paths(inner, at / name, paths);
    } else if (value.is_array()) {
        for (std::size_t n = 0; n < value.size(); ++n) add_paths(value[n], at / n, paths);
    }
}

// One change of what a document says; empty where it is no document.
std::string changed(std::string_view text, std::mt19937 &random) {
    json document;
    try {
        document = ingot::parse_json(text);
    } catch (const std::invalid_argument &) {
        return {};
    }
    std::vector<json::json_pointer> paths;
    add_paths(document, json::json_pointer(), paths);
    if (paths.empty()) return {};
    const auto any = [&] { return paths[random() % paths.size()]; };
    const json::json_pointer at = any();
    const std::string mark = "@@MARK@@";
    std::string raw;
    switch (random() % 4) {
        case 0: {
            json &parent = document.at(at.parent_pointer());
            if (parent.is_array()) {
                parent.erase(std::stoul(at.back()));
            } else {
                parent.erase(at.back());
            }
            break;
        }
        case 1: document[at] = json(document.at(any())); break;
        default: document[at] = mark, raw = kNasty[random() % kNasty.size()];
    }
    std::string result = document.dump(-1, ' ', false, json::error_handler_t::replace);
    const std::size_t found = result.find('"' + mark + '"');
    if (!raw.empty() && found != std::string::npos) result.replace(found, mark.size() + 2, raw);
    return result;
}

}  // namespace

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t *data, std::size_t size,
                                               std::size_t most, unsigned seed) {
    std::mt19937 random(seed);
    if (random() % 4 != 0) {
        const std::string made = changed({reinterpret_cast<const char *>(data), size}, random);
        if (!made.empty() && made.size() <= most) {
            std::copy(made.begin(), made.end(), data);
            return made.size();
        }
    }
    return LLVMFuzzerMutate(data, size, most);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    static const Ingots ingots;
    const std::string_view text(reinterpret_cast<const char *>(data), size);
    try {
        const Ingots::Known *known =
            ingots.find(ingot::parse_manifest(text, "ingot.json").model_type);
        if (known == nullptr) return 0;
        std::ofstream(known->folder / "ingot.json", std::ios::binary) << text;
        const std::vector<Ids> tokens = tokens_of(known->folder);
        if (!tokens.empty() && tokens != known->tokens) fault("other tokens");
    } catch (const ingot::Error &error) {
        check_sentence(error.what());
    }
    return 0;
}
