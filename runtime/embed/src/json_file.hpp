// The one reader of JSON files, all of which may come from somebody else, and how messages quote
// them.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

namespace ingot {

// The limits of the Python reader, plugins/json_file.py.
constexpr std::size_t kMostJsonBytes = std::size_t{8} << 20;
constexpr int kMostJsonDepth = 64;

// The bytes of a file, at most `kMostJsonBytes`. Throws Error: it cannot be read, or is larger.
std::string read_text(const std::filesystem::path &path);

// What JSON text in UTF-8 holds. A recursion over it ends, since it is `kMostJsonDepth` deep at
// most.
//
// Throws std::invalid_argument: no JSON, nested deeper, or with a byte order mark or a NUL.
nlohmann::json parse_json(std::string_view text);

// Text of somebody else on one line of a message: cut where it is long, and everything but
// printable ASCII escaped, so that it can neither fill nor drive a terminal.
std::string plain(std::string_view text, std::size_t most = 80);

// A value as a message quotes it: `plain` in quotation marks, a number, or what kind of thing it
// is.
std::string shown(const nlohmann::json &value);

}  // namespace ingot
