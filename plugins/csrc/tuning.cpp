#include "tuning.h"

#include "driver.h"
#include "plan_constants.h"

namespace ingot {
namespace {

// The smallest is that of the forms for few tokens, which search their choices themselves.
constexpr int64_t kLeastRows = 2 * kFewRows;
constexpr int64_t kLeastColumns = 16;
constexpr int64_t kMostOfTile = 256;
constexpr int64_t kMostOfChunk = 512;   // offsets within a chunk are int32
constexpr int64_t kMostOfSlice = 1 << 24;  // times the most choices of a token, still an int32
constexpr int64_t kBytesUnit = 256;     // of the pieces of a workspace
constexpr int64_t kMostBytes = int64_t{1} << 40;

Tuning tuned;

ingot_status refuse(const std::string &name, int64_t value, const std::string &expected) {
    return fail(INGOT_BAD_ARGUMENT, name + " is " + std::to_string(value) + "; it must be " +
                                        expected + ", or 0 for the built-in choice.");
}

std::string between(int64_t least, int64_t most) {
    return "between " + std::to_string(least) + " and " + std::to_string(most);
}

ingot_status check_side(const char *name, int64_t value, int64_t least) {
    if (value == 0 || (value >= least && value <= kMostOfTile && (value & (value - 1)) == 0)) {
        return INGOT_OK;
    }
    return refuse(name, value, "a power of two " + between(least, kMostOfTile));
}

ingot_status check_multiple(const char *name, int64_t value, int64_t unit, int64_t most) {
    if (value >= 0 && value <= most && value % unit == 0) return INGOT_OK;
    return refuse(name, value, "a multiple of " + std::to_string(unit) + " " + between(unit, most));
}

ingot_status check(const ingot_tuning &t) {
    if (ingot_status s = check_side("tile_rows", t.tile_rows, kLeastRows)) return s;
    if (ingot_status s = check_side("tile_columns", t.tile_columns, kLeastColumns)) return s;
    if ((t.tile_rows == 0) != (t.tile_columns == 0)) {
        return fail(INGOT_BAD_ARGUMENT,
                    "one side of a tile is 0; set tile_rows and tile_columns both or neither.");
    }
    if (ingot_status s = check_multiple("chunk", t.chunk, kTile, kMostOfChunk)) return s;
    if (ingot_status s = check_multiple("slice_tokens", t.slice_tokens, kSliceUnit, kMostOfSlice))
        return s;
    return check_multiple("scan_bytes", t.scan_bytes, kBytesUnit, kMostBytes);
}

std::string ending(const char *variant) {
    return variant == nullptr || *variant == '\0' ? "" : std::string("_") + variant;
}

}  // namespace

const Tuning &tuning() { return tuned; }

}  // namespace ingot

ingot_status ingot_tune(const ingot_tuning *tuning) {
    using namespace ingot;
    if (tuning == nullptr) {
        tuned = Tuning{};
        return INGOT_OK;
    }
    if (ingot_status s = check(*tuning)) return s;
    tuned = Tuning{tuning->tile_rows,    tuning->tile_columns,         ending(tuning->tile_variant),
                   tuning->chunk,        ending(tuning->scan_variant), tuning->slice_tokens,
                   tuning->scan_bytes};
    return INGOT_OK;
}
