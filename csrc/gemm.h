// Matrix products for training on CPUs, with frozen weights in one integer pack.
//
// M rows (tokens), K = d_in, N = d_out; matrices are row-major and float unless said otherwise.
//
// Block fixed point (int16). W = diag(r) Q diag(c) with integer Q. c is the root mean square of
// each column, so that x·c meets a matrix without strong columns; r scales each row such that the
// L2 norm of its blocks comes close to 46,340 = √(2³¹ − 1). By Cauchy and Schwarz every partial
// sum of a dot product is at most the product of two norms, so the blocks of x·c are scaled to
// a norm of (2³¹ − 1) / ‖Q block‖ and int32 never overflows. Bounding the norm and not the largest
// item is worth 1.4 bits on Gaussian data, and more where there are outliers.
// One pack serves both directions: forward contracts Q over K, the gradient contracts it over N
// and transposes 32 columns at a time into a buffer, which all M rows then use.
#pragma once

#include <cstddef>
#include <cstdint>

namespace trimpot {

constexpr int kTileRows = 14;
constexpr int kTileColumns = 32;
constexpr std::int64_t kGradientBlock = 256;  // contraction items per block along N

// float or bfloat16. stride: items from row to row.
struct Matrix {
    const void* data;
    std::int64_t stride;
    bool bf16;
};

// One weight. Weights that share their input share column_scale and limit.
struct Pack {
    std::int64_t rows;      // N
    std::int64_t depth;     // K
    std::int64_t panels;    // ⌈N / 32⌉
    std::int64_t block;     // contraction items per block along K, a multiple of 32
    std::int64_t blocks;    // along K
    std::int16_t* q;        // [panels][blocks][block / 2][32][2]
    float* row_scale;       // r [32 panels]; 0 in padding
    float* column_scale;    // c [K]; 0 of a column of zeros
    float* limit;           // [blocks] norm that a block of x·c may have
    float* gradient_limit;  // [⌈32 panels / 256⌉] norm that a block of dY·r may have
};

// Left operand in block fixed point.
struct Rows {
    std::int64_t rows, padded, block, blocks;
    std::int16_t* q;  // [blocks][padded][block]
    float* scale;     // [blocks][padded]
};

// A low-rank update of the result, in fp32: left [M, rank] times right.
struct Update {
    const float* left;
    std::int64_t stride;
    const float* right;
    std::int64_t rank;
};

struct GemmTable {
    const char* name;
    bool fast_int16;
    // Packs weights that share their input. False where one is not finite: no pack then.
    bool (*pack)(const Pack* packs, const Matrix* weights, int count);
    void (*quantise)(Matrix x, std::int64_t width, const float* factor, const float* limits,
                     const Rows& out);
    // y [M, N] = a Wᵀ + bias + update (right: [panels][rank][32]).
    void (*forward)(const Rows& a, const Pack& pack, float* y, std::int64_t stride,
                    const float* bias, Update update);
    // dx [M, K] (+)= dy W + update (right: [rank, K]); dy is in blocks of kGradientBlock.
    void (*gradient)(const Rows& dy, const Pack& pack, float* dx, std::int64_t stride, bool add,
                     Update update);
    // out [M, n] = a · b, b (k, j) = data[k * row + j * column] / divisor[k]; int16 like a.
    void (*skinny)(const Rows& a, const float* limits, const float* data, std::int64_t row,
                   std::int64_t column, const float* divisor, std::int64_t depth, std::int64_t n,
                   float* out, std::int64_t stride, float factor);
    // The same three in fp32, on W itself.
    void (*forward_fp32)(const float* x, std::int64_t x_stride, std::int64_t m, Matrix w,
                         std::int64_t n, std::int64_t k, float* y, std::int64_t stride,
                         const float* bias, Update update);
    void (*gradient_fp32)(const float* dy, std::int64_t dy_stride, std::int64_t m, Matrix w,
                          std::int64_t n, std::int64_t k, float* dx, std::int64_t stride, bool add,
                          Update update);
    // out [p, n] = factor · aᵀ b, a [M, p], b [M, n]: what a gradient of a factor is.
    void (*outer)(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                  std::int64_t m, std::int64_t p, std::int64_t n, float* out, std::int64_t stride,
                  float factor);
    // out = D · x, D = keep / (1 − p) of the counter-based dropout (kernels/ops/philox.py).
    void (*dropout)(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                    std::int64_t first_row, std::uint64_t seed, std::uint32_t threshold,
                    float scale, float* out);
};

// Length of blocks along K: at most 288, so that 32 columns of it (18 KiB) stay in a 32 KiB L1.
std::int64_t block_length(std::int64_t depth);

const GemmTable& gemm_table();

}  // namespace trimpot
