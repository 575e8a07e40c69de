// libingot_trt.so: Ingot's operators as TensorRT plugins, each one call of ingot_kernels.h.
//
// The tensors and fields repeat plugins/tensorrt/table.py, and tests compare the two.
#include "plugin.h"

namespace ingot {
namespace {

struct MoeDispatch {
    static constexpr const char *kName = "MoeDispatch";
    static constexpr Tensor kInputs[] = {{"x", Type::kT, "N H"},
                                         {"router_logits", Type::kFloat32, "N E"},
                                         {"gate_up", Type::kT, "E 2I H"},
                                         {"down", Type::kT, "E H I"}};
    static constexpr Tensor kOutputs[] = {{"y", Type::kT, "N H"}};
    using Parameters = ingot_moe_dispatch_params;

    int32_t top_k = 0, normalize = 0;
    ingot_activation activation = INGOT_SILU;

    template <typename Visit>
    void fields(const Visit &visit) {
        visit("top_k", top_k);
        visit("normalize", normalize);
        visit("activation", activation);
    }

    Parameters parameters(const Sizes &sizes, int32_t) const {
        Parameters p{};
        p.activation = activation;
        p.normalize = normalize;
        p.top_k = top_k;
        p.experts = sizes["E"];
        p.tokens = sizes["N"];
        p.hidden = sizes["H"];
        p.intermediate = sizes["I"];
        return p;
    }

    static void point(Parameters &p, const void *const *inputs, void *const *outputs) {
        store(inputs, p.x, p.router_logits, p.gate_up, p.down);
        store(outputs, p.y);
    }

    static ingot_status workspace(const Parameters &p, size_t *bytes) {
        return ingot_moe_dispatch_workspace(&p, bytes);
    }

    static ingot_status run(const Parameters &p, void *workspace, size_t bytes, void *stream) {
        return ingot_moe_dispatch(&p, workspace, bytes, stream);
    }
};

struct MoeLinear {
    static constexpr const char *kName = "MoeLinear";
    static constexpr Tensor kInputs[] = {{"x", Type::kT, "N Kin", "N K Kin"},
                                         {"expert_ids", Type::kInt64, "N K"},
                                         {"weight", Type::kT, "E O Kin"}};
    static constexpr Tensor kOutputs[] = {{"y", Type::kT, "N K O"}};
    using Parameters = ingot_moe_linear_params;

    template <typename Visit>
    void fields(const Visit &) {}

    Parameters parameters(const Sizes &sizes, int32_t first_rank) const {
        Parameters p{};
        p.per_choice = first_rank == 3;
        p.top_k = sizes["K"];
        p.experts = sizes["E"];
        p.tokens = sizes["N"];
        p.in_features = sizes["Kin"];
        p.out_features = sizes["O"];
        return p;
    }

    static void point(Parameters &p, const void *const *inputs, void *const *outputs) {
        store(inputs, p.x, p.expert_ids, p.weight);
        store(outputs, p.y);
    }

    static ingot_status workspace(const Parameters &p, size_t *bytes) {
        return ingot_moe_linear_workspace(&p, bytes);
    }

    static ingot_status run(const Parameters &p, void *workspace, size_t bytes, void *stream) {
        return ingot_moe_linear(&p, workspace, bytes, stream);
    }
};

struct Mamba2Scan {
    static constexpr const char *kName = "Mamba2Scan";
    static constexpr Tensor kInputs[] = {{"x", Type::kT, "B T Hm Pm"},
                                         {"dt", Type::kT, "B T Hm"},
                                         {"A", Type::kFloat32, "Hm"},
                                         {"B", Type::kT, "B T G Ns"},
                                         {"C", Type::kT, "B T G Ns"},
                                         {"D", Type::kFloat32, "Hm"},
                                         {"dt_bias", Type::kFloat32, "Hm"},
                                         {"state", Type::kFloat32, "B Hm Pm Ns"},
                                         {"mask", Type::kT, "B T"}};
    static constexpr Tensor kOutputs[] = {{"y", Type::kT, "B T Hm Pm"},
                                          {"new_state", Type::kFloat32, "B Hm Pm Ns"}};
    using Parameters = ingot_mamba2_scan_params;

    int32_t chunk_size = 0;  // the kernels choose their own, which changes no result
    float dt_min = 0, dt_max = 0;

    template <typename Visit>
    void fields(const Visit &visit) {
        visit("chunk_size", chunk_size);
        visit("dt_min", dt_min);
        visit("dt_max", dt_max);
    }

    Parameters parameters(const Sizes &sizes, int32_t) const {
        Parameters p{};
        p.batch = sizes["B"];
        p.tokens = sizes["T"];
        p.heads = sizes["Hm"];
        p.head_size = sizes["Pm"];
        p.groups = sizes["G"];
        p.states = sizes["Ns"];
        p.dt_min = dt_min;
        p.dt_max = dt_max;
        return p;
    }

    static void point(Parameters &p, const void *const *inputs, void *const *outputs) {
        store(inputs, p.x, p.dt, p.a, p.b, p.c, p.d, p.dt_bias, p.state, p.mask);
        store(outputs, p.y, p.new_state);
    }

    static ingot_status workspace(const Parameters &p, size_t *bytes) {
        return ingot_mamba2_scan_workspace(&p, bytes);
    }

    static ingot_status run(const Parameters &p, void *workspace, size_t bytes, void *stream) {
        return ingot_mamba2_scan(&p, workspace, bytes, stream);
    }
};

struct CausalConv {
    static constexpr const char *kName = "CausalConv";
    static constexpr Tensor kInputs[] = {{"x", Type::kT, "B T C"},
                                         {"state", Type::kT, "B C W-1"},
                                         {"weight", Type::kT, "C 1 W"},
                                         {"bias", Type::kT, "C"}};
    static constexpr Tensor kOutputs[] = {{"y", Type::kT, "B T C"},
                                          {"new_state", Type::kT, "B C W-1"}};
    using Parameters = ingot_causal_conv_params;

    ingot_activation activation = INGOT_SILU;

    template <typename Visit>
    void fields(const Visit &visit) {
        visit("activation", activation);
    }

    Parameters parameters(const Sizes &sizes, int32_t) const {
        Parameters p{};
        p.activation = activation;
        p.batch = sizes["B"];
        p.tokens = sizes["T"];
        p.channels = sizes["C"];
        p.width = sizes["W"];
        return p;
    }

    static void point(Parameters &p, const void *const *inputs, void *const *outputs) {
        store(inputs, p.x, p.state, p.weight, p.bias);
        store(outputs, p.y, p.new_state);
    }

    static ingot_status workspace(const Parameters &, size_t *bytes) {
        *bytes = 0;
        return INGOT_OK;
    }

    static ingot_status run(const Parameters &p, void *, size_t, void *stream) {
        return ingot_causal_conv(&p, stream);
    }
};

}  // namespace
}  // namespace ingot

#define INGOT_EXPORT extern "C" __attribute__((visibility("default")))

// What TensorRT's registry looks up in a plugin library.
INGOT_EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
    using namespace ingot;
    static Creator<MoeDispatch> moe_dispatch;
    static Creator<MoeLinear> moe_linear;
    static Creator<Mamba2Scan> mamba2_scan;
    static Creator<CausalConv> causal_conv;
    static nvinfer1::IPluginCreatorInterface *const creators[] = {&moe_dispatch, &moe_linear,
                                                                  &mamba2_scan, &causal_conv};
    count = std::size(creators);
    return creators;
}

INGOT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *) {
    // The logger is not used, since it has another layout in TensorRT 10 than in 11 and in
    // TensorRT-RTX, which may all load one plugin library.
}
