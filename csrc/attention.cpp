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

#include "attention_tile.h"

constexpr int64_t kKeys = kAttentionKeys, kQueries = kAttentionQueries;
constexpr int64_t kTile = kTileRows * kTileColumns;
constexpr int kParts = kTileColumns / kWidth;  // vectors of a row of a tile
constexpr float kInfinity = __builtin_inff();

static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t up_to(int64_t x, int64_t multiple) {
    return (x + multiple - 1) / multiple * multiple;
}
static inline int64_t padded(const Attention& a) { return up_to(a.width, kTileColumns); }

// Keys of a document that rows first … last − 1 of it see between them.
struct Range {
    int64_t from, to;
};

static inline Range seen(const Attention& a, int64_t first, int64_t last) {
    return {a.window ? most(0, first - a.window + 1) : 0, last};
}

// ---- items in and out

// `count` rows of one head from token `token` on → floats [rows][padded], zeros around them.
template <class T>
void read(const Attention& a, const TokenHeads& x, int64_t head, int64_t token, int64_t count,
          int64_t rows, float* out) {
    const int64_t stride = padded(a);
    for (int64_t r = 0; r < count; ++r) {
        const auto* row =
            static_cast<const typename T::Item*>(x.data) + (token + r) * x.token + head * x.head;
        sweep(stride, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
            const int64_t left = least(n, a.width - i);
            store<Float>(out + r * stride + i, left > 0 ? load<T>(row + i, left) : Floats{}, n);
        });
    }
    __builtin_memset(out + count * stride, 0,
                     static_cast<uint64_t>((rows - count) * stride) * sizeof *out);
}

// Row of floats times factor → row of [T, heads, D] without gaps.
template <class T>
void write(const Attention& a, const float* row, float factor, void* out, int64_t at) {
    auto* to = static_cast<typename T::Item*>(out) + at * a.width;
    sweep(a.width, [&](int64_t i, int64_t n)
                       TRIMPOT_INLINE { store<T>(to + i, load<Float>(row + i, n) * factor, n); });
}

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

// ---- parts of both directions

// Which items of a tile are seen: row r sees keys low + r … high + r − 1, counted from the tile's
// first column.
struct Sight {
    int64_t low, high;
    bool all, none;
};

static inline Sight sight(const Attention& a, int64_t row, int64_t key) {
    const int64_t high = row - key + 1, low = a.window ? high - a.window : -(int64_t{1} << 40);
    const bool every = high >= kTileColumns && low + kTileRows - 1 <= 0;
    return {low, high, every, high + kTileRows - 1 <= 0 || low >= kTileColumns};
}

// value where row r sees the columns from `column` on, else `otherwise`.
static inline Floats where_seen(const Sight& see, int64_t r, int64_t column, Floats value,
                                float otherwise) {
    Ints index;
    for (int i = 0; i < kWidth; ++i) index[i] = i;
    const auto low = static_cast<int32_t>(most(-1, least(see.low + r - column, kWidth)));
    const auto high = static_cast<int32_t>(most(-1, least(see.high + r - column, kWidth)));
    return (index >= low) & (index < high) ? value : all(otherwise);
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

// ---- directions

#include "attention_backward.h"
#include "attention_forward.h"

// ---- calls

static int64_t scratch_floats(const Attention& a, bool back) {
    return up_to(back ? backward_floats(a) : forward_floats(a), 16);
}

template <class T, bool kCap>
void run(const Attention& a, bool back) {
    const int64_t floats = scratch_floats(a, back);
#pragma omp parallel num_threads(a.threads)
    {
        float* scratch = a.scratch + floats * omp_get_thread_num();
        const ForwardSpace there = forward_space(a, scratch);
        const BackwardSpace returning = backward_space(a, scratch);
#pragma omp for schedule(dynamic)
        for (int64_t i = 0; i < a.task_count; ++i) {
            if (back) {
                backward_task<T, kCap>(a, a.tasks[i], returning);
            } else {
                forward_task<T, kCap>(a, a.tasks[i], there);
            }
        }
        if (back) {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < a.task_count; ++i) finish<T>(a, a.tasks[i]);
        }
    }
}

static void start(const Attention& a, bool back) {
    with_type(a.type, [&](auto type) {
        using T = decltype(type);
        a.softcap > 0 ? run<T, true>(a, back) : run<T, false>(a, back);
    });
}

void forward(const Attention& a) { start(a, false); }
void backward(const Attention& a) { start(a, true); }

}  // namespace

extern const AttentionTable attention;
const AttentionTable attention{scratch_floats, forward, backward};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
