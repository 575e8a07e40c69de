// Stands in for tensorrt.cpp where the library was built without TensorRT's headers.
#include "backend.hpp"

namespace ingot {

std::unique_ptr<Backend> open_tensorrt(const std::filesystem::path &folder, const Manifest &, bool) {
    throw Error(folder.string() +
                " holds a TensorRT engine and this library was built without TensorRT; build it with "
                "TENSORRT_ROOT set, or open the graph alone (graph_only).");
}

}  // namespace ingot
