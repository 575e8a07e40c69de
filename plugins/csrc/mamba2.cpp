// ingot::Mamba2Scan and the causal convolution: what a call launches, on which grids, in which
// workspace. The kernels are those of plugins/kernels/mamba2.py.
#include <algorithm>
#include <string>

#include "driver.h"
#include "plan_constants.h"
#include "tuning.h"

namespace ingot {
namespace {

constexpr int32_t kMaxBatch = 65535;     // a side of the grid
constexpr int32_t kMaxTokens = 1 << 30;  // indices of tokens are int32
constexpr int32_t kMaxHeads = 16384;     // and so are offsets in a tile
constexpr int32_t kMaxChannels = 1 << 26;

// How the 16-bit types are scanned from a compute capability on: tokens per chunk, a multiple of
// kTile, and what ends the names of the forms of states and outputs. A token and head cost
// 16 Pm Ns / Q bytes of states written and read, and 2 (4 Pm Ns + Q Pm) operations: longer chunks
// trade memory traffic for products. Measured on an H200, where 128 is the best of 64, 128 and 256 for
// a prompt of 1024 tokens or more and within a tenth of it for a shorter one. For the others these are
// the lengths for which the larger of both times is the least, by data sheets, for Pm 64, Ns 128 and a
// third of the tensor cores' peak.
struct Scan {
    int capability;
    int32_t chunk;
    const char *ending;
};
constexpr Scan kScans[] = {
    {80, 128, ""},  // A100: 153 operations a byte; A10: 208
    {89, 256, ""},  // L40S and L4: 420
    {90, 128, "_b64w8s2"},
    {100, 128, ""},  // B200: 281; RTX PRO 6000 Blackwell: 280
};

// A call that would need more workspace is done in parts. A part of this size, thousands of tokens of
// a large model, still has thousands of blocks in every launch: more at once would not be faster.
constexpr int64_t kScanBytes = int64_t{512} << 20;

int64_t tiles(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

ingot_status refuse(const std::string &message) { return fail(INGOT_BAD_ARGUMENT, message); }

std::string number(int64_t value) { return std::to_string(value); }

ingot_status check_dtype(const char *op, ingot_dtype dtype) {
    if (dtype >= INGOT_FLOAT32 && dtype <= INGOT_BFLOAT16) return INGOT_OK;
    return refuse(std::string(op) + " has no dtype " + number(dtype) +
                  "; use float32 (0), float16 (1) or bfloat16 (2).");
}

struct Pointer {
    const char *name;
    const void *value;
};

// An empty tensor may be null.
ingot_status check_pointers(const char *op, std::initializer_list<Pointer> pointers) {
    for (const Pointer &pointer : pointers) {
        if (pointer.value == nullptr) {
            return refuse(std::string(op) + " got null for " + pointer.name +
                          "; pass the address of a device tensor.");
        }
        if (reinterpret_cast<uintptr_t>(pointer.value) % 16 != 0) {
            return refuse(std::string(op) + " got " + pointer.name +
                          " at an address that is no multiple of 16 bytes; copy it to one.");
        }
    }
    return INGOT_OK;
}

ingot_status check_rows(const char *op, int32_t batch, int32_t tokens) {
    if (batch < 0 || batch > kMaxBatch || tokens < 0 || tokens > kMaxTokens) {
        return refuse(std::string(op) + " got batch " + number(batch) + " and tokens " +
                      number(tokens) + "; it takes up to " + number(kMaxBatch) + " and " +
                      number(kMaxTokens) + ", so split what is more.");
    }
    return INGOT_OK;
}

ingot_status check_sizes(const ingot_mamba2_scan_params &p) {
    constexpr const char *kOp = "Mamba2Scan";
    if (ingot_status s = check_dtype(kOp, p.dtype)) return s;
    if (ingot_status s = check_rows(kOp, p.batch, p.tokens)) return s;
    if (p.heads < 1 || p.heads > kMaxHeads) {
        return refuse("Mamba2Scan got " + number(p.heads) + " heads; it takes 1 to " +
                      number(kMaxHeads) + ".");
    }
    if (p.head_size < 1 || p.head_size > kMaxSide || p.states < 1 || p.states > kMaxSide) {
        return refuse("Mamba2Scan got head size " + number(p.head_size) + " and state size " +
                      number(p.states) + "; it takes 1 to " + number(kMaxSide) + " of each.");
    }
    if (p.groups < 1 || p.heads % p.groups != 0) {
        return refuse("Mamba2Scan got " + number(p.groups) + " groups for " + number(p.heads) +
                      " heads; the heads must be a multiple of the groups.");
    }
    if (!(p.dt_min <= p.dt_max)) {
        return refuse("Mamba2Scan got dt_min " + std::to_string(p.dt_min) + " above dt_max " +
                      std::to_string(p.dt_max) + "; exchange them.");
    }
    return INGOT_OK;
}

// Rows of the batch and tokens of them that are scanned together; the tokens begin a chunk.
struct Part {
    int64_t first_row, rows;
    int64_t first_token, tokens;
};

// A part in the workspace, float32; the kernels' comments have the shapes.
struct Memory {
    int64_t chunks;
    int64_t padded;  // tokens in whole chunks
    float *steps, *sums_high, *sums_low, *carried, *products;
    int64_t bytes;

    Memory(const ingot_mamba2_scan_params &p, int64_t rows, int64_t tokens, int32_t chunk,
           void *workspace) {
        chunks = tiles(tokens, chunk);
        padded = chunks * chunk;
        Workspace pieces(workspace);
        auto take = [&](int64_t count) {
            return static_cast<float *>(pieces.take(static_cast<size_t>(count) * sizeof(float)));
        };
        steps = take(rows * padded * p.heads);
        sums_high = take(rows * padded * p.heads);
        sums_low = take(rows * padded * p.heads);
        carried = take(rows * chunks * p.heads * p.head_size * p.states);
        products = take(rows * padded * p.groups * chunk);
        bytes = static_cast<int64_t>(pieces.used());
    }
};

int64_t bytes_of(const ingot_mamba2_scan_params &p, int64_t rows, int64_t tokens, int32_t chunk) {
    return Memory(p, rows, tokens, chunk, nullptr).bytes;
}

int64_t most_bytes() { return tuning().scan_bytes != 0 ? tuning().scan_bytes : kScanBytes; }

// A short prompt is one chunk, no longer than needed.
int32_t shortened(int32_t chunk, int32_t tokens) {
    return static_cast<int32_t>(std::min<int64_t>(chunk, tiles(tokens, kTile) * kTile));
}

// The chunk of a call, and what ends the names of its forms of states and outputs.
ingot_status choose_scan(const ingot_mamba2_scan_params &p, bool aligned, int32_t *chunk,
                         std::string *ending) {
    // A float32 product is three passes at half the rate: shorter chunks have fewer of them.
    *chunk = kTile;
    ending->clear();
    if (p.dtype != INGOT_FLOAT32) {
        int capability = 0;
        if (ingot_status s = compute_capability(&capability)) return s;
        for (const Scan &scan : kScans) {
            if (scan.capability > capability) continue;
            *chunk = scan.chunk;
            *ending = aligned ? scan.ending : "";
        }
        // Of a candidate both count, or it would be another one with every table.
        if (tuning().chunk != 0 || !tuning().scan_ending.empty()) *ending = tuning().scan_ending;
        if (tuning().chunk != 0) *chunk = tuning().chunk;
    }
    *chunk = shortened(*chunk, p.tokens);
    return INGOT_OK;
}

// The most of 1 to `total` whose bytes are within the limit, evened out over the parts; at least 1.
template <typename Bytes>
int64_t part_of(int64_t total, Bytes &&bytes) {
    int64_t fits = 1, beyond = total + 1;
    while (beyond - fits > 1) {
        const int64_t middle = fits + (beyond - fits) / 2;
        (bytes(middle) <= most_bytes() ? fits : beyond) = middle;
    }
    return tiles(total, tiles(total, fits));
}

// Parts of a call as large as the limit has room for, all of the size of this first one but the last
// of the rows and of the tokens: several whole rows, or, where one alone is too much, whole chunks of
// one row.
Part first_part(const ingot_mamba2_scan_params &p, int32_t chunk) {
    if (bytes_of(p, 1, p.tokens, chunk) <= most_bytes()) {
        // What fits is small enough for 64 bits; all rows together may not be.
        const int64_t rows = part_of(
            p.batch, [&](int64_t count) { return bytes_of(p, count, p.tokens, chunk); });
        return {0, rows, 0, p.tokens};
    }
    const int64_t chunks = part_of(tiles(p.tokens, chunk), [&](int64_t count) {
        return bytes_of(p, 1, count * chunk, chunk);
    });
    return {0, 1, 0, std::min<int64_t>(p.tokens, chunks * chunk)};
}

// The most that a call of these sizes or of smaller ones needs, with chunks of up to this length.
// The bytes of a call in one part grow with its rows and tokens, and a part is within the limit unless
// it is a single chunk of a single row; so the smaller of both bounds holds for every smaller call.
int64_t workspace_bound(const ingot_mamba2_scan_params &p, int32_t most_of_chunk) {
    const int32_t chunk = shortened(most_of_chunk, p.tokens);
    if (bytes_of(p, 1, p.tokens, chunk) > most_bytes()) {
        return std::max(most_bytes(), bytes_of(p, 1, chunk, chunk));
    }
    return std::min(most_bytes(), bytes_of(p, p.batch, p.tokens, chunk));
}

// Enough for every device: an engine reserves its workspace where it is built, and may run on a
// card whose chunks are of another length.
int64_t most_workspace(const ingot_mamba2_scan_params &p) {
    // One token needs none, and without rows nothing runs.
    if (p.tokens <= 1 || p.batch == 0) return 0;
    if (p.dtype == INGOT_FLOAT32) return workspace_bound(p, kTile);
    if (tuning().chunk != 0) return workspace_bound(p, tuning().chunk);
    int64_t most = 0;
    for (const Scan &scan : kScans) {
        most = std::max(most, workspace_bound(p, scan.chunk));
    }
    return most;
}

ingot_status step(const ingot_mamba2_scan_params &p, bool aligned, void *stream) {
    bool few = aligned && p.states <= kFewStates;
    std::string form = std::string("mamba2_step_") + dtype_name(p.dtype) +
                       (few ? "_n64" : aligned ? "_n128" : "_any");
    int64_t rows = few ? kStepRowsFew : kStepRows;
    return launch(form, {int64_t{p.batch} * p.heads, tiles(p.head_size, rows)},
                  {p.x, p.dt, p.a, p.b, p.c, p.d, p.dt_bias, p.state, p.mask, p.y, p.new_state,
                   p.heads, p.head_size, p.groups, p.states, p.dt_min, p.dt_max},
                  stream);
}

ingot_status scan_part(const ingot_mamba2_scan_params &p, const Part &part, int32_t chunk,
                       const std::string &ending, bool aligned, void *workspace, void *stream) {
    const Memory memory(p, part.rows, part.tokens, chunk, workspace);
    const std::string dtype = dtype_name(p.dtype);
    const std::string suffix = aligned ? "_aligned" : "_any";
    const int64_t rows = part.rows * p.heads;
    const int32_t padded = static_cast<int32_t>(memory.padded);
    const int32_t size = p.head_size * p.states;
    const int32_t first_row = static_cast<int32_t>(part.first_row);
    const int32_t first_token = static_cast<int32_t>(part.first_token);
    // Later tokens of a row start from the state that those before left.
    const float *state = part.first_token == 0 ? p.state : p.new_state;

    if (ingot_status s = launch(
            "mamba2_times_" + dtype, {tiles(p.heads, kTimesHeads), memory.chunks, part.rows},
            {p.dt, p.a, p.dt_bias, p.mask, memory.steps, memory.sums_high, memory.sums_low,
             p.tokens, p.heads, chunk, p.dt_min, p.dt_max, first_row, first_token},
            stream))
        return s;
    if (ingot_status s = launch(
            "mamba2_states_" + dtype + suffix + ending,
            {rows, tiles(p.head_size, kTile) * tiles(p.states, kTile), memory.chunks},
            {p.x, p.b, memory.steps, memory.sums_high, memory.sums_low, memory.carried, p.tokens,
             p.heads, p.head_size, p.groups, p.states, chunk, first_row, first_token},
            stream))
        return s;
    if (ingot_status s = launch("mamba2_carry" + suffix, {rows, tiles(size, kCarryBlock)},
                                {state, memory.sums_high, memory.sums_low, memory.carried,
                                 p.new_state, p.heads, size, static_cast<int32_t>(memory.chunks),
                                 chunk, first_row},
                                stream))
        return s;
    const int64_t token_tiles = tiles(part.tokens, kTile);
    if (ingot_status s = launch(
            "mamba2_products_" + dtype + suffix,
            {part.rows * p.groups, token_tiles, chunk / kTile},
            {p.b, p.c, memory.products, p.tokens, p.groups, p.states, chunk, padded, first_row,
             first_token},
            stream))
        return s;
    return launch("mamba2_outputs_" + dtype + suffix + ending,
                  {rows, tiles(p.head_size, kTile), token_tiles},
                  {p.x, p.c, p.d, memory.steps, memory.sums_high, memory.sums_low, memory.carried,
                   memory.products, p.y, p.tokens, p.heads, p.head_size, p.groups, p.states, chunk,
                   padded, first_row, first_token},
                  stream);
}

// Several tokens, or none: the state is passed on.
ingot_status scan(const ingot_mamba2_scan_params &p, bool aligned, void *workspace, size_t bytes,
                  void *stream) {
    int32_t chunk = kTile;
    std::string ending;
    Part part{0, p.batch, 0, 0};
    if (p.tokens > 0) {
        if (ingot_status s = choose_scan(p, aligned, &chunk, &ending)) return s;
        part = first_part(p, chunk);
        const int64_t needed = bytes_of(p, part.rows, part.tokens, chunk);
        if (ingot_status s = check_pointers("Mamba2Scan", {{"workspace", workspace}})) return s;
        if (ingot_status s = check_workspace("mamba2_scan", static_cast<size_t>(needed), bytes))
            return s;
    }
    const int64_t rows = part.rows, tokens = part.tokens;
    for (; part.first_row < p.batch; part.first_row += rows) {
        part.rows = std::min(rows, p.batch - part.first_row);
        part.first_token = 0;
        do {
            part.tokens = std::min(tokens, p.tokens - part.first_token);
            if (ingot_status s = scan_part(p, part, chunk, ending, aligned, workspace, stream)) return s;
            part.first_token += tokens;
        } while (part.first_token < p.tokens);
    }
    return INGOT_OK;
}

ingot_status check(const ingot_causal_conv_params &p) {
    constexpr const char *kOp = "CausalConv";
    if (ingot_status s = check_dtype(kOp, p.dtype)) return s;
    if (p.activation < INGOT_SILU || p.activation > INGOT_IDENTITY) {
        return refuse("CausalConv has no activation " + number(p.activation) +
                      "; use one of ingot_activation, 0 to " + number(INGOT_IDENTITY) + ".");
    }
    if (ingot_status s = check_rows(kOp, p.batch, p.tokens)) return s;
    if (p.channels < 1 || p.channels > kMaxChannels) {
        return refuse("CausalConv got " + number(p.channels) + " channels; it takes 1 to " +
                      number(kMaxChannels) + ".");
    }
    if (p.width < 1 || p.width > kMaxWidth) {
        return refuse("CausalConv got width " + number(p.width) + "; it takes 1 to " +
                      number(kMaxWidth) + ".");
    }
    if (p.batch == 0) return INGOT_OK;
    if (ingot_status s = check_pointers(kOp, {{"weight", p.weight}})) return s;
    if (p.bias != nullptr) {
        if (ingot_status s = check_pointers(kOp, {{"bias", p.bias}})) return s;
    }
    if (p.tokens > 0) {
        if (ingot_status s = check_pointers(kOp, {{"x", p.x}, {"y", p.y}})) return s;
    }
    if (p.width > 1) {
        if (ingot_status s =
                check_pointers(kOp, {{"state", p.state}, {"new_state", p.new_state}}))
            return s;
        if (p.tokens > 1 && p.new_state == p.state) {
            return refuse("CausalConv got new_state at the address of state for " +
                          number(p.tokens) + " tokens; give it memory of its own.");
        }
    }
    return INGOT_OK;
}

}  // namespace
}  // namespace ingot

ingot_status ingot_mamba2_scan_workspace(const ingot_mamba2_scan_params *params, size_t *bytes) {
    if (ingot_status s = ingot::check_sizes(*params)) return s;
    *bytes = static_cast<size_t>(ingot::most_workspace(*params));
    return INGOT_OK;
}

ingot_status ingot_mamba2_scan(const ingot_mamba2_scan_params *params, void *workspace,
                               size_t workspace_bytes, void *stream) {
    using namespace ingot;
    const ingot_mamba2_scan_params &p = *params;
    if (ingot_status s = check_sizes(p)) return s;
    if (p.batch == 0) return INGOT_OK;
    constexpr const char *kOp = "Mamba2Scan";
    if (ingot_status s =
            check_pointers(kOp, {{"state", p.state}, {"new_state", p.new_state}}))
        return s;
    if (p.tokens > 0) {
        if (ingot_status s = check_pointers(
                kOp, {{"x", p.x}, {"dt", p.dt}, {"a", p.a}, {"b", p.b}, {"c", p.c}, {"d", p.d},
                      {"dt_bias", p.dt_bias}, {"mask", p.mask}, {"y", p.y}}))
            return s;
    }
    const bool aligned = p.head_size % 16 == 0 && p.states % 16 == 0;
    if (p.tokens == 1) return step(p, aligned, stream);
    return scan(p, aligned, workspace, workspace_bytes, stream);
}

ingot_status ingot_causal_conv(const ingot_causal_conv_params *params, void *stream) {
    using namespace ingot;
    const ingot_causal_conv_params &p = *params;
    if (ingot_status s = check(p)) return s;
    // With no token the state is still passed on.
    const bool few = p.width <= kFewTaps && p.channels % 16 == 0;
    const int64_t block = p.tokens <= 1 ? 1 : few ? kConvTokensFewTaps : kConvTokensManyTaps;
    const int64_t token_tiles = p.tokens == 0 ? 1 : tiles(p.tokens, block);
    return launch(std::string("mamba2_conv_") + dtype_name(p.dtype) +
                      (p.tokens <= 1 ? "_one" : "_many") + (few ? "_w4" : "_any"),
                  {tiles(p.channels, kConvChannels) * token_tiles, p.batch},
                  {p.x, p.state, p.weight, p.bias, p.y, p.new_state, p.tokens, p.channels, p.width,
                   int32_t{p.bias != nullptr}, static_cast<int32_t>(p.activation)},
                  stream);
}
