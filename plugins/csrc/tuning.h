// Candidates that ingot_tune() puts in place of the built-in choices.
#pragma once

#include <cstdint>
#include <string>

namespace ingot {

// A slice begins at a multiple of so many tokens, where every tensor is aligned to 16 bytes.
constexpr int64_t kSliceUnit = 16;

// Zero and empty stand for the built-in choice.
struct Tuning {
    int32_t tile_rows = 0, tile_columns = 0;
    std::string tile_ending;  // "_" and the variant, or empty
    int32_t chunk = 0;
    std::string scan_ending;
    int32_t slice_tokens = 0;
    int64_t scan_bytes = 0;
};

const Tuning &tuning();

}  // namespace ingot
