#include "folder.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>

namespace fs = std::filesystem;

fs::path tiny(const std::string &name) {
    const char *all = std::getenv("INGOT_TEST_INGOTS");
    const fs::path path = fs::path(all != nullptr ? all : "") / name;
    if (!fs::is_directory(path)) {
        throw std::runtime_error(path.string() + " is missing; make it with: make cpp-ingots");
    }
    return path;
}

ingot::Options vouched(const fs::path &folder) {
    ingot::Options options;
    options.operators = folder / ingot::kOperators;
    return options;
}

std::string text_of(const fs::path &file) {
    std::ifstream in(file, std::ios::binary);
    return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
}

void write_text(const fs::path &file, const std::string &text) {
    std::ofstream(file, std::ios::binary) << text;
}

Copy::Copy(const std::string &name) {
    std::string made = (fs::temp_directory_path() / "ingot-test-XXXXXX").string();
    if (mkdtemp(made.data()) == nullptr) throw std::runtime_error("no temporary folder");
    path_ = made;
    fs::copy(tiny(name), path_, fs::copy_options::recursive);
}

Copy::~Copy() {
    std::error_code none;
    fs::remove_all(path_, none);
}

void Copy::edit(const std::function<void(nlohmann::json &)> &change) const {
    nlohmann::json raw = nlohmann::json::parse(text_of(path_ / ingot::kManifest));
    change(raw);
    write_text(path_ / ingot::kManifest, raw.dump());
}

void Copy::put(const std::string &name, const std::string &text) const {
    write_text(path_ / name, text);
    edit([&](nlohmann::json &raw) {
        raw["files"][name] = {{"bytes", text.size()}, {"sha256", ingot::sha256(path_ / name)}};
    });
}

std::string refusal(const std::function<void()> &call) {
    try {
        call();
    } catch (const ingot::Error &error) {
        return error.what();
    }
    return {};
}

std::string refusal(const fs::path &folder, const ingot::Options &options) {
    return refusal([&] { ingot::Session session(folder, options); });
}

void all_logits(nlohmann::json &raw) {
    nlohmann::json &inputs = raw["inputs"];
    inputs.erase(std::remove_if(inputs.begin(), inputs.end(),
                                [](const nlohmann::json &input) {
                                    return input["name"] == ingot::kLogitsToKeep;
                                }),
                 inputs.end());
    for (nlohmann::json &output : raw["outputs"]) {
        for (nlohmann::json &size : output["shape"]) {
            if (size == "kept_sequence") size = "sequence";
        }
    }
}

bool contains(const std::string &text, const std::string &part) {
    return text.find(part) != std::string::npos;
}
