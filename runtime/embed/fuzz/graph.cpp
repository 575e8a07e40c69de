// Fuzzes the reading of an ONNX graph's external data: any bytes have locations or are refused.
#include <cstddef>
#include <cstdint>
#include <stdexcept>

#include "graph_files.hpp"

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t *data, std::size_t size, std::size_t most);

extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t *data, std::size_t size,
                                               std::size_t most, unsigned) {
    return LLVMFuzzerMutate(data, size, most);
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t *data, std::size_t size) {
    try {
        ingot::external_files({reinterpret_cast<const char *>(data), size});
    } catch (const std::invalid_argument &) {
        // No graph, which is said to whoever opens it.
    }
    return 0;
}
