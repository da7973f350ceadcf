// Weights in 4 bits, in the layout of bitsandbytes; formulas in kernels/ops/nf4.py.
#pragma once

#include <cstdint>

#include "type.h"

namespace trimpot {

constexpr std::int64_t kNf4Block = 64;         // items with one absmax
constexpr std::int64_t kNf4NestedBlock = 256;  // of those with one nested absmax

struct Nf4Quantise {
    Type type;
    const void* weight;
    const float* thresholds;  // [15], between neighbours of the code
    std::uint8_t* packed;     // [⌈count / 2⌉], the earlier item in the high nibble
    float* absmax;            // [⌈count / 64⌉]
    std::int64_t count;
};

struct Nf4Dequantise {
    Type type;
    const std::uint8_t* packed;
    const void* absmax;          // float, or std::uint8_t where it is quantised as well:
    const float* nested_absmax;  // null if not
    const float* nested_map;     // [256]
    float offset;
    const float* code;  // [16]
    void* out;
    std::int64_t count;
};

struct Nf4Table {
    void (*quantise)(const Nf4Quantise&);
    void (*dequantise)(const Nf4Dequantise&);
};

}  // namespace trimpot
