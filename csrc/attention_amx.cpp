// Attention whose products are of pairs of bfloat16 on AMX tiles (split.h, amx_tiles.h): 32 x 32
// scores at a time, keys down and queries across, so that what softmax and its gradient know of a
// query is a vector's item. Blocks are counted from their document's first token.
#include <omp.h>

#include <cstdint>

#include "attention.h"
#include "gemm.h"
#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

#include "amx_tiles.h"
#include "attention_parts.h"
// Stands on both.
#include "attention_amx_operands.h"

constexpr int64_t kKeys = 128;     // of a block in forward: its scores stay in the L1 cache
constexpr int64_t kUnit = 64;      // keys and queries of a block in backward
constexpr int64_t kBlock = 256;    // keys whose gradients are summed before the next ones
constexpr int64_t kScores = 1024;  // 32 x 32

template <class T>
constexpr bool kSplit = !__is_same(T, Bf16);  // whether items have a low part

static inline Sight sight(const Attention& a, int64_t key, int64_t row, int64_t rows) {
    const int64_t low = key - row, high = a.window ? low + a.window : int64_t{1} << 40;
    const bool every = low + 31 <= 0 && high >= 32 && rows == 32;
    return {low, high, rows, every, low >= rows || high + 31 <= 0};
}

// What is known of 32 queries.
struct Pair {
    Floats first, second;
};

TRIMPOT_INLINE static inline Pair pair_at(const float* at) {
    return {load<Float>(at, kWidth), load<Float>(at + kWidth, kWidth)};
}

TRIMPOT_INLINE static inline void put_pair(float* at, const Pair& x) {
    store<Float>(at, x.first, kWidth);
    store<Float>(at + kWidth, x.second, kWidth);
}

// 2ˣ, relative error 1.1e-7; 0 below 2⁻¹²⁶, where 1.1e-38 of the largest weight is lost. For x up
// to 127 and NaN. A minimax fit on |r| ≤ ½ with p(0) = 1.
TRIMPOT_INLINE static inline Floats power(Floats x) {
    constexpr float kRound = 12582912.0f + 127.0f;  // the sum's last bits are an exponent's
    const Floats shifted = x + kRound;
    const Floats r = x - (shifted - kRound);
    Floats p = fma(r, all(0.00132647261f), all(0.00967151299f));
    p = fma(p, r, all(0.0555073358f));
    p = fma(p, r, all(0.240222424f));
    p = fma(p, r, all(0.693147004f));
    p = fma(p, r, all(1.0f));
    return x <= -126.0f ? Floats{} : p * floats_of(bits_of(shifted) << 23);
}

constexpr float kLog2e = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

#include "attention_amx_backward.h"
#include "attention_amx_forward.h"
// Stands on both.
#include "attention_calls.h"

void forward(const Attention& a) { start(a, false); }
void backward(const Attention& a) { start(a, true); }

}  // namespace

extern const AttentionTable attention;
const AttentionTable attention{scratch_floats, forward, backward};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
