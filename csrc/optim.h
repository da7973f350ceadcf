// AdamW in one pass; formulas in kernels/ops/adamw_step.py.
#pragma once

#include <cstdint>

#include "type.h"

namespace trimpot {

struct AdamW {
    float* param;
    const void* grad;
    Type grad_type;
    float* exp_avg;
    float* exp_avg_sq;
    void* copy;  // or null
    Type copy_type;
    std::int64_t count;
    float grad_scale;
    float keep;          // 1 − lr·weight_decay
    float beta1, rest1;  // β₁, 1 − β₁
    float beta2, rest2;  // β₂, 1 − β₂
    float rate;          // lr / (1 − β₁ᵗ)
    float correction;    // √(1 − β₂ᵗ)
    float eps;
};

struct OptimTable {
    void (*adamw)(const AdamW&);
};

}  // namespace trimpot
