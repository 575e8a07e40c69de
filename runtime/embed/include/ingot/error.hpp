// The one exception of this library.
#pragma once

#include <stdexcept>

#include "api.h"

namespace ingot {

// One sentence: what was found, what was expected, and what to do.
class INGOT_API Error : public std::runtime_error {
  public:
    using std::runtime_error::runtime_error;
    ~Error() override;
};

}  // namespace ingot
