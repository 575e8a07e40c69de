// libingot_trt.so: Ingot's operators as TensorRT plugins, each one call of ingot_kernels.h.
//
// What is each operator's own is in operators.h, which plugins/tensorrt/build.py writes.
#include "plugin.h"

#include "operators.h"

#define INGOT_EXPORT extern "C" __attribute__((visibility("default")))

// What TensorRT's registry looks up in a plugin library.
INGOT_EXPORT nvinfer1::IPluginCreatorInterface *const *getCreators(int32_t &count) {
    static const ingot::Creators creators;
    count = std::size(creators.all);
    return creators.all;
}

INGOT_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder *) {
    // The logger is not used, since it has another layout in TensorRT 10 than in 11 and in
    // TensorRT-RTX, which may all load one plugin library.
}
