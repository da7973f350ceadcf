// Matrix products in 8-bit integers, asked for by name: twice the rate of int16 where there is
// VNNI, at errors of 1e-2 of the result.
//
// Each block of a row has one scale, of its largest item. Weights are kept as unsigned bytes,
// w + 128, since the instruction multiplies unsigned with signed: Σ x·w = Σ x·(w + 128) − 128 Σ x.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace trimpot {

// One direction of a weight: W for x Wᵀ, or Wᵀ for dY W. Two of them take what one of int16 does.
struct BytePack {
    std::int64_t rows;    // N
    std::int64_t depth;   // K
    std::int64_t panels;  // ⌈N / 32⌉
    std::int64_t block;   // contraction items per block along K, a multiple of 32
    std::int64_t blocks;  // along K
    std::uint8_t* q;      // [panels][blocks][block / 4][32][4]
    float* scale;         // [blocks][32 panels]
};

// Left operand: [blocks][padded][block], and of each block its scale and its sum.
struct ByteRows {
    std::int64_t rows, padded, block, blocks;
    std::int8_t* q;
    float* scale;       // [blocks][padded]
    std::int32_t* sum;  // [blocks][padded]
};

struct ByteTable {
    // Of W, or of Wᵀ where `transposed`. False where an item is not finite.
    bool (*pack)(const BytePack& pack, Matrix weight, bool transposed);
    void (*quantise)(Matrix x, std::int64_t width, const ByteRows& out);
    // y [M, N] (+)= x Wᵀ + bias + update (right: [panels][rank][32]).
    void (*multiply)(const ByteRows& x, const BytePack& pack, float* y, std::int64_t stride,
                     const float* bias, bool add, Update update);
};

const ByteTable& byte_table();

}  // namespace trimpot
