// Compiled once for each instruction set, see vec.h. Products are 14 x 32 tiles (gemm_micro.h);
// blocks of 224 keys are counted from their document's first token, so that nothing of another
// document is ever read and no bit depends on where a document stands.
#include "attention.h"

#include <omp.h>

#include "gemm.h"
#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

#include "attention_parts.h"
#include "attention_tile.h"

constexpr int64_t kKeys = kAttentionKeys, kQueries = kAttentionQueries;
constexpr int64_t kTile = kTileRows * kTileColumns;

// Rows [keys][stride] → columns of panels [panel][D][32]; keys past `count` are zeros.
static void transpose(const float* rows, int64_t stride, int64_t count, int64_t width, float* out) {
    for (int64_t p = 0; p * kTileColumns < count; ++p) {
        float* panel = out + p * width * kTileColumns;
        const float* from = rows + p * kTileColumns * stride;
        const int64_t columns = least(kTileColumns, count - p * kTileColumns);
        // Eight items of D at a time: 32 half cache lines are read and eight rows written.
        for (int64_t d = 0; d < width; d += 8) {
            const int64_t items = least(8, width - d);
            for (int64_t c = 0; c < columns; ++c) {
                for (int64_t i = 0; i < items; ++i) {
                    panel[(d + i) * kTileColumns + c] = from[c * stride + d + i];
                }
            }
            for (int64_t i = 0; i < items && columns < kTileColumns; ++i) {
                __builtin_memset(panel + (d + i) * kTileColumns + columns, 0,
                                 static_cast<uint64_t>(kTileColumns - columns) * sizeof(float));
            }
        }
    }
}

// 14 queries by 32 keys.
static inline Sight sight(const Attention& a, int64_t row, int64_t key) {
    const int64_t high = row - key + 1, low = a.window ? high - a.window : -(int64_t{1} << 40);
    const bool every = high >= kTileColumns && low + kTileRows - 1 <= 0;
    return {low, high, kTileColumns, every, high + kTileRows - 1 <= 0 || low >= kTileColumns};
}

// C[14][columns of 32] = keep·C + a b, where b has rows of `stride` floats.
template <class Keep>
TRIMPOT_INLINE inline void product(const float* a, int64_t row, int64_t lane, const float* b,
                                   int64_t stride, int64_t lanes, float* c, float* tile,
                                   Keep keep) {
    for (int64_t from = 0; from < stride; from += kTileColumns) {
        tile_product(lanes, a, row, lane, b + from, stride, tile);
        for (int r = 0; r < kTileRows; ++r) {
            float* to = c + r * stride + from;
            const float kept = keep(r);
            for (int i = 0; i < kParts; ++i) {
                const Floats old = load<Float>(to + i * kWidth, kWidth);
                const Floats sum = load<Float>(tile + r * kTileColumns + i * kWidth, kWidth);
                store<Float>(to + i * kWidth, fma(old, all(kept), sum), kWidth);
            }
        }
    }
}

#include "attention_backward.h"
#include "attention_forward.h"
// Stands on both.
#include "attention_calls.h"

void forward(const Attention& a) { start(a, false); }
void backward(const Attention& a) { start(a, true); }

}  // namespace

extern const AttentionTable attention;
const AttentionTable attention{scratch_floats, forward, backward};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
