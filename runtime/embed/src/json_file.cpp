#include "json_file.hpp"

#include <fstream>
#include <ingot/error.hpp>

namespace ingot {

using nlohmann::json;

std::string read_text(const std::filesystem::path &path) {
    std::ifstream file(path, std::ios::binary);
    std::string text, piece(std::size_t{1} << 16, '\0');
    while (file && text.size() <= kMostJsonBytes) {
        file.read(piece.data(), static_cast<std::streamsize>(piece.size()));
        text.append(piece, 0, static_cast<std::size_t>(file.gcount()));
    }
    // A file that ends is read to its end.
    if (!file && !file.eof())
        throw Error(path.string() + " cannot be read; check its permissions.");
    if (text.size() > kMostJsonBytes) {
        throw Error(path.string() + " is larger than " + std::to_string(kMostJsonBytes) +
                    " bytes, the most that is read of it; export again.");
    }
    return text;
}

json parse_json(std::string_view text) {
    if (text.substr(0, 3) == "\xef\xbb\xbf")
        throw std::invalid_argument("it begins with a byte order mark");
    // The parser takes a NUL for the end, and would not look at what is behind.
    if (text.find('\0') != std::string_view::npos) throw std::invalid_argument("it holds a NUL");
    const auto bounded = [](int depth, json::parse_event_t, json &) {
        if (depth > kMostJsonDepth) {
            throw std::invalid_argument("it is nested more than " + std::to_string(kMostJsonDepth) +
                                        " deep");
        }
        return true;
    };
    try {
        return json::parse(text, bounded);
    } catch (const json::exception &error) {
        throw std::invalid_argument(plain(error.what(), 200));
    }
}

std::string plain(std::string_view text, std::size_t most) {
    constexpr const char *kDigits = "0123456789abcdef";
    std::string result;
    for (std::size_t n = 0; n < text.size(); ++n) {
        // The middle is left out, since what matters is often said at the end.
        if (text.size() > most && n == most / 2) {
            result += "...";
            n = text.size() - most / 2;
        }
        const auto byte = static_cast<unsigned char>(text[n]);
        if (byte == '\n') {
            result += ' ';
        } else if (byte < 0x20 || byte > 0x7e) {
            result += "\\x";
            result += kDigits[byte >> 4];
            result += kDigits[byte & 15];
        } else {
            result += text[n];
        }
    }
    return result;
}

std::string shown(const json &value) {
    switch (value.type()) {
        case json::value_t::string: return '"' + plain(value.get_ref<const std::string &>()) + '"';
        case json::value_t::object: return "an object of " + std::to_string(value.size());
        case json::value_t::array: return "a list of " + std::to_string(value.size());
        default:
            // Numbers, true, false and null are short, and nothing is inside of them.
            return value.dump();
    }
}

}  // namespace ingot
