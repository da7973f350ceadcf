// The innermost loop of attention. Included once for each instruction set, inside its namespace,
// after vec.h.

#if defined(__AVX512F__)
#define TRIMPOT_GEMM_AVX512 1
#include "gemm_micro.h"

// tile [14][32] = a b: a (r, l) at a + r·row + l·lane, b (l, c) at b + l·stride + c, all in floats.
static inline void tile_product(int64_t lanes, const float* a, int64_t row, int64_t lane,
                                const float* b, int64_t stride, float* tile) {
    micro_fp32(lanes, reinterpret_cast<const char*>(a), row * 4, lane * 4,
               reinterpret_cast<const char*>(b), stride * 4, tile);
}

#else

// kRows rows by two vectors: on AVX2 ten sums, two columns and a broadcast fill 13 of 16 registers.
template <int kRows>
TRIMPOT_INLINE inline void tile_part(int64_t lanes, const float* a, int64_t row, int64_t lane,
                                     const float* b, int64_t stride, float* tile) {
    Floats even[kRows] = {}, odd[kRows] = {};
    for (int64_t l = 0; l < lanes; ++l) {
        const Floats x = load<Float>(b + l * stride, kWidth);
        const Floats y = load<Float>(b + l * stride + kWidth, kWidth);
        for (int r = 0; r < kRows; ++r) {
            const Floats left = all(a[r * row + l * lane]);
            even[r] = fma(left, x, even[r]);
            odd[r] = fma(left, y, odd[r]);
        }
    }
    for (int r = 0; r < kRows; ++r) {
        store<Float>(tile + r * kTileColumns, even[r], kWidth);
        store<Float>(tile + r * kTileColumns + kWidth, odd[r], kWidth);
    }
}

static inline void tile_product(int64_t lanes, const float* a, int64_t row, int64_t lane,
                                const float* b, int64_t stride, float* tile) {
    for (int c = 0; c < kTileColumns; c += 2 * kWidth) {
        tile_part<5>(lanes, a, row, lane, b + c, stride, tile + c);
        tile_part<5>(lanes, a + 5 * row, row, lane, b + c, stride, tile + 5 * kTileColumns + c);
        tile_part<4>(lanes, a + 10 * row, row, lane, b + c, stride, tile + 10 * kTileColumns + c);
    }
}

#endif
