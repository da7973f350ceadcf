// Gated linear units; formulas in kernels/ops/glu.py.
#pragma once

#include <cstdint>

#include "type.h"

namespace trimpot {

// Rows of `columns` items side by side; strides in items. Outputs have no gaps.
struct GluForward {
    Type type;
    bool gelu;
    const void* gate;
    std::int64_t gate_stride;
    const void* up;
    std::int64_t up_stride;
    void* y;
    std::int64_t rows, columns;
};

struct GluBackward {
    Type type;
    bool gelu;
    const void* dy;
    std::int64_t dy_stride;
    const void* gate;
    std::int64_t gate_stride;
    const void* up;
    std::int64_t up_stride;
    void* dgate;
    void* dup;
    std::int64_t rows, columns;
};

struct GluTable {
    void (*forward)(const GluForward&);
    void (*backward)(const GluBackward&);
};

}  // namespace trimpot
