#include <ingot/error.hpp>
#include <ingot/manifest.hpp>

#include <openssl/evp.h>

#include <array>
#include <fstream>
#include <iterator>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>

namespace ingot {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

// A value of the wrong kind; `read` adds the file's name and what to do.
[[noreturn]] void damaged(const std::string &what) { throw std::invalid_argument(what); }

// nlohmann converts between numbers silently, so a size of 1.5 or 2^64-1 would pass.
std::int64_t whole(const json &value, const char *name,
                   std::int64_t least = std::numeric_limits<std::int64_t>::min()) {
    bool fits = value.is_number_integer();
    if (fits && value.is_number_unsigned()) {
        fits = value.get<std::uint64_t>() <=
               static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
    }
    if (!fits || value.get<std::int64_t>() < least) damaged(std::string(name) + " is " + value.dump());
    return value.get<std::int64_t>();
}

std::vector<std::int64_t> wholes(const json &values, const char *name) {
    if (!values.is_array()) damaged(std::string(name) + " is not a list");
    std::vector<std::int64_t> result;
    for (const json &value : values) result.push_back(whole(value, name));
    return result;
}

std::vector<Dimension> shape(const json &values) {
    std::vector<Dimension> result;
    for (const json &value : values) {
        Dimension dimension;
        if (value.is_string()) {
            dimension.name = value.get<std::string>();
            if (dimension.name.empty()) damaged("a dimension has an empty name");
        } else {
            dimension.size = whole(value, "a dimension", 0);
        }
        result.push_back(dimension);
    }
    return result;
}

std::vector<TensorInfo> tensors(const json &values) {
    std::vector<TensorInfo> result;
    for (const json &value : values) {
        result.push_back({value.at("name"), value.at("dtype"), shape(value.at("shape"))});
    }
    return result;
}

StateInfo state(const json &value) {
    StateInfo result;
    result.kind = value.at("kind");
    result.input = value.at("input");
    result.output = value.at("output");
    result.dtype = value.at("dtype");
    result.input_shape = shape(value.at("input_shape"));
    result.shared = value.at("shared");
    if (!value.at("axis").is_null()) {
        result.axis = static_cast<std::size_t>(whole(value.at("axis"), "axis", 0));
        if (*result.axis >= result.input_shape.size()) damaged("the axis of " + result.input);
    }
    if (result.shared && !result.axis) damaged(result.input + " is shared and does not grow");
    for (const Dimension &dimension : result.input_shape) {
        const std::string &name = dimension.name;
        if (!dimension.fixed() && name != "batch" && name != "past_sequence") {
            damaged(result.input + " has a size named " + name);
        }
    }
    return result;
}

EngineInfo engine(const json &value) {
    EngineInfo result;
    result.builder = value.at("builder");
    result.version = value.at("version");
    result.compute_capabilities = wholes(value.at("compute_capabilities"), "compute_capabilities");
    result.graph_sha256 = value.at("graph_sha256");
    for (const auto &[name, count] : value.at("plugins").items()) {
        result.plugins[name] = whole(count, "plugins", 0);
    }
    result.libraries = value.at("libraries").get<std::vector<std::string>>();
    for (const std::string &name : result.libraries) {
        // A library is code: it must be one of this folder, where its hash is checked.
        if (fs::path(name).filename() != name) damaged("a library is named " + name);
    }
    result.embedded = value.at("embedded");
    for (const json &profile : value.at("profiles")) {
        ProfileInfo made;
        for (const auto &[name, range] : profile.at("shapes").items()) {
            made.shapes[name] = {wholes(range.at(0), "a profile"), wholes(range.at(1), "a profile"),
                                 wholes(range.at(2), "a profile")};
        }
        result.profiles.push_back(made);
    }
    return result;
}

Generation generation(const json &value) {
    Generation result;
    result.eos_token_ids = wholes(value.at("eos_token_ids"), "eos_token_ids");
    result.pad_token_id = whole(value.at("pad_token_id"), "pad_token_id", 0);
    const json &longest = value.at("context_length");
    if (!longest.is_null()) result.context_length = whole(longest, "context_length", 1);
    return result;
}

Manifest manifest(const json &raw) {
    Manifest result;
    result.model_type = raw.at("model_type");
    result.task = raw.at("task");
    result.target = raw.at("target");
    result.precision = raw.at("precision");
    result.main_output = raw.at("main_output");
    result.inputs = tensors(raw.at("inputs"));
    result.outputs = tensors(raw.at("outputs"));
    for (const json &value : raw.at("states")) result.states.push_back(state(value));
    result.vocab_size = whole(raw.at("vocab_size"), "vocab_size", 1);
    result.generation = generation(raw.at("generation"));
    result.labels = raw.at("labels").get<std::vector<std::string>>();
    result.tools = raw.at("tools").get<std::map<std::string, std::string>>();
    if (raw.contains("engine") && !raw["engine"].is_null()) result.engine = engine(raw["engine"]);
    for (const auto &[name, value] : raw.at("files").items()) {
        result.files[name] = {static_cast<std::uint64_t>(whole(value.at("bytes"), "bytes", 0)),
                              value.at("sha256")};
    }
    // An unlisted graph would run unchecked.
    if (result.files.count(kGraph) == 0) damaged(std::string("files lacks ") + kGraph);
    if (result.engine && result.files.count(kEngine) == 0) {
        damaged(std::string("files lacks ") + kEngine);
    }
    result.verdict = raw.at("validation").value("verdict", "skipped");
    return result;
}

}  // namespace

Error::~Error() = default;

Manifest Manifest::read(const fs::path &folder) {
    const fs::path path = folder / kManifest;
    std::error_code none;
    if (!fs::is_regular_file(path, none)) {
        throw Error(folder.string() + " is not an ingot: it has no " + kManifest +
                    "; make one with ingot export --model CHECKPOINT --target ort --out DIR.");
    }
    std::ifstream file(path, std::ios::binary);
    const std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    if (!file) throw Error(path.string() + " cannot be read; check its permissions.");
    try {
        const json raw = json::parse(text);
        const std::int64_t version = whole(raw.at("schema_version"), "schema_version");
        if (version != kSchemaVersion) {
            throw Error(path.string() + " has schema version " + std::to_string(version) +
                        "; this library reads " + std::to_string(kSchemaVersion) +
                        ": export again, or use the version of Ingot that wrote it.");
        }
        return manifest(raw);
    } catch (const json::exception &error) {
        throw Error(path.string() + " is damaged (" + error.what() + "); export again.");
    } catch (const std::invalid_argument &error) {
        throw Error(path.string() + " is damaged (" + error.what() + "); export again.");
    }
}

void Manifest::check_files(const fs::path &folder, bool hashes) const {
    for (const auto &[name, expected] : files) {
        const fs::path path = folder / name;
        std::error_code none;
        if (!fs::is_regular_file(path, none)) {
            throw Error(folder.string() + " is incomplete: " + name + " is missing; export again.");
        }
        const bool same = fs::file_size(path, none) == expected.bytes && !none;
        if (!same || (hashes && sha256(path) != expected.sha256)) {
            throw Error(path.string() + " is not the file that was validated (its " +
                        (same ? "SHA-256" : "size") + " differs from " + kManifest +
                        "); export again.");
        }
    }
}

std::string sha256(const fs::path &path) {
    std::ifstream file(path, std::ios::binary);
    const std::unique_ptr<EVP_MD_CTX, void (*)(EVP_MD_CTX *)> context(EVP_MD_CTX_new(),
                                                                      EVP_MD_CTX_free);
    if (!file || !context || EVP_DigestInit_ex(context.get(), EVP_sha256(), nullptr) != 1) {
        throw Error(path.string() + " cannot be hashed; check its permissions.");
    }
    std::vector<char> piece(std::size_t{1} << 20);
    while (file) {
        file.read(piece.data(), static_cast<std::streamsize>(piece.size()));
        EVP_DigestUpdate(context.get(), piece.data(), static_cast<std::size_t>(file.gcount()));
    }
    if (file.bad()) throw Error(path.string() + " cannot be read to its end; check the disk.");
    std::array<unsigned char, EVP_MAX_MD_SIZE> digest{};
    unsigned length = 0;
    EVP_DigestFinal_ex(context.get(), digest.data(), &length);
    std::string result;
    for (unsigned n = 0; n < length; ++n) {
        constexpr const char *kDigits = "0123456789abcdef";
        result += kDigits[digest[n] >> 4];
        result += kDigits[digest[n] & 15];
    }
    return result;
}

}  // namespace ingot
