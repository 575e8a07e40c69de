// The kernels as ONNX Runtime's custom operators: libingot_ort.so.
//
// Of the domain "ingot", version 1, what plugins/<operator>.py says, in float32: Mamba2Scan and
// CausalConv. Of the domain "ingot.cpu", version 1, operators for weights in panels; what a weight
// is, attributes say:
//
//   Linear       x [..., K], weight, bias [O], residual [..., O] (both optional) -> y [..., O]
//   Linears      x [..., K], weights -> y [..., O] of each
//   Mlp          x [..., H], gate, up, down, residual [..., H] (optional) -> y [..., H]
//   Embedding    ids [...], weight -> y [..., K]
//   Attention    query [B, T, Hq*D], key, value [B, T, Hk*D], past_key, past_value [B, Hk, C, D],
//                visible [B, 1, T, S] bool, cos, sin [B, T, R/2] (both optional)
//                -> y [B, T, Hq*D], present_key, present_value [B, Hk, max(C, S), D]; of S tokens in
//                a cache the last T are the new ones, and what lies behind S is spare room
//   Mamba2Mixer  projected [B, T, I + C + Hm], mask [B, T], conv state [B, C, W-1], state
//                [B, Hm, Pm, Ns], conv weight [C, 1, W], conv bias [C], A, D, dt_bias [Hm], norm [I]
//                (optional) -> y [B, T, I] and both states; of ingot_cpu.h's formula
//   MoeDispatch  x [N, H], router_logits [N, E], gate_up, down -> y [N, H]
//   MoeLinear    x [N, K] or [N, choices, K], expert_ids [N, choices], weight -> y [N, choices, O]
//
// A weight is uint8, of any shape: its bytes have to be those of the sizes that the attributes
// name. A graph may be anybody's, so every size is held against the tensors before a kernel runs.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#define ORT_API_MANUAL_INIT
#include "onnxruntime_cxx_api.h"
#undef ORT_API_MANUAL_INIT

#include "ingot_cpu.h"

namespace {

constexpr const char *kDomain = "ingot";
constexpr const char *kPanelsDomain = "ingot.cpu";

[[noreturn]] void refuse(const std::string &why) { throw std::runtime_error(why); }

void require(bool holds, const std::string &why) {
    if (!holds) refuse(why);
}

void check(int status) {
    if (status) refuse(ingot_cpu_last_error());
}

// The session's own threads.
struct Threads : ingot_cpu_threads {
    explicit Threads(Ort::KernelContext &context) {
        self = &context;
        run = [](void *self, size_t count, void (*task)(void *, size_t), void *data) {
            static_cast<Ort::KernelContext *>(self)->ParallelFor(task, count, 0, data);
        };
    }
};

struct Attributes {
    const Ort::ConstKernelInfo &info;

    int64_t integer(const std::string &name) const { return info.GetAttribute<int64_t>(name.c_str()); }

    // Sizes of a graph may be anything; the product of two has to stay an int64.
    int64_t size(const std::string &name) const {
        const int64_t value = integer(name);
        require(value >= 1 && value <= INT32_MAX, name + " is " + std::to_string(value) + "; it may be 1 to 2147483647");
        return value;
    }

    float number(const std::string &name) const { return info.GetAttribute<float>(name.c_str()); }

    std::string text(const std::string &name) const { return info.GetAttribute<std::string>(name.c_str()); }

    ingot_cpu_format format(const std::string &prefix = "") const {
        static const char *const kNames[] = {"float32", "bfloat16", "int8", "int4"};
        const std::string numbers = text(prefix + "numbers");
        for (int32_t i = 0; i < 4; ++i)
            if (numbers == kNames[i]) return {i, int32_t(integer(prefix + "block")), integer(prefix + "zero_points") != 0};
        refuse("there are no weights in \"" + numbers + "\"");
    }

    int32_t rounding() const {
        const int64_t value = integer("round_activations");
        require(value >= INGOT_CPU_EXACT && value <= INGOT_CPU_TO_BFLOAT16, "round_activations is not 0, 1 or 2");
        return int32_t(value);
    }

    // Of each of some weights.
    std::vector<int64_t> sizes(const std::string &name) const {
        const auto values = info.GetAttributes<int64_t>(name.c_str());
        for (const int64_t value : values) require(value >= 1 && value <= INT32_MAX, name + " has a size that is not 1 to 2147483647");
        return values;
    }

    int32_t activation() const {
        static const char *const kNames[] = {"silu", "gelu", "gelu_tanh", "relu", "identity"};
        const std::string name = text("activation");
        for (int32_t i = 0; i < 5; ++i)
            if (name == kNames[i]) return i;
        refuse("there is no activation \"" + name + "\"");
    }
};

std::vector<int64_t> shape_of(const Ort::ConstValue &value) {
    return value.GetTensorTypeAndShapeInfo().GetShape();
}

int64_t count_of(const Ort::ConstValue &value) {
    return int64_t(value.GetTensorTypeAndShapeInfo().GetElementCount());
}

std::string written(const std::vector<int64_t> &shape) {
    std::string result = "[";
    for (size_t i = 0; i < shape.size(); ++i) result += (i ? ", " : "") + std::to_string(shape[i]);
    return result + "]";
}

// The bytes of `matrices` weights [rows, columns].
const void *weight_of(const Ort::ConstValue &value, const char *name, const ingot_cpu_format &format,
                      int64_t rows, int64_t columns, int64_t matrices = 1) {
    const size_t bytes = ingot_cpu_weight_bytes(&format, rows, columns);
    if (!bytes) refuse(ingot_cpu_last_error());
    const int64_t found = count_of(value);
    require(found % matrices == 0 && size_t(found / matrices) == bytes,
            std::string(name) + " has " + std::to_string(found) + " bytes; of " + std::to_string(matrices) +
                " x [" + std::to_string(rows) + ", " + std::to_string(columns) + "] it would be " +
                std::to_string(bytes) + " each");
    return value.GetTensorData<uint8_t>();
}

struct Type {
    ONNXTensorElementDataType type;
    bool optional = false;
    bool variadic = false;
};

constexpr Type kFloat{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};
constexpr Type kInt64{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64};
constexpr Type kBytes{ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8};
constexpr Type kBool{ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL};
constexpr Type kPerhaps{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, true};

// The last size of x is this; the shape of what a weight of `out` rows makes of it.
std::vector<int64_t> shape_behind(const Ort::ConstValue &x, int64_t in, int64_t out) {
    auto shape = shape_of(x);
    require(!shape.empty() && shape.back() == in,
            "x is " + written(shape) + "; its rows have to have " + std::to_string(in) + " numbers");
    shape.back() = out;
    return shape;
}

// An input that may be missing.
Ort::ConstValue optional_input(const Ort::KernelContext &context, size_t index) {
    return context.GetInputCount() > index ? context.GetInput(index) : Ort::ConstValue{};
}

// What is added to a result of this shape; null where nothing is.
const float *residual_of(const Ort::ConstValue &given, const std::vector<int64_t> &shape) {
    if (!given) return nullptr;
    require(shape_of(given) == shape, "residual is " + written(shape_of(given)) + " and has to be " + written(shape));
    return given.GetTensorData<float>();
}

struct Linear {
    static constexpr const char *kName = "Linear", *kIn = kPanelsDomain;
    static constexpr Type kInputs[] = {kFloat, kBytes, kPerhaps, kPerhaps};
    static constexpr Type kOutputs[] = {kFloat};

    explicit Linear(const Attributes &given)
        : format(given.format()),
          rounding(given.rounding()),
          scale(given.number("scale")),
          in(given.size("in_features")),
          out(given.size("out_features")) {}

    void compute(Ort::KernelContext &context) const {
        const auto x = context.GetInput(0), weight = context.GetInput(1);
        const auto shape = shape_behind(x, in, out);
        const float *bias = nullptr;
        if (const auto given = optional_input(context, 2)) {
            require(count_of(given) == out, "bias is " + written(shape_of(given)) + " and has to have " +
                                                std::to_string(out) + " numbers");
            bias = given.GetTensorData<float>();
        }
        const ingot_cpu_linear_output output{
            out, weight_of(weight, "the weight", format, out, in), bias,
            residual_of(optional_input(context, 3), shape), scale,
            context.GetOutput(0, shape).GetTensorMutableData<float>()};
        const ingot_cpu_linear_params params{format, rounding, 1, count_of(x) / in, in, x.GetTensorData<float>(), &output};
        const Threads threads(context);
        check(ingot_cpu_linear(&params, &threads));
    }

    ingot_cpu_format format;
    int32_t rounding;
    float scale;
    int64_t in, out;
};

struct Linears {
    static constexpr const char *kName = "Linears", *kIn = kPanelsDomain;
    static constexpr Type kInputs[] = {kFloat, {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, false, true}};
    static constexpr Type kOutputs[] = {{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, false, true}};

    explicit Linears(const Attributes &given)
        : format(given.format()),
          rounding(given.rounding()),
          in(given.size("in_features")),
          out(given.sizes("out_features")) {}

    void compute(Ort::KernelContext &context) const {
        const auto x = context.GetInput(0);
        require(context.GetInputCount() == out.size() + 1 && context.GetOutputCount() == out.size(),
                "there is a weight and an output for each of out_features");
        std::vector<ingot_cpu_linear_output> outputs;
        for (size_t i = 0; i < out.size(); ++i)
            outputs.push_back({out[i], weight_of(context.GetInput(i + 1), "a weight", format, out[i], in), nullptr,
                               nullptr, 1,
                               context.GetOutput(i, shape_behind(x, in, out[i])).GetTensorMutableData<float>()});
        const ingot_cpu_linear_params params{format, rounding, int32_t(out.size()), count_of(x) / in, in,
                                             x.GetTensorData<float>(), outputs.data()};
        const Threads threads(context);
        check(ingot_cpu_linear(&params, &threads));
    }

    ingot_cpu_format format;
    int32_t rounding;
    int64_t in;
    std::vector<int64_t> out;
};

struct Mlp {
    static constexpr const char *kName = "Mlp", *kIn = kPanelsDomain;
    static constexpr Type kInputs[] = {kFloat, kBytes, kBytes, kBytes, kPerhaps};
    static constexpr Type kOutputs[] = {kFloat};

    explicit Mlp(const Attributes &given)
        : gate_up(given.format("gate_up_")),
          down(given.format("down_")),
          rounding(given.rounding()),
          activation(given.activation()),
          scale(given.number("scale")),
          hidden(given.size("hidden")),
          intermediate(given.size("intermediate")) {}

    void compute(Ort::KernelContext &context) const {
        const auto x = context.GetInput(0);
        const auto shape = shape_behind(x, hidden, hidden);
        const ingot_cpu_mlp_params params{
            gate_up, down, rounding, activation, count_of(x) / hidden, hidden, intermediate, x.GetTensorData<float>(),
            weight_of(context.GetInput(1), "gate", gate_up, intermediate, hidden),
            weight_of(context.GetInput(2), "up", gate_up, intermediate, hidden),
            weight_of(context.GetInput(3), "down", down, hidden, intermediate),
            residual_of(optional_input(context, 4), shape), scale,
            context.GetOutput(0, shape).GetTensorMutableData<float>()};
        const Threads threads(context);
        check(ingot_cpu_mlp(&params, &threads));
    }

    ingot_cpu_format gate_up, down;
    int32_t rounding;
    int32_t activation;
    float scale;
    int64_t hidden, intermediate;
};

struct Embedding {
    static constexpr const char *kName = "Embedding", *kIn = kPanelsDomain;
    static constexpr Type kInputs[] = {kInt64, kBytes};
    static constexpr Type kOutputs[] = {kFloat};

    explicit Embedding(const Attributes &given)
        : format(given.format()), in(given.size("in_features")), out(given.size("out_features")) {}

    void compute(Ort::KernelContext &context) const {
        const auto ids = context.GetInput(0), weight = context.GetInput(1);
        auto shape = shape_of(ids);
        shape.push_back(in);
        const ingot_cpu_embedding_params params{
            format, count_of(ids), in, out, ids.GetTensorData<int64_t>(),
            weight_of(weight, "the table", format, out, in),
            context.GetOutput(0, shape).GetTensorMutableData<float>()};
        const Threads threads(context);
        check(ingot_cpu_embedding(&params, &threads));
    }

    ingot_cpu_format format;
    int64_t in, out;
};

struct MoeDispatch {
    static constexpr const char *kName = "MoeDispatch", *kIn = kPanelsDomain;
    static constexpr Type kInputs[] = {kFloat, kFloat, kBytes, kBytes};
    static constexpr Type kOutputs[] = {kFloat};

    explicit MoeDispatch(const Attributes &given)
        : gate_up(given.format("gate_up_")),
          down(given.format("down_")),
          rounding(given.rounding()),
          normalize(given.integer("normalize") != 0),
          activation(given.activation()),
          top_k(int32_t(given.size("top_k"))),
          hidden(given.size("hidden")),
          intermediate(given.size("intermediate")),
          experts(given.size("experts")) {
        require(intermediate <= INT32_MAX / 2, "intermediate is too large");
    }

    void compute(Ort::KernelContext &context) const {
        const auto x = context.GetInput(0), logits = context.GetInput(1);
        const auto shape = shape_of(x), routed = shape_of(logits);
        require(shape.size() == 2 && shape[1] == hidden, "x is " + written(shape) + "; it is [N, " + std::to_string(hidden) + "]");
        require(routed == std::vector<int64_t>({shape[0], experts}),
                "router_logits is " + written(routed) + "; it is [" + std::to_string(shape[0]) + ", " + std::to_string(experts) + "]");
        const ingot_cpu_moe_dispatch_params params{
            gate_up, down, rounding, activation, normalize, top_k, shape[0], hidden, intermediate, experts,
            x.GetTensorData<float>(), logits.GetTensorData<float>(),
            weight_of(context.GetInput(2), "gate_up", gate_up, 2 * intermediate, hidden, experts),
            weight_of(context.GetInput(3), "down", down, hidden, intermediate, experts),
            context.GetOutput(0, shape).GetTensorMutableData<float>()};
        const Threads threads(context);
        check(ingot_cpu_moe_dispatch(&params, &threads));
    }

    ingot_cpu_format gate_up, down;
    int32_t rounding;
    bool normalize;
    int32_t activation, top_k;
    int64_t hidden, intermediate, experts;
};

struct MoeLinear {
    static constexpr const char *kName = "MoeLinear", *kIn = kPanelsDomain;
    static constexpr Type kInputs[] = {kFloat, kInt64, kBytes};
    static constexpr Type kOutputs[] = {kFloat};

    explicit MoeLinear(const Attributes &given)
        : format(given.format()),
          rounding(given.rounding()),
          in(given.size("in_features")),
          out(given.size("out_features")),
          experts(given.size("experts")) {}

    void compute(Ort::KernelContext &context) const {
        const auto x = context.GetInput(0), ids = context.GetInput(1);
        const auto shape = shape_of(x), chosen = shape_of(ids);
        require(chosen.size() == 2 && chosen[1] >= 1 && chosen[1] <= INT32_MAX,
                "expert_ids is " + written(chosen) + "; it is [N, K]");
        const bool per_choice = shape.size() == 3;
        const std::vector<int64_t> expected =
            per_choice ? std::vector<int64_t>{chosen[0], chosen[1], in} : std::vector<int64_t>{chosen[0], in};
        require(shape == expected, "x is " + written(shape) + "; it is " + written(expected));
        const ingot_cpu_moe_linear_params params{
            format, rounding, per_choice, int32_t(chosen[1]), chosen[0], in, out, experts, x.GetTensorData<float>(),
            ids.GetTensorData<int64_t>(), weight_of(context.GetInput(2), "the weight", format, out, in, experts),
            context.GetOutput(0, {chosen[0], chosen[1], out}).GetTensorMutableData<float>()};
        const Threads threads(context);
        check(ingot_cpu_moe_linear(&params, &threads));
    }

    ingot_cpu_format format;
    int32_t rounding;
    int64_t in, out, experts;
};

// The floats of a tensor that has to have this shape.
const float *floats_of(const Ort::ConstValue &value, const char *name, const std::vector<int64_t> &shape) {
    const auto found = shape_of(value);
    require(found == shape, std::string(name) + " is " + written(found) + "; by the other inputs it is " + written(shape));
    return value.GetTensorData<float>();
}

std::vector<int64_t> shape_of(const Ort::ConstValue &value, const char *name, size_t rank) {
    auto found = shape_of(value);
    require(found.size() == rank, std::string(name) + " is " + written(found) + "; it has " + std::to_string(rank) + " dimensions");
    return found;
}

struct Mamba2Scan {
    static constexpr const char *kName = "Mamba2Scan", *kIn = kDomain;
    static constexpr Type kInputs[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat};
    static constexpr Type kOutputs[] = {kFloat, kFloat};

    explicit Mamba2Scan(const Attributes &given) : dt_min(given.number("dt_min")), dt_max(given.number("dt_max")) {}

    void compute(Ort::KernelContext &context) const {
        const auto x = shape_of(context.GetInput(0), "x", 4), b = shape_of(context.GetInput(3), "B", 4);
        const int64_t batch = x[0], tokens = x[1], heads = x[2], size = x[3], groups = b[2], states = b[3];
        const std::vector<int64_t> state{batch, heads, size, states};
        const auto input = [&](size_t index, const char *name, const std::vector<int64_t> &shape) {
            return floats_of(context.GetInput(index), name, shape);
        };
        ingot_cpu_mamba2_scan_params params{};
        params.batch = batch;
        params.tokens = tokens;
        params.heads = heads;
        params.head_size = size;
        params.groups = groups;
        params.states = states;
        params.x_stride = heads * size;
        params.dt_stride = heads;
        params.bc_stride = groups * states;
        params.dt_min = dt_min;
        params.dt_max = dt_max;
        params.x = input(0, "x", x);
        params.dt = input(1, "dt", {batch, tokens, heads});
        params.a = input(2, "A", {heads});
        params.b = input(3, "B", {batch, tokens, groups, states});
        params.c = input(4, "C", {batch, tokens, groups, states});
        params.d = input(5, "D", {heads});
        params.dt_bias = input(6, "dt_bias", {heads});
        params.state = input(7, "state", state);
        params.mask = input(8, "mask", {batch, tokens});
        params.y = context.GetOutput(0, x).GetTensorMutableData<float>();
        params.new_state = context.GetOutput(1, state).GetTensorMutableData<float>();
        const Threads threads(context);
        check(ingot_cpu_mamba2_scan(&params, &threads));
    }

    float dt_min, dt_max;
};

struct CausalConv {
    static constexpr const char *kName = "CausalConv", *kIn = kDomain;
    static constexpr Type kInputs[] = {kFloat, kFloat, kFloat, kFloat};
    static constexpr Type kOutputs[] = {kFloat, kFloat};

    explicit CausalConv(const Attributes &given) : activation(given.activation()) {}

    void compute(Ort::KernelContext &context) const {
        const auto x = shape_of(context.GetInput(0), "x", 3), weight = shape_of(context.GetInput(2), "weight", 3);
        const int64_t batch = x[0], channels = x[2], width = weight[2];
        const std::vector<int64_t> state{batch, channels, width - 1};
        const ingot_cpu_causal_conv_params params{
            activation, batch, x[1], channels, width, channels, floats_of(context.GetInput(0), "x", x), nullptr,
            floats_of(context.GetInput(1), "state", state),
            floats_of(context.GetInput(2), "weight", {channels, 1, width}),
            floats_of(context.GetInput(3), "bias", {channels}),
            context.GetOutput(0, x).GetTensorMutableData<float>(),
            context.GetOutput(1, state).GetTensorMutableData<float>()};
        const Threads threads(context);
        check(ingot_cpu_causal_conv(&params, &threads));
    }

    int32_t activation;
};

struct Mamba2Mixer {
    static constexpr const char *kName = "Mamba2Mixer", *kIn = kPanelsDomain;
    static constexpr Type kInputs[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kFloat, kPerhaps};
    static constexpr Type kOutputs[] = {kFloat, kFloat, kFloat};

    explicit Mamba2Mixer(const Attributes &given)
        : activation(given.activation()),
          groups(given.size("groups")),
          norm_groups(given.integer("norm_groups")),
          epsilon(given.number("epsilon")),
          dt_min(given.number("dt_min")),
          dt_max(given.number("dt_max")) {}

    void compute(Ort::KernelContext &context) const {
        const auto projected = shape_of(context.GetInput(0), "projected", 3);
        const auto state = shape_of(context.GetInput(3), "state", 4), weight = shape_of(context.GetInput(4), "weight", 3);
        const int64_t batch = projected[0], tokens = projected[1], heads = state[1], size = state[2], states = state[3];
        for (const int64_t each : {heads, size, states, groups, weight[2]})
            require(each >= 1 && each <= INT32_MAX, "a size of the state or of the taps is not 1 to 2147483647");
        const int64_t inner = heads * size, channels = weight[0];
        require(heads <= INT32_MAX / size && groups <= INT32_MAX / states && channels == inner + 2 * groups * states &&
                    projected[2] == inner + channels + heads,
                "projected is " + written(projected) + ", which is not what a state " + written(state) + " and taps " +
                    written(weight) + " belong to");
        const std::vector<int64_t> before{batch, heads, size, states}, window{batch, channels, weight[2] - 1};
        const auto input = [&](size_t index, const char *name, const std::vector<int64_t> &shape) {
            return floats_of(context.GetInput(index), name, shape);
        };
        const auto norm = optional_input(context, 9);
        require(bool(norm) == (norm_groups != 0), "a norm and norm_groups belong together");
        const ingot_cpu_mamba2_mixer_params params{
            activation, batch, tokens, heads, size, groups, states, weight[2], norm_groups, epsilon, dt_min, dt_max,
            context.GetInput(0).GetTensorData<float>(), input(1, "mask", {batch, tokens}),
            input(2, "conv state", window), input(3, "state", before), input(4, "conv weight", {channels, 1, weight[2]}),
            input(5, "conv bias", {channels}), input(6, "A", {heads}), input(7, "D", {heads}),
            input(8, "dt_bias", {heads}), norm ? floats_of(norm, "norm", {inner}) : nullptr,
            context.GetOutput(0, {batch, tokens, inner}).GetTensorMutableData<float>(),
            context.GetOutput(1, window).GetTensorMutableData<float>(),
            context.GetOutput(2, before).GetTensorMutableData<float>()};
        const Threads threads(context);
        check(ingot_cpu_mamba2_mixer(&params, &threads));
    }

    int32_t activation;
    int64_t groups, norm_groups;
    float epsilon, dt_min, dt_max;
};

struct Attention {
    static constexpr const char *kName = "Attention", *kIn = kPanelsDomain;
    static constexpr Type kInputs[] = {kFloat, kFloat, kFloat, kFloat, kFloat, kBool, kPerhaps, kPerhaps};
    static constexpr Type kOutputs[] = {kFloat, kFloat, kFloat};

    explicit Attention(const Attributes &given)
        : heads(given.size("num_heads")), key_heads(given.size("kv_num_heads")), scale(given.number("scale")) {}

    void compute(Ort::KernelContext &context) const {
        const auto query = shape_of(context.GetInput(0), "query", 3), past = shape_of(context.GetInput(3), "past_key", 4);
        const auto visible = shape_of(context.GetInput(5), "visible", 4);
        const int64_t batch = query[0], tokens = query[1], size = past[3], total = visible[3];
        require(size > 0 && query[2] / size == heads && query[2] % size == 0,
                "query is " + written(query) + "; it has " + std::to_string(heads) + " heads of " + std::to_string(size));
        require(visible == std::vector<int64_t>({batch, 1, tokens, total}) && total >= tokens && total - tokens <= past[2],
                "visible is " + written(visible) + "; it is [B, 1, T, S], and S - T is what the caches hold of " + written(past));
        const std::vector<int64_t> added{batch, tokens, key_heads * size}, cached{batch, key_heads, past[2], size};
        const std::vector<int64_t> grown{batch, key_heads, std::max(past[2], total), size};
        ingot_cpu_attention_params params{};
        params.batch = batch;
        params.tokens = tokens;
        params.heads = heads;
        params.key_heads = key_heads;
        params.head_size = size;
        params.past = total - tokens;
        params.past_capacity = past[2];
        params.capacity = grown[2];
        params.scale = scale;
        params.query = context.GetInput(0).GetTensorData<float>();
        params.key = floats_of(context.GetInput(1), "key", added);
        params.value = floats_of(context.GetInput(2), "value", added);
        params.past_key = floats_of(context.GetInput(3), "past_key", cached);
        params.past_value = floats_of(context.GetInput(4), "past_value", cached);
        params.visible = reinterpret_cast<const uint8_t *>(context.GetInput(5).GetTensorData<bool>());
        const auto cos = optional_input(context, 6), sin = optional_input(context, 7);
        require(bool(cos) == bool(sin), "cos and sin belong together");
        if (cos) {
            const auto shape = shape_of(cos, "cos", 3);
            const std::vector<int64_t> expected{batch, tokens, shape[2]};
            params.rotated = 2 * shape[2];
            params.cos = floats_of(cos, "cos", expected);
            params.sin = floats_of(sin, "sin", expected);
        }
        params.y = context.GetOutput(0, query).GetTensorMutableData<float>();
        params.present_key = context.GetOutput(1, grown).GetTensorMutableData<float>();
        params.present_value = context.GetOutput(2, grown).GetTensorMutableData<float>();
        const Threads threads(context);
        check(ingot_cpu_attention(&params, &threads));
    }

    int64_t heads, key_heads;
    float scale;
};

// What ONNX Runtime is given in place of an exception, which must not pass through it.
template <typename Call>
OrtStatusPtr answered(const std::string &name, const Call &call) {
    try {
        call();
        return nullptr;
    } catch (const std::exception &error) {
        return Ort::Status((name + ": " + error.what()).c_str(), ORT_INVALID_ARGUMENT).release();
    }
}

template <typename Operator>
std::string full_name() {
    return std::string(Operator::kIn) + "::" + Operator::kName;
}

template <typename Operator>
struct Kernel {
    Operator op;
    OrtStatusPtr ComputeV2(OrtKernelContext *given) {
        return answered(full_name<Operator>(), [&] {
            Ort::KernelContext context(given);
            op.compute(context);
        });
    }
};

template <typename Operator>
struct Custom : Ort::CustomOpBase<Custom<Operator>, Kernel<Operator>, true> {
    OrtStatusPtr CreateKernelV2(const OrtApi &, const OrtKernelInfo *given, void **kernel) const {
        return answered(full_name<Operator>(), [&] {
            const Ort::ConstKernelInfo info(given);
            *kernel = new Kernel<Operator>{Operator(Attributes{info})};
        });
    }
    const char *GetName() const { return Operator::kName; }
    size_t GetInputTypeCount() const { return std::size(Operator::kInputs); }
    ONNXTensorElementDataType GetInputType(size_t index) const { return Operator::kInputs[index].type; }
    OrtCustomOpInputOutputCharacteristic GetInputCharacteristic(size_t index) const {
        return characteristic(Operator::kInputs[index]);
    }
    size_t GetOutputTypeCount() const { return std::size(Operator::kOutputs); }
    ONNXTensorElementDataType GetOutputType(size_t index) const { return Operator::kOutputs[index].type; }
    OrtCustomOpInputOutputCharacteristic GetOutputCharacteristic(size_t index) const {
        return characteristic(Operator::kOutputs[index]);
    }
    static OrtCustomOpInputOutputCharacteristic characteristic(const Type &of) {
        return of.variadic ? INPUT_OUTPUT_VARIADIC : of.optional ? INPUT_OUTPUT_OPTIONAL : INPUT_OUTPUT_REQUIRED;
    }
};

}  // namespace

extern "C" INGOT_CPU_API OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    const OrtApi *api = base->GetApi(ORT_API_VERSION);
    if (!api)
        return base->GetApi(1)->CreateStatus(ORT_INVALID_ARGUMENT,
                                             "Ingot's operators need ONNX Runtime 1.21 or later");
    Ort::InitApi(api);
    static const Custom<Mamba2Scan> mamba2_scan;
    static const Custom<CausalConv> causal_conv;
    static const Custom<Linear> linear;
    static const Custom<Linears> linears;
    static const Custom<Mlp> mlp;
    static const Custom<Embedding> embedding;
    static const Custom<MoeDispatch> moe_dispatch;
    static const Custom<MoeLinear> moe_linear;
    static const Custom<Attention> attention;
    static const Custom<Mamba2Mixer> mamba2_mixer;
    return answered("RegisterCustomOps", [&] {
        const auto with = [](const char *name, std::initializer_list<const OrtCustomOp *> all) {
            Ort::CustomOpDomain domain(name);
            for (const OrtCustomOp *each : all) domain.Add(each);
            return domain;
        };
        // As long as the library is loaded, as the operators are: sessions that are open use both.
        static const Ort::CustomOpDomain canonical = with(kDomain, {&mamba2_scan, &causal_conv});
        static const Ort::CustomOpDomain own =
            with(kPanelsDomain, {&linear, &linears, &mlp, &embedding, &moe_dispatch, &moe_linear, &attention, &mamba2_mixer});
        Ort::UnownedSessionOptions given(options);
        given.Add(canonical);
        given.Add(own);
    });
}
