// Which instruction set is used.
#pragma once

namespace ingot::cpu {

// Whether plain loops are asked for. The first call reads the environment's INGOT_CPU; it raises
// Refused where that names what there is not.
bool use_reference();

}  // namespace ingot::cpu
