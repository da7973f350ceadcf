// Rotary embedding of q and k, with an RMS norm per head where there is one; formulas in
// kernels/ops/rope.py.
#pragma once

#include <cstdint>

#include "type.h"

namespace trimpot {

constexpr std::int64_t kRopeWidest = 2048;  // D: rows of that many floats lie on the stack

// [B, T, H, D], items of D side by side; strides in items.
struct Heads {
    const void* data;
    std::int64_t batch, token, head;
};

struct RopeSide {
    std::int64_t heads;
    Heads in;             // x; in backward dy
    void* out;            // y; in backward dx. [B, T, H, D] without gaps
    const float* weight;  // or null: no norm
    float* rstd;          // [B, T, H]; backward reads it
    // Backward alone:
    Heads x;
    float* partials;  // [blocks][D], or null where dw is not wanted
    float* dw;
};

// [B, T, Dr/2]; a batch stride of 0 repeats one table.
struct RopeAngles {
    Type type;
    const void* cos;
    std::int64_t cos_batch, cos_token;
    const void* sin;
    std::int64_t sin_batch, sin_token;
};

struct Rope {
    Type type;
    RopeAngles angles;
    std::int64_t batch, length, width, half;  // B, T, D, Dr/2
    std::int64_t blocks;                      // of tokens; sums for dw are theirs
    float eps, offset;
    RopeSide sides[2];  // q, k
};

struct RopeTable {
    void (*forward)(const Rope&);
    void (*backward)(const Rope&);
};

}  // namespace trimpot
