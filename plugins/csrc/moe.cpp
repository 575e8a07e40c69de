// Plans of ingot::MoeDispatch and ingot::MoeLinear: which forms of plugins/kernels/moe.py run, on what
// grid, in what memory. Nothing here depends on values, only on sizes and on the device.
#include <algorithm>
#include <climits>
#include <string>
#include <utility>

#include "driver.h"

namespace ingot {
namespace {

// What the forms were compiled for.
constexpr int kMaxExperts = 1024;      // BLOCK_E of the widest moe_route
constexpr int kMaxTopK = 64;           // BLOCK_K of moe_route
constexpr int64_t kScanChoices = 256;  // SCAN_CHOICES
constexpr int kOneColumns = 4;         // COLUMNS of the forms for one token
constexpr int kCombineBlock = 512;     // BLOCK of moe_combine

// Bounds that keep the kernels' 32-bit numbers from overflowing.
constexpr int64_t kMaxChoices = int64_t{1} << 30;
constexpr int32_t kMaxSide = 1 << 24;

// Up to so many tokens share one tile of rows, and the programs find their choices by themselves.
constexpr int64_t kFewTokens = 16;

struct Tile {
    int rows, columns;
};
constexpr Tile kFewTile{16, 32};
// Three products for one leave float32 no registers for more.
constexpr Tile kFloat32Tile{64, 32};
constexpr int kSmallestRows = 64;

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

enum class Path {
    kOne,      // one token: a matrix-vector product per choice
    kScanned,  // few: programs search the ids for their choices
    kGrouped   // many: the choices are sorted by expert first
};

struct Plan {
    Path path;
    Tile tile;
    int64_t choices;  // N * K
    int64_t tiles;    // of rows
    std::string flavour;
    int grain;  // sizes are passed in units of so many elements

    int64_t programs(int64_t features) const {
        return tiles * ((features + tile.columns - 1) / tile.columns);
    }

    std::string form(const char *use) const {
        std::string shape = path == Path::kOne
                                ? "_one_n" + std::to_string(tile.columns)
                                : "_m" + std::to_string(tile.rows) + "n" +
                                      std::to_string(tile.columns);
        return std::string("moe_") + use + shape + "_" + flavour;
    }
};

int64_t tile_slots(int64_t choices, int rows, int experts) { return choices / rows + experts + 1; }

// INGOT_FORCED_TILE is for benchmarks/tune_kernels.py, which times one tile after the other.
Tile grouped_tile([[maybe_unused]] int64_t choices, [[maybe_unused]] int32_t experts) {
#ifdef INGOT_FORCED_TILE
    return Tile{INGOT_FORCED_TILE};
#else
    // Without a device the launches say so.
    int capability = std::max(compute_capability(), kTilings[0].from_capability);
    Tile tile{};
    for (const Tiling &tiling : kTilings) {
        if (tiling.from_capability <= capability && tiling.from_rows * experts <= choices) {
            tile = tiling.tile;
        }
    }
    return tile;
#endif
}

// `repeats`: whether a token may choose an expert more than once.
Plan make_plan(ingot_dtype dtype, int32_t tokens, int32_t top_k, int32_t experts, bool repeats,
               int32_t side, int32_t other_side) {
    Plan plan{};
    plan.choices = int64_t{tokens} * top_k;
    plan.flavour = dtype_name(dtype);
    plan.grain = static_cast<int>(16 / dtype_size(dtype));
    if (side % plan.grain != 0 || other_side % plan.grain != 0) {
        plan.flavour += "_odd";
        plan.grain = 1;
    }
    if (tokens == 1) {
        plan.path = Path::kOne;
        plan.tile = {1, kOneColumns};
        plan.tiles = plan.choices;
    } else if (tokens <= kFewTokens && plan.choices <= kScanChoices) {
        plan.path = Path::kScanned;
        plan.tile = kFewTile;
        int64_t passes = repeats ? (plan.choices + kFewTile.rows - 1) / kFewTile.rows : 1;
        plan.tiles = passes * std::min<int64_t>(plan.choices, experts + 1);
    } else {
        plan.path = Path::kGrouped;
        plan.tile = dtype == INGOT_FLOAT32 ? kFloat32Tile : grouped_tile(plan.choices, experts);
        plan.tiles = tile_slots(plan.choices, plan.tile.rows, experts);
    }
    return plan;
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

ingot_status check_choices(int32_t tokens, int32_t top_k) {
    if (ingot_status s = check_range("tokens", tokens, 0, INT_MAX, "")) return s;
    return check_range("tokens * top_k", int64_t{tokens} * top_k, 0, kMaxChoices,
                       ": split the call into smaller ones");
}

// Memory that the choices of many tokens are sorted in.
struct Sorted {
    void *order = nullptr, *tiles = nullptr;

    // The size must not depend on the device, so room is made for the smallest tiles.
    void take(Workspace *workspace, const Plan &plan, int32_t experts) {
        if (plan.path != Path::kGrouped) return;
        order = workspace->take(plan.choices * sizeof(int32_t));
        tiles = workspace->take(3 * sizeof(int32_t) *
                                tile_slots(plan.choices, kSmallestRows, experts));
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
    if (ingot_status s = check_choices(p.tokens, p.top_k)) return s;
    if (ingot_status s = check_side("hidden", p.hidden, p.dtype)) return s;
    return check_side("intermediate", p.intermediate, p.dtype);
}

struct DispatchMemory {
    void *ids, *weights, *inner, *rows = nullptr;
    Sorted sorted;

    DispatchMemory(Workspace *workspace, const Plan &plan, const ingot_moe_dispatch_params &p) {
        // The forms for one token keep float32 between the two products.
        size_t inner_size = plan.path == Path::kOne ? sizeof(float) : dtype_size(p.dtype);
        ids = workspace->take(plan.choices * sizeof(int32_t));
        weights = workspace->take(plan.choices * sizeof(float));
        inner = workspace->take(plan.choices * p.intermediate * inner_size);
        if (plan.path != Path::kOne) {
            rows = workspace->take(plan.choices * p.hidden * sizeof(float));
        }
        sorted.take(workspace, plan, p.experts);
    }
};

Plan make_plan(const ingot_moe_dispatch_params &p) {
    return make_plan(p.dtype, p.tokens, p.top_k, p.experts, false, p.hidden, p.intermediate);
}

ingot_status run(const ingot_moe_dispatch_params &p, void *base, void *stream) {
    if (ingot_status s = check(p)) return s;
    if (p.tokens == 0) return INGOT_OK;
    const std::pair<const char *, const void *> pointers[] = {
        {"x", p.x},       {"router_logits", p.router_logits},
        {"gate_up", p.gate_up}, {"down", p.down},
        {"y", p.y},       {"workspace", base}};
    for (const auto &[name, pointer] : pointers) {
        if (ingot_status s = check_pointer(name, pointer)) return s;
    }
    Plan plan = make_plan(p);
    Workspace workspace(base);
    DispatchMemory memory(&workspace, plan, p);
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
        return launch(plan.form("down"), {(p.hidden + kOneColumns - 1) / kOneColumns},
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
    int64_t blocks = (p.hidden + kCombineBlock - 1) / kCombineBlock;
    return launch("moe_combine_" + plan.flavour, {p.tokens * blocks},
                  {memory.rows, memory.weights, p.y, p.top_k, hidden}, stream);
}

ingot_status check(const ingot_moe_linear_params &p) {
    if (ingot_status s = check_dtype(p.dtype)) return s;
    if (ingot_status s = check_range("experts", p.experts, 1, kMaxChoices, "")) return s;
    if (ingot_status s = check_range("top_k", p.top_k, 1, kMaxChoices, "")) return s;
    if (ingot_status s = check_choices(p.tokens, p.top_k)) return s;
    if (ingot_status s = check_side("in_features", p.in_features, p.dtype)) return s;
    return check_side("out_features", p.out_features, p.dtype);
}

Plan make_plan(const ingot_moe_linear_params &p) {
    return make_plan(p.dtype, p.tokens, p.top_k, p.experts, true, p.in_features, p.out_features);
}

ingot_status run(const ingot_moe_linear_params &p, void *base, void *stream) {
    if (ingot_status s = check(p)) return s;
    if (p.tokens == 0) return INGOT_OK;
    Plan plan = make_plan(p);
    const std::pair<const char *, const void *> pointers[] = {
        {"x", p.x}, {"expert_ids", p.expert_ids}, {"weight", p.weight}, {"y", p.y}};
    for (const auto &[name, pointer] : pointers) {
        if (ingot_status s = check_pointer(name, pointer)) return s;
    }
    int32_t choices = static_cast<int32_t>(plan.choices);
    int32_t in = p.in_features / plan.grain, out = p.out_features / plan.grain;
    int32_t choices_per_row = p.per_choice != 0 ? 1 : p.top_k;

    if (plan.path == Path::kOne) {
        return launch(plan.form("linear"), {plan.programs(p.out_features)},
                      {p.x, p.expert_ids, p.weight, p.y, choices_per_row, p.experts, in, out},
                      stream);
    }

    Workspace workspace(base);
    Sorted sorted;
    sorted.take(&workspace, plan, p.experts);
    const void *order = p.expert_ids;
    if (plan.path == Path::kGrouped) {
        if (ingot_status s = check_pointer("workspace", base)) return s;
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

size_t ingot_moe_dispatch_workspace(const ingot_moe_dispatch_params *params) {
    if (ingot::check(*params) != INGOT_OK) return 0;
    ingot::Workspace workspace(nullptr);
    ingot::DispatchMemory memory(&workspace, ingot::make_plan(*params), *params);
    return workspace.used();
}

ingot_status ingot_moe_dispatch(const ingot_moe_dispatch_params *params, void *workspace,
                                void *stream) {
    return ingot::run(*params, workspace, stream);
}

size_t ingot_moe_linear_workspace(const ingot_moe_linear_params *params) {
    if (ingot::check(*params) != INGOT_OK) return 0;
    ingot::Workspace workspace(nullptr);
    ingot::Sorted sorted;
    sorted.take(&workspace, ingot::make_plan(*params), params->experts);
    return workspace.used();
}

ingot_status ingot_moe_linear(const ingot_moe_linear_params *params, void *workspace,
                              void *stream) {
    return ingot::run(*params, workspace, stream);
}
