// Plans of ingot::MoeDispatch and ingot::MoeLinear: which forms of plugins/kernels/moe.py run, on what
// grid, in what memory. Nothing here depends on values, only on sizes and on the device; how much
// memory, on sizes alone.
#include <algorithm>
#include <climits>
#include <string>
#include <utility>

#include "driver.h"
#include "plan_constants.h"
#include "tuning.h"

namespace ingot {
namespace {

// Bounds that keep the kernels' 32-bit numbers from overflowing.
constexpr int64_t kMaxChoices = int64_t{1} << 30;
constexpr int32_t kMaxSide = 1 << 24;

// MoeDispatch takes so many tokens at once: what it keeps between its products would else grow with
// the call (OLMoE: 82 KB a token), while more tokens hardly make the products faster.
constexpr int64_t kSliceTokens = 8192;

struct Tile {
    int rows, columns;
};
// For so many tokens as it has rows; the programs find their choices by themselves.
constexpr Tile kFewTile{kFewRows, kFewColumns};
constexpr Tile kFloat32Tile{kFloat32Rows, kFloat32Columns};

// Tiles of the grouped products. A tall tile reads a weight less often, but an expert's last tile is
// half empty on average. Hopper and Blackwell's data centre chips (9.0, 10.0) keep sums outside of the
// ordinary registers or spread over four warps, so their tiles can be wider as well. Chosen from the
// registers and shared memory that the forms take, not yet from measured times.
struct Tiling {
    int from_capability;
    int64_t from_rows;  // mean number of choices of an expert
    Tile tile;
};
constexpr Tiling kTilings[] = {
    {80, 0, {64, 64}},  {80, 96, {128, 64}},    // Ampere, Ada
    {90, 0, {64, 64}},  {90, 96, {128, 128}},   // Hopper, B200
    {120, 0, {64, 64}}, {120, 96, {128, 64}},   // GeForce and RTX Blackwell
};

// Of the tiles that choices are sorted for.
constexpr int smallest_rows() {
    int rows = kFloat32Tile.rows;
    for (const Tiling &tiling : kTilings) rows = std::min(rows, tiling.tile.rows);
    return rows;
}

enum class Path {
    kOne,      // one token: a matrix-vector product per choice
    kScanned,  // few: programs search the ids for their choices
    kGrouped   // many: the choices are sorted by expert first
};

int64_t divided_up(int64_t size, int64_t by) { return (size + by - 1) / by; }

struct Plan {
    Path path;
    Tile tile;
    int64_t choices;  // N * K
    int64_t tiles;    // of rows
    std::string flavour;
    std::string ending;  // of the form's name, beside that
    int grain;  // sizes are passed in units of so many elements

    int64_t programs(int64_t features) const {
        return tiles * divided_up(features, tile.columns);
    }

    std::string form(const char *use) const {
        std::string shape = path == Path::kOne
                                ? "_one_n" + std::to_string(tile.columns)
                                : "_m" + std::to_string(tile.rows) + "n" +
                                      std::to_string(tile.columns);
        return std::string("moe_") + use + shape + "_" + flavour + ending;
    }
};

int64_t tile_slots(int64_t choices, int rows, int experts) { return choices / rows + experts + 1; }

// In 16 bits.
ingot_status grouped_tile(int64_t choices, int32_t experts, Tile *tile) {
    if (tuning().tile_rows != 0) {
        *tile = {tuning().tile_rows, tuning().tile_columns};
        return INGOT_OK;
    }
    int capability = 0;
    if (ingot_status s = compute_capability(&capability)) return s;
    // A device older than all of the table is refused when the forms are loaded.
    *tile = kTilings[0].tile;
    for (const Tiling &tiling : kTilings) {
        if (tiling.from_capability <= capability && tiling.from_rows * experts <= choices) {
            *tile = tiling.tile;
        }
    }
    return INGOT_OK;
}

Path path_of(int64_t tokens, int64_t choices) {
    if (tokens == 1) return Path::kOne;
    return tokens <= kFewTile.rows && choices <= kScanChoices ? Path::kScanned : Path::kGrouped;
}

// `repeats`: whether a token may choose an expert more than once.
ingot_status make_plan(ingot_dtype dtype, int32_t tokens, int32_t top_k, int32_t experts,
                       bool repeats, int32_t side, int32_t other_side, Plan *result) {
    Plan plan{};
    plan.choices = int64_t{tokens} * top_k;
    plan.path = path_of(tokens, plan.choices);
    plan.flavour = dtype_name(dtype);
    plan.grain = static_cast<int>(16 / dtype_size(dtype));
    if (side % plan.grain != 0 || other_side % plan.grain != 0) {
        plan.flavour += "_odd";
        plan.grain = 1;
    }
    if (plan.path == Path::kOne) {
        plan.tile = {1, kOneColumns};
        plan.tiles = plan.choices;
    } else if (plan.path == Path::kScanned) {
        plan.tile = kFewTile;
        int64_t passes = repeats ? divided_up(plan.choices, kFewTile.rows) : 1;
        plan.tiles = passes * std::min<int64_t>(plan.choices, experts + 1);
    } else {
        plan.tile = kFloat32Tile;
        if (dtype != INGOT_FLOAT32) {
            if (ingot_status s = grouped_tile(plan.choices, experts, &plan.tile)) return s;
            plan.ending = tuning().tile_ending;
        }
        plan.tiles = tile_slots(plan.choices, plan.tile.rows, experts);
    }
    *result = plan;
    return INGOT_OK;
}

ingot_status bad(const std::string &message) { return fail(INGOT_BAD_ARGUMENT, message); }

ingot_status check_range(const char *name, int64_t value, int64_t least, int64_t most,
                         const char *way_out) {
    if (value >= least && value <= most) return INGOT_OK;
    return bad(std::string(name) + " is " + std::to_string(value) + "; it must be between " +
               std::to_string(least) + " and " + std::to_string(most) + way_out + ".");
}

ingot_status check_side(const char *name, int32_t size, ingot_dtype dtype) {
    if (ingot_status s = check_range(name, size, 1, kMaxSide, "")) return s;
    if (dtype != INGOT_FLOAT32 && size % 8 != 0) {
        return bad(std::string(name) + " is " + std::to_string(size) +
                   "; the kernels need a multiple of 8 in fp16 and bf16: pad it or use fp32.");
    }
    return INGOT_OK;
}

ingot_status check_pointer(const char *name, const void *pointer) {
    if (pointer == nullptr) return bad(std::string(name) + " is null; pass its device address.");
    if (reinterpret_cast<uintptr_t>(pointer) % 16 != 0) {
        return bad(std::string(name) + " is not aligned to 16 bytes; copy it to where it is.");
    }
    return INGOT_OK;
}

ingot_status check_dtype(ingot_dtype dtype) {
    return check_range("dtype", dtype, INGOT_FLOAT32, INGOT_BFLOAT16, "");
}

ingot_status check_tokens(int32_t tokens) {
    return check_range("tokens", tokens, 0, INT_MAX, "");
}

// Memory that the choices of many tokens are sorted in.
struct Sorted {
    void *order = nullptr, *tiles = nullptr;

    // The size must not depend on the device, so room is made for the smallest tiles.
    void take(Workspace *workspace, Path path, int64_t choices, int32_t experts) {
        if (path != Path::kGrouped) return;
        const int tuned = tuning().tile_rows;
        const int rows = tuned == 0 ? smallest_rows() : std::min(tuned, smallest_rows());
        order = workspace->take(choices * sizeof(int32_t));
        tiles = workspace->take(3 * sizeof(int32_t) * tile_slots(choices, rows, experts));
    }
};

ingot_status launch_group(const char *form, const Plan &plan, const void *ids, int32_t experts,
                          const Sorted &sorted, void *stream) {
    return launch(form, {experts + 1},
                  {ids, sorted.order, sorted.tiles, static_cast<int32_t>(plan.choices), experts,
                   plan.tile.rows},
                  stream);
}

ingot_status check(const ingot_moe_dispatch_params &p) {
    if (ingot_status s = check_dtype(p.dtype)) return s;
    if (ingot_status s = check_range("activation", p.activation, INGOT_SILU, INGOT_IDENTITY, ""))
        return s;
    if (ingot_status s = check_range("experts", p.experts, 1, kMaxExperts, "")) return s;
    if (ingot_status s =
            check_range("top_k", p.top_k, 1, std::min(p.experts, kMaxTopK),
                        p.experts < kMaxTopK ? ", the number of experts" : ""))
        return s;
    if (ingot_status s = check_tokens(p.tokens)) return s;
    if (ingot_status s = check_side("hidden", p.hidden, p.dtype)) return s;
    return check_side("intermediate", p.intermediate, p.dtype);
}

struct DispatchMemory {
    void *ids, *weights, *inner, *rows = nullptr;
    Sorted sorted;

    // Of a call, or of one slice of it.
    DispatchMemory(Workspace *workspace, const ingot_moe_dispatch_params &p) {
        const int64_t choices = int64_t{p.tokens} * p.top_k;
        const Path path = path_of(p.tokens, choices);
        // The forms for one token keep float32 between the two products.
        size_t inner_size = path == Path::kOne ? sizeof(float) : dtype_size(p.dtype);
        ids = workspace->take(choices * sizeof(int32_t));
        weights = workspace->take(choices * sizeof(float));
        inner = workspace->take(choices * p.intermediate * inner_size);
        if (path != Path::kOne) rows = workspace->take(choices * p.hidden * sizeof(float));
        sorted.take(workspace, path, choices, p.experts);
    }
};

int64_t most_of_slice() {
    return tuning().slice_tokens != 0 ? tuning().slice_tokens : kSliceTokens;
}

// Tokens of each slice of a call but the last: nearly equal, so that none is left with a few.
int32_t slice_tokens(int32_t tokens) {
    if (tokens <= most_of_slice()) return tokens;
    const int64_t each = divided_up(tokens, divided_up(tokens, most_of_slice()));
    return static_cast<int32_t>(divided_up(each, kSliceUnit) * kSliceUnit);
}

size_t workspace_of(ingot_moe_dispatch_params p, int32_t tokens) {
    p.tokens = tokens;
    Workspace workspace(nullptr);
    DispatchMemory memory(&workspace, p);
    return workspace.used();
}

const void *at(const void *begin, int64_t elements, size_t size) {
    return static_cast<const char *>(begin) + elements * static_cast<int64_t>(size);
}

ingot_moe_dispatch_params slice_of(const ingot_moe_dispatch_params &p, int64_t begin,
                                   int64_t tokens) {
    const size_t size = dtype_size(p.dtype);
    ingot_moe_dispatch_params slice = p;
    slice.tokens = static_cast<int32_t>(tokens);
    slice.x = at(p.x, begin * p.hidden, size);
    slice.router_logits = p.router_logits + begin * p.experts;
    slice.y = const_cast<void *>(at(p.y, begin * p.hidden, size));
    return slice;
}

// A call of no more tokens than a slice has.
ingot_status run_slice(const ingot_moe_dispatch_params &p, void *base, void *stream) {
    Plan plan{};
    if (ingot_status s = make_plan(p.dtype, p.tokens, p.top_k, p.experts, false, p.hidden,
                                   p.intermediate, &plan))
        return s;
    Workspace workspace(base);
    DispatchMemory memory(&workspace, p);
    int32_t choices = static_cast<int32_t>(plan.choices);
    int32_t hidden = p.hidden / plan.grain, intermediate = p.intermediate / plan.grain;

    const char *route = p.experts <= 64    ? "moe_route_e64"
                        : p.experts <= 256 ? "moe_route_e256"
                                           : "moe_route_e1024";
    if (ingot_status s = launch(route, {p.tokens},
                                {p.router_logits, memory.ids, memory.weights, p.experts, p.top_k,
                                 p.normalize},
                                stream))
        return s;

    if (plan.path == Path::kOne) {
        if (ingot_status s = launch(plan.form("gate_up"), {plan.programs(p.intermediate)},
                                    {p.x, memory.ids, p.gate_up, memory.inner, hidden, intermediate,
                                     static_cast<int32_t>(p.activation)},
                                    stream))
            return s;
        return launch(plan.form("down"), {divided_up(p.hidden, kOneColumns)},
                      {memory.inner, memory.ids, memory.weights, p.down, p.y, p.top_k, hidden,
                       intermediate},
                      stream);
    }

    const void *order = memory.ids;
    if (plan.path == Path::kGrouped) {
        if (ingot_status s =
                launch_group("moe_group_i32", plan, memory.ids, p.experts, memory.sorted, stream))
            return s;
        order = memory.sorted.order;
    }
    if (ingot_status s = launch(plan.form("gate_up"), {plan.programs(p.intermediate)},
                                {p.x, order, memory.sorted.tiles, p.gate_up, memory.inner, choices,
                                 p.top_k, p.experts, hidden, intermediate,
                                 static_cast<int32_t>(p.activation)},
                                stream))
        return s;
    if (ingot_status s = launch(plan.form("down"), {plan.programs(p.hidden)},
                                {memory.inner, order, memory.sorted.tiles, p.down, memory.rows,
                                 choices, 1, p.experts, intermediate, hidden},
                                stream))
        return s;
    return launch("moe_combine_" + plan.flavour, {p.tokens * divided_up(p.hidden, kCombineBlock)},
                  {memory.rows, memory.weights, p.y, p.top_k, hidden}, stream);
}

ingot_status run(const ingot_moe_dispatch_params &p, void *base, size_t bytes, void *stream) {
    if (ingot_status s = check(p)) return s;
    if (p.tokens == 0) return INGOT_OK;
    const std::pair<const char *, const void *> pointers[] = {
        {"x", p.x},       {"router_logits", p.router_logits},
        {"gate_up", p.gate_up}, {"down", p.down},
        {"y", p.y},       {"workspace", base}};
    for (const auto &[name, pointer] : pointers) {
        if (ingot_status s = check_pointer(name, pointer)) return s;
    }
    const int32_t each = slice_tokens(p.tokens);
    if (ingot_status s = check_workspace("moe_dispatch", workspace_of(p, each), bytes)) return s;
    for (int64_t begin = 0; begin < p.tokens; begin += each) {
        const int64_t tokens = std::min<int64_t>(each, p.tokens - begin);
        if (ingot_status s = run_slice(slice_of(p, begin, tokens), base, stream)) return s;
    }
    return INGOT_OK;
}

ingot_status check(const ingot_moe_linear_params &p) {
    if (ingot_status s = check_dtype(p.dtype)) return s;
    if (ingot_status s = check_range("experts", p.experts, 1, kMaxChoices, "")) return s;
    if (ingot_status s = check_range("top_k", p.top_k, 1, kMaxChoices, "")) return s;
    if (ingot_status s = check_tokens(p.tokens)) return s;
    if (ingot_status s = check_range("tokens * top_k", int64_t{p.tokens} * p.top_k, 0, kMaxChoices,
                                     ": split the call into smaller ones"))
        return s;
    if (ingot_status s = check_side("in_features", p.in_features, p.dtype)) return s;
    return check_side("out_features", p.out_features, p.dtype);
}

Sorted take(Workspace *workspace, const ingot_moe_linear_params &p) {
    const int64_t choices = int64_t{p.tokens} * p.top_k;
    Sorted sorted;
    sorted.take(workspace, path_of(p.tokens, choices), choices, p.experts);
    return sorted;
}

ingot_status run(const ingot_moe_linear_params &p, void *base, size_t bytes, void *stream) {
    if (ingot_status s = check(p)) return s;
    if (p.tokens == 0) return INGOT_OK;
    const std::pair<const char *, const void *> pointers[] = {
        {"x", p.x}, {"expert_ids", p.expert_ids}, {"weight", p.weight}, {"y", p.y}};
    for (const auto &[name, pointer] : pointers) {
        if (ingot_status s = check_pointer(name, pointer)) return s;
    }
    Workspace workspace(base);
    const Sorted sorted = take(&workspace, p);
    if (workspace.used() > 0) {
        if (ingot_status s = check_pointer("workspace", base)) return s;
    }
    if (ingot_status s = check_workspace("moe_linear", workspace.used(), bytes)) return s;
    Plan plan{};
    if (ingot_status s = make_plan(p.dtype, p.tokens, p.top_k, p.experts, true, p.in_features,
                                   p.out_features, &plan))
        return s;
    int32_t choices = static_cast<int32_t>(plan.choices);
    int32_t in = p.in_features / plan.grain, out = p.out_features / plan.grain;
    int32_t choices_per_row = p.per_choice != 0 ? 1 : p.top_k;

    if (plan.path == Path::kOne) {
        return launch(plan.form("linear"), {plan.programs(p.out_features)},
                      {p.x, p.expert_ids, p.weight, p.y, choices_per_row, p.experts, in, out},
                      stream);
    }

    const void *order = p.expert_ids;
    if (plan.path == Path::kGrouped) {
        if (ingot_status s =
                launch_group("moe_group_i64", plan, p.expert_ids, p.experts, sorted, stream))
            return s;
        order = sorted.order;
    }
    return launch(plan.form("linear"), {plan.programs(p.out_features)},
                  {p.x, order, sorted.tiles, p.weight, p.y, choices, choices_per_row, p.experts, in,
                   out},
                  stream);
}

}  // namespace
}  // namespace ingot

ingot_status ingot_moe_dispatch_workspace(const ingot_moe_dispatch_params *params, size_t *bytes) {
    if (ingot_status s = ingot::check(*params)) return s;
    // Not the slice of this call: fewer tokens may have a larger one.
    const int64_t tokens = std::min<int64_t>(params->tokens, ingot::most_of_slice());
    *bytes = ingot::workspace_of(*params, static_cast<int32_t>(tokens));
    return INGOT_OK;
}

ingot_status ingot_moe_dispatch(const ingot_moe_dispatch_params *params, void *workspace,
                                size_t workspace_bytes, void *stream) {
    return ingot::run(*params, workspace, workspace_bytes, stream);
}

ingot_status ingot_moe_linear_workspace(const ingot_moe_linear_params *params, size_t *bytes) {
    if (ingot_status s = ingot::check(*params)) return s;
    ingot::Workspace workspace(nullptr);
    ingot::take(&workspace, *params);
    *bytes = workspace.used();
    return INGOT_OK;
}

ingot_status ingot_moe_linear(const ingot_moe_linear_params *params, void *workspace,
                              size_t workspace_bytes, void *stream) {
    return ingot::run(*params, workspace, workspace_bytes, stream);
}
