// ingot::Mamba2Scan and the causal convolution: what a call launches, on which grids, from which
// workspace. The kernels are those of plugins/kernels/mamba2.py.
#include <cmath>
#include <string>

#include "driver.h"

namespace ingot {
namespace {

// Tiles of the kernels in plugins/kernels/mamba2.py.
constexpr int64_t kStepRows = 8;         // BLOCK_P of mamba2_step, states above kFewStates
constexpr int64_t kStepRowsFew = 16;     // and up to there
constexpr int32_t kFewStates = 64;
constexpr int64_t kTile = 64;            // BLOCK_T, BLOCK_P and BLOCK_N of the chunked form
constexpr int64_t kTimesHeads = 16;      // BLOCK_H of mamba2_times
constexpr int64_t kCarryBlock = 512;     // BLOCK of mamba2_carry
constexpr int64_t kConvChannels = 128;   // BLOCK_C of mamba2_conv
constexpr int64_t kConvTokensFewTaps = 16;  // BLOCK_T of mamba2_conv_*_many, up to four taps
constexpr int64_t kConvTokensManyTaps = 4;  // and up to eight
constexpr int32_t kFewTaps = 4;

constexpr int32_t kMaxBatch = 65535;     // a side of the grid
constexpr int32_t kMaxTokens = 1 << 30;  // indices of tokens are int32
constexpr int32_t kMaxHeads = 16384;     // and so are offsets in a tile
constexpr int32_t kMaxSide = 256;
constexpr int32_t kMaxChannels = 1 << 26;
constexpr int32_t kMaxWidth = 8;

// Tokens per chunk of the 16-bit types, a multiple of kTile, from a compute capability on. A token
// and head cost 16 Pm Ns / Q bytes of states written and read, and 2 (4 Pm Ns + Q Pm) operations:
// longer chunks trade memory traffic for products. With these lengths the larger of both times is
// the least, for Pm 64, Ns 128 and a third of the tensor cores' peak: data sheets, not measured.
struct ChunkLength {
    int capability;
    int32_t tokens;
};
constexpr ChunkLength kChunkLengths[] = {
    {80, 128},  // A100: 153 operations a byte; A10: 208
    {89, 256},  // L40S and L4: 420
    {90, 128},  // H200: 206; B200: 281; RTX PRO 6000 Blackwell: 280
};

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

// How several tokens are cut into chunks; all zero for one token, which needs no workspace.
struct Plan {
    int32_t chunk;
    int64_t chunks;
    int64_t padded;  // tokens in whole chunks
    // Float32 in the workspace; the kernels' comments have the shapes.
    float *steps, *sums_high, *sums_low, *carried, *products;
    size_t workspace;
};

int32_t chunk_length(const ingot_mamba2_scan_params &p, int capability) {
    // A float32 product is three passes at half the rate: shorter chunks have fewer of them.
    if (p.dtype == INGOT_FLOAT32) return kTile;
    int32_t tokens = kTile;
    for (const ChunkLength &length : kChunkLengths) {
        if (length.capability <= capability) tokens = length.tokens;
    }
#ifdef INGOT_FORCED_CHUNK
    // For benchmarks/tune_kernels.py, which times one length after the other.
    tokens = INGOT_FORCED_CHUNK;
#endif
    // A short prompt is one chunk, no longer than needed.
    int64_t needed = tiles(p.tokens > 0 ? p.tokens : 1, kTile) * kTile;
    return static_cast<int32_t>(needed < tokens ? needed : tokens);
}

Plan plan(const ingot_mamba2_scan_params &p, int32_t chunk, void *workspace) {
    Plan result{};
    if (p.tokens == 1) return result;
    result.chunk = chunk;
    result.chunks = tiles(p.tokens, result.chunk);
    result.padded = result.chunks * result.chunk;
    Workspace pieces(workspace);
    auto take = [&](int64_t count) {
        return static_cast<float *>(pieces.take(static_cast<size_t>(count) * sizeof(float)));
    };
    int64_t of_tokens = p.batch * result.padded;
    result.steps = take(of_tokens * p.heads);
    result.sums_high = take(of_tokens * p.heads);
    result.sums_low = take(of_tokens * p.heads);
    result.carried = take(p.batch * result.chunks * p.heads * p.head_size * p.states);
    result.products = take(of_tokens * p.groups * result.chunk);
    result.workspace = pieces.used();
    return result;
}

// Enough for every device: an engine reserves its workspace where it is built, and may run on a
// card whose chunks are of another length.
size_t most_workspace(const ingot_mamba2_scan_params &p) {
    size_t most = plan(p, chunk_length(p, 0), nullptr).workspace;
    for (const ChunkLength &length : kChunkLengths) {
        size_t size = plan(p, chunk_length(p, length.capability), nullptr).workspace;
        if (size > most) most = size;
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

ingot_status chunks(const ingot_mamba2_scan_params &p, const Plan &plan, bool aligned,
                    void *stream) {
    const std::string dtype = dtype_name(p.dtype);
    const std::string suffix = aligned ? "_aligned" : "_any";
    const int64_t rows = int64_t{p.batch} * p.heads;
    const int32_t padded = static_cast<int32_t>(plan.padded);
    const int32_t size = p.head_size * p.states;

    if (ingot_status s = launch(
            "mamba2_times_" + dtype, {tiles(p.heads, kTimesHeads), plan.chunks, p.batch},
            {p.dt, p.a, p.dt_bias, p.mask, plan.steps, plan.sums_high, plan.sums_low, p.tokens,
             p.heads, plan.chunk, p.dt_min, p.dt_max},
            stream))
        return s;
    if (ingot_status s = launch(
            "mamba2_states_" + dtype + suffix,
            {rows, tiles(p.head_size, kTile) * tiles(p.states, kTile), plan.chunks},
            {p.x, p.b, plan.steps, plan.sums_high, plan.sums_low, plan.carried, p.tokens, p.heads,
             p.head_size, p.groups, p.states, plan.chunk},
            stream))
        return s;
    if (ingot_status s = launch("mamba2_carry" + suffix, {rows, tiles(size, kCarryBlock)},
                                {p.state, plan.sums_high, plan.sums_low, plan.carried, p.new_state,
                                 p.heads, size, static_cast<int32_t>(plan.chunks), plan.chunk},
                                stream))
        return s;
    const int64_t token_tiles = tiles(p.tokens, kTile);
    if (ingot_status s = launch(
            "mamba2_products_" + dtype + suffix,
            {int64_t{p.batch} * p.groups, token_tiles, token_tiles == 0 ? 0 : plan.chunk / kTile},
            {p.b, p.c, plan.products, p.tokens, p.groups, p.states, plan.chunk, padded}, stream))
        return s;
    return launch("mamba2_outputs_" + dtype + suffix,
                  {rows, tiles(p.head_size, kTile), token_tiles},
                  {p.x, p.c, p.d, plan.steps, plan.sums_high, plan.sums_low, plan.carried,
                   plan.products, p.y, p.tokens, p.heads, p.head_size, p.groups, p.states,
                   plan.chunk, padded},
                  stream);
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

size_t ingot_mamba2_scan_workspace(const ingot_mamba2_scan_params *params) {
    // What is refused here is refused again, and reported, by the call itself.
    if (ingot::check_sizes(*params) != INGOT_OK) return 0;
    return ingot::most_workspace(*params);
}

ingot_status ingot_mamba2_scan(const ingot_mamba2_scan_params *params, void *workspace,
                               void *stream) {
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
    // Without a device the plan is any plan, and the first launch reports what is missing.
    const Plan planned = plan(p, chunk_length(p, compute_capability()), workspace);
    if (planned.workspace > 0) {
        if (ingot_status s = check_pointers(kOp, {{"workspace", workspace}})) return s;
    }
    return chunks(p, planned, aligned, stream);
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
