// The files that an ONNX graph names.
#pragma once

#include <set>
#include <string>
#include <string_view>

namespace ingot {

// The locations of a graph's external data, wherever a tensor stands: among the initializers and in
// the attributes of nodes, of subgraphs and of functions. A tensor need not be used to be counted.
//
// Throws std::invalid_argument: bytes that are no ONNX model, or of subgraphs within each other
// without end.
std::set<std::string> external_files(std::string_view model);

}  // namespace ingot
