// What the TensorRT plugins of all operators share; the build writes what is each one's own into
// operators.h.
//
// Throughout, dimensions have the names of the operators' declarations, separated by spaces. Errors
// are exceptions inside, and never cross into TensorRT.
#pragma once

#include <NvInfer.h>

#include <algorithm>
#include <cctype>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "ingot_kernels.h"

namespace ingot {

using nvinfer1::DataType;
using nvinfer1::DynamicPluginTensorDesc;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;
using nvinfer1::PluginTensorDesc;

constexpr const char *kNamespace = "ingot";
constexpr const char *kVersion = "1";

// In an engine beside the fields: the interface version of the kernels whose workspace it reserved,
// 0 where there were none. With too little workspace the kernels would overwrite other tensors.
constexpr const char *kKernelsField = "kernels";

enum class Type { kT, kFloat32, kInt64 };

struct Tensor {
    const char *name;
    Type type;
    const char *dims;
    const char *other_dims = nullptr;  // a second form it may take
};

// To stderr, as TensorRT does with the exceptions of plugins in Python.
inline void report(const char *message) noexcept { std::fprintf(stderr, "%s\n", message); }

[[noreturn]] inline void refuse(const std::string &message) { throw std::runtime_error(message); }

// The result of `call`, or `otherwise` with the exception reported.
template <typename Result, typename Call>
Result guarded(Result otherwise, Call &&call) noexcept {
    try {
        return call();
    } catch (const std::exception &error) {
        report(error.what());
    } catch (...) {
        report("an unknown exception in a plugin of Ingot");
    }
    return otherwise;
}

inline void check(ingot_status status) {
    if (status != INGOT_OK) refuse(ingot_last_error());
}

inline std::vector<std::string_view> split(std::string_view dims) {
    std::vector<std::string_view> result;
    while (!dims.empty()) {
        size_t end = dims.find(' ');
        result.push_back(dims.substr(0, end));
        dims.remove_prefix(end == std::string_view::npos ? dims.size() : end + 1);
    }
    return result;
}

// Sizes of the dimensions of one call.
class Sizes {
  public:
    explicit Sizes(const char *op) : op_(op) {}

    // Records the dimensions of an input.
    void add(const Tensor &tensor, const nvinfer1::Dims &shape) {
        std::vector<std::string_view> dims = split(tensor.dims);
        auto rank = static_cast<size_t>(shape.nbDims);
        if (dims.size() != rank && tensor.other_dims != nullptr) dims = split(tensor.other_dims);
        if (dims.size() != rank) {
            refuse(std::string(op_) + " got " + tensor.name + " of rank " + std::to_string(rank) +
                   "; it is [" + tensor.dims + "]" +
                   (tensor.other_dims ? std::string(" or [") + tensor.other_dims + "]" : "") + ".");
        }
        for (size_t axis = 0; axis < rank; ++axis) {
            found_.push_back({tensor.name, dims[axis], shape.d[axis]});
        }
    }

    // Refuses tensors that disagree about a dimension.
    void check_equal() const {
        for (const Found &each : found_) {
            int64_t expected = value(each.dim);
            if (each.size != expected) {
                refuse(std::string(op_) + " got " + std::to_string(each.size) + " for " +
                       std::string(each.dim) + " of " + each.tensor +
                       "; by its other inputs that is " + std::to_string(expected) + ".");
            }
        }
    }

    // The size of a dimension: the largest, since TensorRT derives each tensor's limits apart.
    int32_t operator[](std::string_view dim) const {
        int64_t size = largest(dim);
        if (size < 0 || size > std::numeric_limits<int32_t>::max()) {
            refuse(std::string(op_) + " got " + std::to_string(size) + " for " + std::string(dim) +
                   "; it takes up to 2147483647.");
        }
        return static_cast<int32_t>(size);
    }

  private:
    struct Found {
        const char *tensor;
        std::string_view dim;
        int64_t size;
    };

    int64_t largest(std::string_view dim) const {
        int64_t size = -1;
        for (const Found &each : found_) {
            if (each.dim == dim && each.size > size) size = each.size;
        }
        return size;
    }

    // Of "H", "2I", "W-1" or "1".
    int64_t value(std::string_view dim) const {
        auto digit = [](char c) { return std::isdigit(static_cast<unsigned char>(c)) != 0; };
        int64_t factor = 1, less = 0;
        if (digit(dim.front())) {
            factor = dim.front() - '0';
            dim.remove_prefix(1);
        }
        if (dim.size() > 2 && dim[dim.size() - 2] == '-') {
            less = dim.back() - '0';
            dim.remove_suffix(2);
        }
        return factor * (dim.empty() ? 1 : largest(dim)) - less;
    }

    const char *op_;
    std::vector<Found> found_;
};

// Activations by their number in the kernels' interface; in operators.h.
extern const std::vector<const char *> kActivations;

// Visitor of an operator's fields: takes their values from TensorRT.
class ReadFields {
  public:
    ReadFields(const char *op, const PluginFieldCollection &fields) : op_(op), fields_(fields) {}

    void operator()(const char *name, int32_t &value) const {
        std::memcpy(&value, need(name, PluginFieldType::kINT32).data, sizeof value);
    }

    void operator()(const char *name, float &value) const {
        std::memcpy(&value, need(name, PluginFieldType::kFLOAT32).data, sizeof value);
    }

    void operator()(const char *name, ingot_activation &value) const {
        const PluginField &field = need(name, PluginFieldType::kCHAR);
        std::string text(static_cast<const char *>(field.data), static_cast<size_t>(field.length));
        // The ONNX parser ends a string with a zero byte.
        text.resize(std::strlen(text.c_str()));
        std::string names;
        for (size_t i = 0; i < kActivations.size(); ++i) {
            if (text == kActivations[i]) {
                value = static_cast<ingot_activation>(i);
                return;
            }
            names += std::string(i == 0 ? "" : ", ") + kActivations[i];
        }
        refuse(std::string(op_) + " has no activation '" + text + "'; use one of " + names + ".");
    }

    const PluginField *find(const char *name) const {
        for (int32_t i = 0; i < fields_.nbFields; ++i) {
            if (std::strcmp(fields_.fields[i].name, name) == 0) return &fields_.fields[i];
        }
        return nullptr;
    }

  private:
    const PluginField &need(const char *name, PluginFieldType type) const {
        const PluginField *field = find(name);
        if (field == nullptr || field->data == nullptr || field->type != type ||
            field->length < 1) {
            refuse(std::string(op_) + " lacks " + name +
                   ", or has it of another type; set every attribute.");
        }
        return *field;
    }

    const char *op_;
    const PluginFieldCollection &fields_;
};

// Visitor of an operator's fields: gives TensorRT their addresses.
class WriteFields {
  public:
    explicit WriteFields(std::vector<PluginField> *out) : out_(out) {}

    void operator()(const char *name, const int32_t &value) const {
        out_->emplace_back(name, &value, PluginFieldType::kINT32, 1);
    }

    void operator()(const char *name, const float &value) const {
        out_->emplace_back(name, &value, PluginFieldType::kFLOAT32, 1);
    }

    void operator()(const char *name, const ingot_activation &value) const {
        const char *text = kActivations[value];
        out_->emplace_back(name, text, PluginFieldType::kCHAR,
                           static_cast<int32_t>(std::strlen(text)));
    }

  private:
    std::vector<PluginField> *out_;
};

inline PluginFieldCollection collection(const std::vector<PluginField> &fields) {
    return {static_cast<int32_t>(fields.size()), fields.data()};
}

// Stores TensorRT's pointers in members of a structure, in order.
template <typename Pointer, typename... Members>
void store(const Pointer *pointers, Members &...members) {
    ((members = static_cast<Members>(*pointers++)), ...);
}

inline bool is_t(DataType type) {
    return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16;
}

inline ingot_dtype kernel_dtype(DataType type) {
    return type == DataType::kHALF   ? INGOT_FLOAT16
           : type == DataType::kBF16 ? INGOT_BFLOAT16
                                     : INGOT_FLOAT32;
}

// A plugin. `Op` has the tensors, the fields and their visitor, and the calls of the kernels.
template <typename Op>
class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
  public:
    explicit Plugin(const PluginFieldCollection &fields) {
        ReadFields read(Op::kName, fields);
        op_.fields(read);
        if (read.find(kKernelsField) != nullptr) read(kKernelsField, kernels_);
    }

    nvinfer1::IPluginCapability *getCapabilityInterface(
        nvinfer1::PluginCapabilityType type) noexcept override {
        switch (type) {
            case nvinfer1::PluginCapabilityType::kCORE:
                return static_cast<IPluginV3OneCore *>(this);
            case nvinfer1::PluginCapabilityType::kBUILD:
                return static_cast<IPluginV3OneBuild *>(this);
            case nvinfer1::PluginCapabilityType::kRUNTIME:
                return static_cast<IPluginV3OneRuntime *>(this);
        }
        return nullptr;
    }

    nvinfer1::IPluginV3 *clone() noexcept override {
        return guarded<nvinfer1::IPluginV3 *>(nullptr, [&] { return new Plugin(*this); });
    }

    const char *getPluginName() const noexcept override { return Op::kName; }
    const char *getPluginVersion() const noexcept override { return kVersion; }
    const char *getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return std::size(Op::kOutputs); }

    int32_t getOutputDataTypes(DataType *outputs, int32_t, const DataType *inputs,
                               int32_t) const noexcept override {
        for (const Tensor &tensor : Op::kOutputs) {
            *outputs++ = tensor.type == Type::kT ? inputs[0] : DataType::kFLOAT;
        }
        return 0;
    }

    int32_t getOutputShapes(const nvinfer1::DimsExprs *inputs, int32_t count,
                            const nvinfer1::DimsExprs *, int32_t, nvinfer1::DimsExprs *outputs,
                            int32_t, nvinfer1::IExprBuilder &) noexcept override {
        return guarded(-1, [&] {
            check_count(count);
            Sizes ranks(Op::kName);
            for (int32_t i = 0; i < count; ++i) {
                nvinfer1::Dims shape{};
                shape.nbDims = inputs[i].nbDims;
                ranks.add(Op::kInputs[i], shape);
            }
            for (const Tensor &tensor : Op::kOutputs) {
                std::vector<std::string_view> dims = split(tensor.dims);
                outputs->nbDims = static_cast<int32_t>(dims.size());
                for (size_t axis = 0; axis < dims.size(); ++axis) {
                    outputs->d[axis] = expression(inputs, dims[axis]);
                }
                ++outputs;
            }
            return 0;
        });
    }

    bool supportsFormatCombination(int32_t position, const DynamicPluginTensorDesc *tensors,
                                   int32_t count, int32_t) noexcept override {
        const PluginTensorDesc &found = tensors[position].desc;
        if (found.format != nvinfer1::TensorFormat::kLINEAR) return false;
        const Tensor &tensor =
            position < count ? Op::kInputs[position] : Op::kOutputs[position - count];
        switch (tensor.type) {
            case Type::kFloat32: return found.type == DataType::kFLOAT;
            case Type::kInt64: return found.type == DataType::kINT64;
            // The first tensor is of T in every operator.
            case Type::kT: return is_t(found.type) && found.type == tensors[0].desc.type;
        }
        return false;
    }

    // A profile with sizes that the kernels refuse ends the build here; TensorRT would take the 0 of
    // getWorkspaceSize for no need.
    int32_t configurePlugin(const DynamicPluginTensorDesc *inputs, int32_t count,
                            const DynamicPluginTensorDesc *, int32_t) noexcept override {
        return guarded(-1, [&] {
            most_workspace(inputs, count);
            return 0;
        });
    }

    size_t getWorkspaceSize(const DynamicPluginTensorDesc *inputs, int32_t count,
                            const DynamicPluginTensorDesc *, int32_t) const noexcept override {
        return guarded(size_t{0}, [&] { return most_workspace(inputs, count); });
    }

    nvinfer1::IPluginV3 *attachToContext(nvinfer1::IPluginResourceContext *) noexcept override {
        return guarded<nvinfer1::IPluginV3 *>(nullptr, [&] {
            // Not possible once a stream is being captured into a CUDA graph.
            check(ingot_prepare());
            return new Plugin(*this);
        });
    }

    int32_t onShapeChange(const PluginTensorDesc *, int32_t, const PluginTensorDesc *,
                          int32_t) noexcept override {
        return 0;
    }

    int32_t enqueue(const PluginTensorDesc *inputs, const PluginTensorDesc *,
                    const void *const *input_data, void *const *output_data, void *workspace,
                    cudaStream_t stream) noexcept override {
        return guarded(-1, [&] {
            if (kernels_ != INGOT_KERNELS_VERSION) {
                refuse(std::string("the engine was built for GPU kernels of version ") +
                       std::to_string(kernels_) + " (0 is none), and these have version " +
                       std::to_string(INGOT_KERNELS_VERSION) + "; build it again.");
            }
            if (!same_as_last(inputs)) {
                Sizes sizes(Op::kName);
                for (size_t i = 0; i < kInputCount; ++i) sizes.add(Op::kInputs[i], inputs[i].dims);
                sizes.check_equal();
                call_ = parameters(sizes, inputs[0].type, inputs[0].dims.nbDims);
                // TensorRT does not say how much it reserved. It serialises a plugin for one profile
                // before it asks what the next needs, so the engine cannot say either. But it asked for
                // the profile's largest sizes, whose bytes are no fewer than those of any in it.
                check(Op::workspace(call_, &workspace_bytes_));
                last_.assign(inputs, inputs + kInputCount);
            }
            Op::point(call_, input_data, output_data);
            check(Op::run(call_, workspace, workspace_bytes_, stream));
            return 0;
        });
    }

    const PluginFieldCollection *getFieldsToSerialize() noexcept override {
        return guarded<const PluginFieldCollection *>(nullptr, [&] {
            WriteFields write(&serialized_);
            serialized_.clear();
            op_.fields(write);
            write(kKernelsField, kernels_);
            serialized_collection_ = collection(serialized_);
            return &serialized_collection_;
        });
    }

  private:
    static constexpr size_t kInputCount = std::size(Op::kInputs);

    static void check_count(int32_t count) {
        if (count != static_cast<int32_t>(kInputCount)) {
            refuse(std::string(Op::kName) + " got " + std::to_string(count) + " inputs; it takes " +
                   std::to_string(kInputCount) + ".");
        }
    }

    // Of the largest sizes of a profile.
    size_t most_workspace(const DynamicPluginTensorDesc *inputs, int32_t count) const {
        check_count(count);
        Sizes most(Op::kName);
        for (int32_t i = 0; i < count; ++i) most.add(Op::kInputs[i], inputs[i].max);
        size_t bytes = 0;
        check(Op::workspace(parameters(most, inputs[0].desc.type, inputs[0].max.nbDims), &bytes));
        return bytes;
    }

    // Whether the inputs have the types and shapes of the last call, as in a generation.
    bool same_as_last(const PluginTensorDesc *inputs) const {
        if (last_.empty()) return false;
        for (const PluginTensorDesc &last : last_) {
            const nvinfer1::Dims &a = inputs->dims, &b = last.dims;
            if (inputs->type != last.type || a.nbDims != b.nbDims ||
                !std::equal(a.d, a.d + a.nbDims, b.d)) {
                return false;
            }
            ++inputs;
        }
        return true;
    }

    // An input of two forms has no fixed axis for a dimension.
    static const nvinfer1::IDimensionExpr *expression(const nvinfer1::DimsExprs *inputs,
                                                      std::string_view wanted) {
        for (const Tensor &tensor : Op::kInputs) {
            if (tensor.other_dims == nullptr) {
                std::vector<std::string_view> dims = split(tensor.dims);
                for (size_t axis = 0; axis < dims.size(); ++axis) {
                    if (dims[axis] == wanted) return inputs->d[axis];
                }
            }
            ++inputs;
        }
        refuse(std::string(Op::kName) + " has no input of dimension " + std::string(wanted) + ".");
    }

    typename Op::Parameters parameters(const Sizes &sizes, DataType type,
                                       int32_t first_rank) const {
        auto result = op_.parameters(sizes, first_rank);
        result.dtype = kernel_dtype(type);
        return result;
    }

    Op op_;
    int32_t kernels_ = INGOT_KERNELS_VERSION;
    std::vector<PluginTensorDesc> last_;
    typename Op::Parameters call_{};
    size_t workspace_bytes_ = 0;  // of the last call
    std::vector<PluginField> serialized_;
    PluginFieldCollection serialized_collection_{};
};

template <typename Op>
class Creator final : public nvinfer1::IPluginCreatorV3One {
  public:
    Creator() {
        Op op;
        op.fields(WriteFields(&fields_));
        // Only names and types are offered.
        for (PluginField &field : fields_) field.data = nullptr;
        collection_ = collection(fields_);
    }

    const char *getPluginName() const noexcept override { return Op::kName; }
    const char *getPluginVersion() const noexcept override { return kVersion; }
    const char *getPluginNamespace() const noexcept override { return kNamespace; }
    const PluginFieldCollection *getFieldNames() noexcept override { return &collection_; }

    nvinfer1::IPluginV3 *createPlugin(const char *, const PluginFieldCollection *fields,
                                      nvinfer1::TensorRTPhase) noexcept override {
        return guarded<nvinfer1::IPluginV3 *>(nullptr, [&] {
            return new Plugin<Op>(*fields);
        });
    }

  private:
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_{};
};

}  // namespace ingot
