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

// ---- forward

struct ForwardSpace {
    float *keys, *values, *rows;  // panels, rows, and space for rows
    float *q, *o;                 // [heads of the group][rows of the task][padded]
    float *largest, *sum;         // one for each row of q
    float *s, *tile;
};

static int64_t forward_floats(const Attention& a) {
    const int64_t rows = a.longest * (a.heads / a.kv_heads);
    return 3 * kKeys * padded(a) + 2 * rows * padded(a) + 2 * up_to(rows, 16) + kTileRows * kKeys +
           kTile;
}

static ForwardSpace forward_space(const Attention& a, float* at) {
    const int64_t block = kKeys * padded(a), rows = a.longest * (a.heads / a.kv_heads);
    ForwardSpace x;
    const auto take = [&at](int64_t count) {
        float* taken = at;
        at += count;
        return taken;
    };
    x.keys = take(block);
    x.values = take(block);
    x.rows = take(block);
    x.q = take(rows * padded(a));
    x.o = take(rows * padded(a));
    x.largest = take(up_to(rows, 16));
    x.sum = take(up_to(rows, 16));
    x.s = take(kTileRows * kKeys);
    x.tile = take(kTile);
    return x;
}

// Scores of 14 rows with 32 keys → s, and the largest of each row.
template <bool kCap>
void score_tile(const Attention& a, const Sight& see, const float* tile, float* s, Floats* top) {
    for (int r = 0; r < kTileRows; ++r) {
        for (int i = 0; i < kParts; ++i) {
            Floats v = load<Float>(tile + r * kTileColumns + i * kWidth, kWidth) * a.scale;
            if constexpr (kCap) v = tanh(v / a.softcap) * a.softcap;
            if (!see.all) v = where_seen(see, r, i * kWidth, v, -kInfinity);
            store<Float>(s + r * kKeys + i * kWidth, v, kWidth);
            top[r] = larger(v, top[r]);
        }
    }
}

// 14 rows of one head, from the document's row `row` on, with the keys from `key` on.
template <bool kCap>
void forward_strip(const Attention& a, const ForwardSpace& x, int64_t at, int64_t row, int64_t rows,
                   int64_t key, int64_t keys) {
    const Range range = seen(a, row, row + rows);
    const int64_t from = most(range.from - key, 0), to = least(range.to - key, keys);
    if (from >= to) return;
    const int64_t stride = padded(a), start = from / kTileColumns * kTileColumns;
    const int64_t end = up_to(to, kTileColumns);
    Floats top[kTileRows];
    for (Floats& t : top) t = all(-kInfinity);
    for (int64_t c = start; c < end; c += kTileColumns) {
        tile_product(a.width, x.q + at * stride, stride, 1, x.keys + c * a.width, kTileColumns,
                     x.tile);
        score_tile<kCap>(a, sight(a, row, key + c), x.tile, x.s + c, top);
    }
    float less[16] = {}, keep[16] = {};
    for (int r = 0; r < kTileRows; ++r) {
        const float before = x.largest[at + r], found = largest(top[r]);
        const float now = found > before ? found : before;
        // A row whose keys all lie in other blocks has seen nothing yet.
        less[r] = now == -kInfinity ? 0.0f : now;
        keep[r] = before == now ? 0.0f : before - less[r];
        x.largest[at + r] = now;
    }
    // All rows at once: one by one, waiting for each was 15 % of short documents' time.
    sweep(16, [&](int64_t i, int64_t n)
                  TRIMPOT_INLINE { store<Float>(keep + i, exp(load<Float>(keep + i, n)), n); });
    for (int r = 0; r < kTileRows; ++r) {
        float* s = x.s + r * kKeys;
        const float sum = fold(end - start, [&](int64_t i, int64_t n, Floats part) TRIMPOT_INLINE {
            const Floats e = exp(load<Float>(s + start + i, n) - less[r]);
            store<Float>(s + start + i, e, n);
            return part + e;
        });
        x.sum[at + r] = x.sum[at + r] * keep[r] + sum;
    }
    product(x.s + from, kKeys, 1, x.values + from * stride, stride, to - from, x.o + at * stride,
            x.tile, [&](int r) { return keep[r]; });
}

template <class T, bool kCap>
void forward_task(const Attention& a, const AttentionTask& task, const ForwardSpace& x) {
    const int64_t group = a.heads / a.kv_heads, stride = padded(a), end = task.begin + task.rows;
    const int64_t rows = up_to(task.rows, kTileRows);
    for (int64_t h = 0; h < group; ++h) {
        read<T>(a, a.q, task.head * group + h, task.first + task.begin, task.rows, rows,
                x.q + h * rows * stride);
    }
    __builtin_memset(x.o, 0, static_cast<uint64_t>(group * rows * stride) * sizeof(float));
    for (int64_t i = 0; i < group * rows; ++i) {
        x.largest[i] = -kInfinity;
        x.sum[i] = 0;
    }
    const int64_t first = seen(a, task.begin, end).from;
    for (int64_t key = first / kKeys * kKeys; key < end; key += kKeys) {
        const int64_t keys = least(kKeys, end - key);
        read<T>(a, a.k, task.head, task.first + key, keys, keys, x.rows);
        transpose(x.rows, stride, keys, a.width, x.keys);
        read<T>(a, a.v, task.head, task.first + key, keys, keys, x.values);
        for (int64_t h = 0; h < group; ++h) {
            for (int64_t r = 0; r < rows; r += kTileRows) {
                forward_strip<kCap>(a, x, h * rows + r, task.begin + r,
                                    least(kTileRows, task.rows - r), key, keys);
            }
        }
    }
    for (int64_t h = 0; h < group; ++h) {
        const int64_t head = task.head * group + h;
        for (int64_t r = 0; r < task.rows; ++r) {
            const int64_t at = h * rows + r, token = task.first + task.begin + r;
            write<T>(a, x.o + at * stride, 1.0f / x.sum[at], a.o, token * a.heads + head);
            a.lse[head * a.tokens + token] = x.largest[at] + __builtin_logf(x.sum[at]);
        }
    }
}

// ---- backward

struct BackwardSpace {
    float *keys, *values, *rows;  // panels of K and of V, rows of K
    float *q, *d_o;               // rows of a block
    float *p, *ds;                // [queries][keys]
    float *dk, *dv;               // rows of a block of keys
    float *dq, *delta;            // of the whole document
    float* tile;                  // two
};

static int64_t backward_floats(const Attention& a) {
    const int64_t stride = padded(a), rows = up_to(a.longest, kTileRows);
    return 5 * kKeys * stride + 2 * kQueries * stride + 2 * kQueries * kKeys + rows * stride +
           up_to(rows, 16) + 2 * kTile;
}

static BackwardSpace backward_space(const Attention& a, float* at) {
    const int64_t stride = padded(a), rows = up_to(a.longest, kTileRows);
    BackwardSpace x;
    const auto take = [&at](int64_t count) {
        float* taken = at;
        at += count;
        return taken;
    };
    x.keys = take(kKeys * stride);
    x.values = take(kKeys * stride);
    x.rows = take(kKeys * stride);
    x.dk = take(kKeys * stride);
    x.dv = take(kKeys * stride);
    x.q = take(kQueries * stride);
    x.d_o = take(kQueries * stride);
    x.p = take(kQueries * kKeys);
    x.ds = take(kQueries * kKeys);
    x.dq = take(rows * stride);
    x.delta = take(up_to(rows, 16));
    x.tile = take(2 * kTile);
    return x;
}

// rowsum(dO ⊙ O) of a document's rows.
template <class T>
void deltas(const Attention& a, const AttentionTask& task, int64_t head, float* out) {
    for (int64_t t = 0; t < task.length; ++t) {
        const auto row = [&](const TokenHeads& x) {
            return static_cast<const typename T::Item*>(x.data) + (task.first + t) * x.token +
                   head * x.head;
        };
        const auto *o = row(a.o_in), *d_o = row(a.d_o);
        out[t] = fold(a.width, [&](int64_t i, int64_t n, Floats sum) TRIMPOT_INLINE {
            return fma(load<T>(o + i, n), load<T>(d_o + i, n), sum);
        });
    }
}

// Tiles of Q Kᵀ and dO Vᵀ → P and dS.
template <bool kCap>
void gradient_tile(const Attention& a, const Sight& see, const float* tile, const float* lse,
                   const float* delta, float* p, float* ds) {
    for (int r = 0; r < kTileRows; ++r) {
        for (int i = 0; i < kParts; ++i) {
            const float* at = tile + r * kTileColumns + i * kWidth;
            Floats s = load<Float>(at, kWidth) * a.scale, slope = {};
            if constexpr (kCap) {
                const Floats t = tanh(s / a.softcap);
                s = t * a.softcap;
                slope = 1.0f - t * t;
            }
            Floats e = exp(s - lse[r]);
            Floats d = e * (load<Float>(at + kTile, kWidth) - delta[r]);
            if constexpr (kCap) d = d * slope;
            if (!see.all) {
                e = where_seen(see, r, i * kWidth, e, 0.0f);
                d = where_seen(see, r, i * kWidth, d, 0.0f);
            }
            store<Float>(p + r * kKeys + i * kWidth, e, kWidth);
            store<Float>(ds + r * kKeys + i * kWidth, d, kWidth);
        }
    }
}

// The first `count` columns of 14 rows of a block: nothing is seen there, yet strips of keys that
// lie across their end read them.
static void blank(float* block, int64_t count) {
    for (int r = 0; r < kTileRows && count; ++r) {
        __builtin_memset(block + r * kKeys, 0, static_cast<uint64_t>(count) * sizeof(float));
    }
}

// 14 rows: P and dS, which lie `at` rows into the block, and their share of dQ.
template <bool kCap>
void backward_strip(const Attention& a, const BackwardSpace& x, const float* lse, int64_t at,
                    int64_t row, int64_t rows, int64_t key, int64_t keys) {
    const Range range = seen(a, row, row + rows);
    const int64_t from = most(range.from - key, 0), to = least(range.to - key, keys);
    if (from >= to) return;
    const int64_t stride = padded(a), start = from / kTileColumns * kTileColumns;
    const int64_t end = up_to(to, kTileColumns);
    float *p = x.p + at * kKeys, *ds = x.ds + at * kKeys;
    blank(p, start);
    blank(ds, start);
    float lses[kTileRows] = {};
    __builtin_memcpy(lses, lse + row, static_cast<uint64_t>(rows) * sizeof(float));
    for (int64_t c = start; c < end; c += kTileColumns) {
        tile_product(a.width, x.q + at * stride, stride, 1, x.keys + c * a.width, kTileColumns,
                     x.tile);
        tile_product(a.width, x.d_o + at * stride, stride, 1, x.values + c * a.width, kTileColumns,
                     x.tile + kTile);
        gradient_tile<kCap>(a, sight(a, row, key + c), x.tile, lses, x.delta + row, p + c, ds + c);
    }
    product(ds + from, kKeys, 1, x.rows + from * stride, stride, to - from, x.dq + row * stride,
            x.tile, [](int) { return 1.0f; });
}

// dK and dV of a block of keys from a block of queries `begin` … `begin + rows` − 1.
static void backward_keys(const Attention& a, const BackwardSpace& x, int64_t begin, int64_t rows,
                          int64_t key, int64_t keys) {
    const int64_t stride = padded(a);
    const auto whole = [](int) { return 1.0f; };
    for (int64_t j = 0; j < keys; j += kTileRows) {
        const int64_t last = a.window ? key + j + kTileRows - 1 + a.window : begin + rows;
        const int64_t from = most(key + j - begin, 0), to = least(last - begin, rows);
        if (from >= to) continue;
        product(x.p + from * kKeys + j, 1, kKeys, x.d_o + from * stride, stride, to - from,
                x.dv + j * stride, x.tile, whole);
        product(x.ds + from * kKeys + j, 1, kKeys, x.q + from * stride, stride, to - from,
                x.dk + j * stride, x.tile, whole);
    }
}

// slot (+)= rows of a block times factor.
static void keep(const Attention& a, const float* rows, int64_t count, float factor, bool add,
                 float* slot) {
    for (int64_t r = 0; r < count; ++r) {
        float* to = slot + r * a.width;
        sweep(a.width, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
            const Floats value = load<Float>(rows + r * padded(a) + i, n) * factor;
            store<Float>(to + i, add ? load<Float>(to + i, n) + value : value, n);
        });
    }
}

template <class T, bool kCap>
void backward_head(const Attention& a, const AttentionTask& task, int64_t head, int64_t slot,
                   bool add, const BackwardSpace& x) {
    const int64_t stride = padded(a), n = task.length, kv = head / (a.heads / a.kv_heads);
    const auto clear = [&](float* at, int64_t rows) {
        __builtin_memset(at, 0, static_cast<uint64_t>(rows * stride) * sizeof *at);
    };
    clear(x.dq, up_to(n, kTileRows));
    deltas<T>(a, task, head, x.delta);
    for (int64_t t = n; t < up_to(n, kTileRows); ++t) x.delta[t] = 0;
    const float* lse = a.lse + head * a.tokens + task.first;
    for (int64_t key = 0; key < n; key += kKeys) {
        const int64_t keys = least(kKeys, n - key);
        read<T>(a, a.v, kv, task.first + key, keys, keys, x.rows);
        transpose(x.rows, stride, keys, a.width, x.values);
        read<T>(a, a.k, kv, task.first + key, keys, keys, x.rows);
        transpose(x.rows, stride, keys, a.width, x.keys);
        clear(x.dk, up_to(keys, kTileRows));
        clear(x.dv, up_to(keys, kTileRows));
        const int64_t last = a.window ? least(n, key + keys - 1 + a.window) : n;
        for (int64_t begin = key; begin < last; begin += kQueries) {
            const int64_t rows = least(kQueries, n - begin), tiles = up_to(rows, kTileRows);
            read<T>(a, a.q, head, task.first + begin, rows, tiles, x.q);
            read<T>(a, a.d_o, head, task.first + begin, rows, tiles, x.d_o);
            for (int64_t r = 0; r < rows; r += kTileRows) {
                backward_strip<kCap>(a, x, lse, r, begin + r, least(kTileRows, rows - r), key,
                                     keys);
            }
            backward_keys(a, x, begin, rows, key, keys);
        }
        float* sums = a.sums + (slot * a.tokens + task.first + key) * a.width;
        keep(a, x.dk, keys, a.scale, add, sums);
        keep(a, x.dv, keys, 1.0f, add, sums + a.slots * a.tokens * a.width);
    }
    for (int64_t t = 0; t < n; ++t) {
        write<T>(a, x.dq + t * stride, a.scale, a.dq, (task.first + t) * a.heads + head);
    }
}

// The heads of a group in turn, or one of them: in both cases each head's sum over the queries is
// whole before it is added to the others', so that the bits are the same.
template <class T, bool kCap>
void backward_task(const Attention& a, const AttentionTask& task, const BackwardSpace& x) {
    if (a.slots == a.heads) {
        return backward_head<T, kCap>(a, task, task.head, task.head, false, x);
    }
    const int64_t group = a.heads / a.kv_heads;
    for (int64_t h = 0; h < group; ++h) {
        backward_head<T, kCap>(a, task, task.head * group + h, task.head, h > 0, x);
    }
}

// dk and dv of a task's document and head of keys, from the slots.
template <class T>
void finish(const Attention& a, const AttentionTask& task) {
    const int64_t group = a.slots / a.kv_heads, slot = a.tokens * a.width;
    const int64_t kv = a.slots == a.heads ? task.head / group : task.head;
    if (task.head % group && a.slots == a.heads) return;
    for (int64_t t = task.first; t < task.first + task.length; ++t) {
        for (int which = 0; which < 2; ++which) {
            const float* from = a.sums + (which * a.slots + kv * group) * slot + t * a.width;
            auto* to = static_cast<typename T::Item*>(which ? a.dv : a.dk) +
                       (t * a.kv_heads + kv) * a.width;
            sweep(a.width, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
                Floats sum = load<Float>(from + i, n);
                for (int64_t s = 1; s < group; ++s) sum += load<Float>(from + s * slot + i, n);
                store<T>(to + i, sum, n);
            });
        }
    }
}

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
