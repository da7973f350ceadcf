// Residual add and RMS norm; formulas in kernels/ops/add_rms_norm.py.
#pragma once

#include <cstdint>

#include "type.h"

namespace trimpot {

// Rows of `columns` items side by side; strides in items. Outputs have no gaps.
struct NormForward {
    Type type;
    const void* x;
    std::int64_t x_stride;
    const void* residual;  // null: s is x
    std::int64_t residual_stride;
    const float* weight;
    void* y;
    void* s;  // null without a residual
    float* rstd;
    std::int64_t rows, columns;
    float eps, offset;
};

struct NormBackward {
    Type type;
    const void* dy;
    std::int64_t dy_stride;
    const void* ds;  // or null
    std::int64_t ds_stride;
    const void* s;
    std::int64_t s_stride;
    const float* weight;
    const float* rstd;
    void* dx;
    float* partials;  // [blocks][columns], or null where dw is not wanted
    float* dw;
    std::int64_t blocks;  // of rows; the sums are theirs, so threads do not matter
    std::int64_t rows, columns;
    float offset;
};

struct NormTable {
    void (*forward)(const NormForward&);
    void (*backward)(const NormBackward&);
};

}  // namespace trimpot
