// Matrix products whose operands are sums of two bfloat16, on AMX tiles (Intel SDM vol. 1, ch. 18).
//
// x = high + low, both bfloat16: 16 bits of fraction, error at most 2⁻¹⁷ of each item. Then
// x·w = high·high + high·low + low·high, summed in float32; low·low, at most 2⁻¹⁶ of a product, is
// left out. (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 datatype for higher-precision
// computations") Operands that are bfloat16 have no low part, and their products are exact.
#pragma once

#include <cstdint>

#include "gemm.h"

namespace trimpot {

// One weight [N, K] as a right operand, in both directions: [panels][blocks][block / 2][32][2].
struct SplitPack {
    std::int64_t rows;    // N
    std::int64_t depth;   // K
    std::int64_t panels;  // ⌈N / 32⌉
    std::int64_t block;   // contraction items per block along K, a multiple of 32
    std::int64_t blocks;  // along K
    std::uint16_t* high;
    std::uint16_t* low;  // null: all zero
};

// Left operand, rows padded to a multiple of 32: [blocks][padded / 16][block / 32][16][32].
struct SplitRows {
    std::int64_t rows, padded, block, blocks;
    std::uint16_t* high;
    std::uint16_t* low;  // null: all zero
};

enum class Packed { kNotFinite, kExact, kSplit };  // kExact: every low part is zero

struct SplitTable {
    // kExact says that `pack.low` is not needed; kSplit, that it is wanted if there is none.
    Packed (*pack)(const SplitPack& pack, Matrix weight);
    void (*split)(Matrix x, std::int64_t width, const SplitRows& out);
    // As GemmTable's, on split operands. The gradient's rows are in blocks of kGradientBlock.
    void (*forward)(const SplitRows& x, const SplitPack& pack, float* y, std::int64_t stride,
                    const float* bias, Update update);
    void (*gradient)(const SplitRows& dy, const SplitPack& pack, float* dx, std::int64_t stride,
                     bool add, Update update);
};

// Null where the processor or the operating system has no tiles.
const SplitTable* split_table();

}  // namespace trimpot
