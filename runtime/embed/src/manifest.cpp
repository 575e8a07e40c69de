#include <ingot/error.hpp>
#include <ingot/manifest.hpp>

#include <openssl/evp.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <memory>

#include "json_file.hpp"
#include "manifest_rules.hpp"

namespace ingot {
namespace {

namespace fs = std::filesystem;

constexpr const char *kLeadsOut =
    " is a link out of its folder, and an ingot is one folder; copy what it leads to into its "
    "place.";

// Whether a file lies in a folder itself, and is not reached over a link that leads out of it.
bool is_inside(const fs::path &file, const fs::path &folder) {
    std::error_code none;
    const fs::path to = fs::canonical(file, none), from = fs::canonical(folder, none);
    return std::mismatch(from.begin(), from.end(), to.begin(), to.end()).first == from.end() &&
           !to.empty();
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
    if (!is_inside(path, folder)) throw Error(path.string() + kLeadsOut);
    return parse_manifest(read_text(path), path.string());
}

void Manifest::check_files(const fs::path &folder, bool hashes) const {
    for (const auto &[name, expected] : files) {
        const fs::path path = folder / name;
        std::error_code none;
        if (!fs::is_regular_file(path, none)) {
            throw Error(folder.string() + " is incomplete: " + name + " is missing; export again.");
        }
        if (!is_inside(path, folder)) throw Error(path.string() + kLeadsOut);
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
