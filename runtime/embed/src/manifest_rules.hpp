// The rules of ingot.json, which may come from somebody else. docs/embedding.md lists them.
#pragma once

#include <ingot/manifest.hpp>

#include <string_view>

namespace ingot {

// What the text of an ingot.json says. `path` is what messages call it.
//
// Throws Error: another schema version, or the first value that is not what the rules say.
Manifest parse_manifest(std::string_view text, const std::string &path);

// Whether a file's name is relative and stays below its folder, on every system.
bool is_relative_name(const std::string &name);

}  // namespace ingot
