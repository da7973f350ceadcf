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

// ---- forward

struct ForwardSpace {
    float* rows;
    Halved keys, values, right;  // left operands [kKeys / 32] … of K and Vᵀ, a step of V
    Halved q;                    // right operands [heads of the group][panels of the task] of Q
    float *o, *largest, *sum;    // [heads of the group][panels] … of Oᵀ, softmax's state
    float* s;                    // scores
    Halved p;                    // right operand
    int64_t used;
};

static ForwardSpace forward_space(const Attention& a, float* at) {
    const int64_t width = padded(a);
    const int64_t rows = up_to(a.longest, 32) * (a.heads / a.kv_heads);
    Memory memory{at};
    ForwardSpace x;
    x.rows = memory.floats(32 * width);
    x.keys = memory.halved(kKeys * width);
    x.values = memory.halved(kKeys * width);
    x.right = memory.halved(32 * width);
    x.q = memory.halved(rows * width);
    x.o = memory.floats(rows * width);
    x.largest = memory.floats(rows);
    x.sum = memory.floats(rows);
    x.s = memory.floats(kKeys * 32);
    x.p = memory.halved(kKeys * 32);
    x.used = memory.used;
    return x;
}

static int64_t forward_floats(const Attention& a) { return forward_space(a, nullptr).used; }

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

// Scores are in units of ln 2: what softmax knows of a query too, but for lse as it is stored.
template <bool kCap>
TRIMPOT_INLINE static inline Floats score(const Attention& a, Floats product) {
    if constexpr (kCap) return tanh(product * (a.scale / a.softcap)) * (a.softcap * kLog2e);
    return product * (a.scale * kLog2e);
}

// Products of 32 keys with 32 queries: the largest score of each query. Scores that are not these
// products times a factor are stored.
template <bool kCap>
Pair score_tile(const Attention& a, const Sight& see, float* s, Pair top) {
    for (int r = 0; r < 32; ++r) {
        Pair v = pair_at(s + r * 32);
        v = {score<kCap>(a, v.first), score<kCap>(a, v.second)};
        if (!see.all) {
            v = {where_seen(see, r, 0, v.first, -kInfinity),
                 where_seen(see, r, kWidth, v.second, -kInfinity)};
        }
        if (kCap || !see.all) put_pair(s + r * 32, v);
        top = {larger(v.first, top.first), larger(v.second, top.second)};
    }
    return top;
}

// Scores, or products that become scores times `factor` → P before its division, and the sum for
// each query.
TRIMPOT_INLINE static inline Pair weigh_tile(const float* s, float factor, const Pair& less,
                                             const Halved& p, Pair sum) {
    const auto weight = [&](int r) TRIMPOT_INLINE {
        const Pair v = pair_at(s + r * 32);
        return Pair{power(fma(v.first, all(factor), -less.first)),
                    power(fma(v.second, all(factor), -less.second))};
    };
    for (int r = 0; r < 16; ++r) {
        const Pair e = weight(r), f = weight(r + 16);
        sum = {sum.first + (e.first + f.first), sum.second + (e.second + f.second)};
        store_lines(p, r * 2 * kLine, parts_of(e.first), parts_of(f.first));
        store_lines(p, r * 2 * kLine + kLine, parts_of(e.second), parts_of(f.second));
    }
    return sum;
}

static inline Floats finite_or_zero(Floats x) { return x == -kInfinity ? Floats{} : x; }

static inline bool any_changed(Floats before, Floats now) {
    const Ints changed = before != now;
    return _mm512_movepi32_mask((__m512i)changed) != 0;
}

// 32 queries of one head, the panel `at` of the task, with the keys from `key` on.
template <class T, bool kCap>
void forward_panel(const Attention& a, const ForwardSpace& x, int64_t at, int64_t row, int64_t rows,
                   int64_t key, int64_t keys) {
    const Range range = seen(a, row, row + rows);
    const int64_t from = most(range.from - key, 0) / 32, end = least(range.to - key, keys);
    if (from * 32 >= end) return;
    const int64_t to = up_to(end, 32) / 32, width = padded(a);
    const Pair before = pair_at(x.largest + at * 32);
    Pair top = before;
    fence();
    for (int64_t t = from; t < to; ++t) {
        zero_sums();
        sum_steps<kSplit<T>, kSplit<T>>(width / 32, width, x.keys.operand(t * 32 * width),
                                        x.q.operand(at * 32 * width));
        store_sums(x.s + t * kScores);
    }
    for (int64_t t = from; t < to; ++t) {
        top = score_tile<kCap>(a, sight(a, key + t * 32, row, rows), x.s + t * kScores, top);
    }
    // A query whose keys all lie in other blocks has seen nothing yet.
    const Pair less{finite_or_zero(top.first), finite_or_zero(top.second)};
    Pair sum{};
    for (int64_t t = from; t < to; ++t) {
        const bool stored = kCap || !sight(a, key + t * 32, row, rows).all;
        const float factor = stored ? 1.0f : a.scale * kLog2e;
        sum = weigh_tile(x.s + t * kScores, factor, less, x.p.from(t * kScores), sum);
    }
    float* o = x.o + at * 32 * width;
    const Pair held = pair_at(x.sum + at * 32);
    if (any_changed(before.first, top.first) || any_changed(before.second, top.second)) {
        const Pair keep{power(before.first - less.first), power(before.second - less.second)};
        for (int64_t d = 0; d < width; ++d) {
            const Pair old = pair_at(o + d * 32);
            put_pair(o + d * 32, {old.first * keep.first, old.second * keep.second});
        }
        sum = {fma(held.first, keep.first, sum.first), fma(held.second, keep.second, sum.second)};
        put_pair(x.largest + at * 32, top);
    } else {
        sum = {held.first + sum.first, held.second + sum.second};
    }
    put_pair(x.sum + at * 32, sum);
    fence();
    for (int64_t d = 0; d < width; d += 32) {
        load_sums(o + d * 32);
        sum_steps<kSplit<T>, true>(to - from, kKeys, x.values.operand(d * kKeys + from * 512),
                                   x.p.operand(from * kScores));
        store_sums(o + d * 32);
    }
}

// A block of keys and values as left operands.
template <class T>
void forward_keys(const Attention& a, const AttentionTask& task, const ForwardSpace& x, int64_t key,
                  int64_t keys) {
    const int64_t width = padded(a);
    for (int64_t r = 0; r < keys; r += 32) {
        const int64_t token = task.first + key + r, count = least(32, keys - r);
        read<T>(a, a.k, task.head, token, count, 32, x.rows);
        left_of(x.rows, width, x.keys.from(r * width));
        read<T>(a, a.v, task.head, token, count, 32, x.rows);
        right_of(x.rows, width, 1024, x.right);
        left_from_right<kSplit<T>>(x.right, width, kKeys / 32, x.values.from(r * 16));
    }
}

template <class T, bool kCap>
void forward_task(const Attention& a, const AttentionTask& task, const ForwardSpace& x) {
    const Tiles tiles;
    const int64_t group = a.heads / a.kv_heads, width = padded(a), end = task.begin + task.rows;
    const int64_t panels = up_to(task.rows, 32) / 32;
    const auto rows_of = [&](int64_t p) { return least(32, task.rows - p * 32); };
    for (int64_t at = 0; at < group * panels; ++at) {
        const int64_t p = at % panels, token = task.first + task.begin + p * 32;
        read<T>(a, a.q, task.head * group + at / panels, token, rows_of(p), 32, x.rows);
        left_of(x.rows, width, x.right);
        right_from_left<kSplit<T>>(x.right, width, x.q.from(at * 32 * width));
    }
    __builtin_memset(x.o, 0, static_cast<uint64_t>(group * panels * 32 * width) * sizeof(float));
    for (int64_t i = 0; i < group * panels * 32; ++i) {
        x.largest[i] = -kInfinity;
        x.sum[i] = 0;
    }
    const int64_t first = seen(a, task.begin, end).from;
    for (int64_t key = first / kKeys * kKeys; key < end; key += kKeys) {
        const int64_t keys = least(kKeys, end - key);
        forward_keys<T>(a, task, x, key, keys);
        for (int64_t at = 0; at < group * panels; ++at) {
            const int64_t p = at % panels;
            forward_panel<T, kCap>(a, x, at, task.begin + p * 32, rows_of(p), key, keys);
        }
    }
    for (int64_t at = 0; at < group * panels; ++at) {
        const int64_t p = at % panels, head = task.head * group + at / panels;
        const int64_t token = task.first + task.begin + p * 32;
        const float *sum = x.sum + at * 32, *largest = x.largest + at * 32;
        write_columns<T>(a, x.o + at * 32 * width, rows_of(p), a.o, token * a.heads + head,
                         [&](int64_t r) { return 1.0f / sum[r]; });
        for (int64_t r = 0; r < rows_of(p); ++r) {
            a.lse[head * a.tokens + token + r] = largest[r] * kLn2 + __builtin_logf(sum[r]);
        }
    }
}

// ---- backward

struct BackwardSpace {
    float* rows;
    Halved left, right;         // of 32 rows
    Halved q_right, d_o_right;  // over D: [panels of the document][width / 2][32][2]
    Halved q_down, d_o_down;    // over queries: [units of the document][width / 32][32][32][2]
    Halved keys, values;        // over D: left operands of a block
    Halved keys_down;           // over keys: [units of the block][width / 16][2][16][32]
    float *lse, *delta;         // of the whole document
    float *dq, *dk, *dv;        // [panels of the document][width][32]; rows of a block of keys
    float *s, *dp;              // 32 x 32
    Halved p, ds, ds_right;     // of a unit: over queries, over queries, over keys
    int64_t used;
};

static BackwardSpace backward_space(const Attention& a, float* at) {
    const int64_t width = padded(a), rows = up_to(a.longest, kUnit);
    Memory memory{at};
    BackwardSpace x;
    x.rows = memory.floats(32 * width);
    x.left = memory.halved(32 * width);
    x.right = memory.halved(32 * width);
    x.q_right = memory.halved(rows * width);
    x.d_o_right = memory.halved(rows * width);
    x.q_down = memory.halved(rows * width);
    x.d_o_down = memory.halved(rows * width);
    x.keys = memory.halved(kBlock * width);
    x.values = memory.halved(kBlock * width);
    x.keys_down = memory.halved(kBlock * width);
    x.lse = memory.floats(rows);
    x.delta = memory.floats(rows);
    x.dq = memory.floats(rows * width);
    x.dk = memory.floats(kBlock * width);
    x.dv = memory.floats(kBlock * width);
    x.s = memory.floats(kScores);
    x.dp = memory.floats(kScores);
    x.p = memory.halved(kUnit * kUnit);
    x.ds = memory.halved(kUnit * kUnit);
    x.ds_right = memory.halved(kUnit * kUnit);
    x.used = memory.used;
    return x;
}

static int64_t backward_floats(const Attention& a) { return backward_space(a, nullptr).used; }

// Q and dO of the document as right operands, over D and over queries.
template <class T>
void backward_queries(const Attention& a, const AttentionTask& task, int64_t head,
                      const BackwardSpace& x) {
    const int64_t width = padded(a);
    const auto operands = [&](const TokenHeads& from, int64_t r, const Halved& right,
                              const Halved& down) {
        const int64_t count = most(0, least(32, task.length - r));
        read<T>(a, from, head, task.first + r, count, 32, x.rows);
        left_of(x.rows, width, x.left);
        right_from_left<kSplit<T>>(x.left, width, right.from(r * width));
        right_of(x.rows, width, kUnit * 32, down.from(r / kUnit * kUnit * width + r % kUnit * 32));
    };
    for (int64_t r = 0; r < up_to(task.length, kUnit); r += 32) {
        operands(a.q, r, x.q_right, x.q_down);
        operands(a.d_o, r, x.d_o_right, x.d_o_down);
    }
}

// A block of keys and values as left operands.
template <class T>
void backward_keys(const Attention& a, const AttentionTask& task, int64_t head, int64_t key,
                   int64_t keys, const BackwardSpace& x) {
    const int64_t width = padded(a);
    for (int64_t r = 0; r < up_to(keys, kUnit); r += 32) {
        const int64_t token = task.first + key + r, count = most(0, least(32, keys - r));
        read<T>(a, a.v, head, token, count, 32, x.rows);
        left_of(x.rows, width, x.values.from(r * width));
        read<T>(a, a.k, head, token, count, 32, x.rows);
        left_of(x.rows, width, x.keys.from(r * width));
        right_of(x.rows, width, 1024, x.right);
        left_from_right<kSplit<T>>(x.right, width, 2,
                                   x.keys_down.from(r / kUnit * kUnit * width + r % kUnit * 16));
    }
}

// Q Kᵀ and dO Vᵀ of two keys with 16 queries → P and dS.
template <bool kCap>
TRIMPOT_INLINE static inline Pair gradient(const Attention& a, Floats s, Floats dp, Floats lse,
                                           Floats delta) {
    Floats e, slope;
    if constexpr (kCap) {
        const Floats t = tanh(s * (a.scale / a.softcap));
        e = power(fma(t, all(a.softcap * kLog2e), -lse));
        slope = 1.0f - t * t;
    } else {
        e = power(fma(s, all(a.scale * kLog2e), -lse));
    }
    Floats d = e * (dp - delta);
    if constexpr (kCap) d = d * slope;
    return {e, d};
}

// 32 keys, `k` of the unit, with 32 queries, `q` of it.
template <bool kCap>
void gradient_tile(const Attention& a, const Sight& see, const BackwardSpace& x, int64_t k,
                   int64_t q, const float* lse, const float* delta) {
    const Pair lses = pair_at(lse), of_rows = pair_at(delta);
    for (int r = 0; r < 16; ++r) {
        Parts p[4], ds[4];  // keys r, r + 16; queries 0 to 15, 16 to 31
        for (int i = 0; i < 4; ++i) {
            const int key = r + i / 2 * 16, query = i % 2 * 16;
            const float* at = x.s + key * 32 + query;
            Pair both = gradient<kCap>(
                a, load<Float>(at, kWidth), load<Float>(x.dp + (at - x.s), kWidth),
                i % 2 ? lses.second : lses.first, i % 2 ? of_rows.second : of_rows.first);
            if (!see.all) {
                both = {where_seen(see, key, query, both.first, 0.0f),
                        where_seen(see, key, query, both.second, 0.0f)};
            }
            p[i] = parts_of(both.first);
            ds[i] = parts_of(both.second);
        }
        for (int half = 0; half < 2; ++half) {
            const int64_t down = (k * 2 + half) * kUnit * 16 + q * 512 + r * kLine;
            store_lines(x.p, down, p[2 * half], p[2 * half + 1]);
            store_lines(x.ds, down, ds[2 * half], ds[2 * half + 1]);
            store_lines(x.ds_right, q * kUnit * 32 + k * 1024 + (r * 2 + half) * kLine, ds[half],
                        ds[half + 2]);
        }
    }
}

// Steps of a contraction over a unit that there is something in.
struct Steps {
    int64_t from = 2, to = 0;

    void add(int64_t step) {
        from = least(from, step);
        to = most(to, step + 1);
    }
    int64_t count() const { return to - from; }
};

// 64 keys, `key` of the document and `at` of the block, with 64 queries from `row` on.
template <class T, bool kCap>
void backward_unit(const Attention& a, const BackwardSpace& x, int64_t length, int64_t key,
                   int64_t at, int64_t row) {
    const int64_t width = padded(a);
    constexpr bool kLow = kSplit<T>;
    Steps of_keys[2], of_queries[2];  // queries that keys are seen by, keys that queries see
    for (int64_t k = 0; k < 2; ++k) {
        for (int64_t q = 0; q < 2; ++q) {
            const int64_t first = row + q * 32, rows = most(0, least(32, length - first));
            const Sight see = sight(a, key + k * 32, first, rows);
            if (see.none) continue;
            of_keys[k].add(q);
            of_queries[q].add(k);
            fence();
            zero_sums();
            sum_steps<kLow, kLow>(width / 32, width, x.keys.operand((at + k * 32) * width),
                                  x.q_right.operand(first * width));
            store_sums(x.s);
            zero_sums();
            sum_steps<kLow, kLow>(width / 32, width, x.values.operand((at + k * 32) * width),
                                  x.d_o_right.operand(first * width));
            store_sums(x.dp);
            gradient_tile<kCap>(a, see, x, k, q, x.lse + first, x.delta + first);
        }
    }
    fence();
    for (int64_t k = 0; k < 2; ++k) {
        const Steps& steps = of_keys[k];
        if (steps.count() <= 0) continue;
        const int64_t left = k * 32 * kUnit + steps.from * 512;
        for (int64_t d = 0; d < width; d += 32) {
            const int64_t to = (at + k * 32) * width + d;
            const int64_t right = row * width + d * kUnit + steps.from * 1024;
            load_sums(x.dv + to, width);
            sum_steps<true, kLow>(steps.count(), kUnit, x.p.operand(left),
                                  x.d_o_down.operand(right));
            store_sums(x.dv + to, width);
            load_sums(x.dk + to, width);
            sum_steps<true, kLow>(steps.count(), kUnit, x.ds.operand(left),
                                  x.q_down.operand(right));
            store_sums(x.dk + to, width);
        }
    }
    for (int64_t q = 0; q < 2; ++q) {
        const Steps& steps = of_queries[q];
        if (steps.count() <= 0) continue;
        for (int64_t d = 0; d < width; d += 32) {
            float* to = x.dq + (row + q * 32) * width + d * 32;
            load_sums(to);
            sum_steps<kLow, true>(steps.count(), kUnit,
                                  x.keys_down.operand(at * width + d * kUnit + steps.from * 512),
                                  x.ds_right.operand(q * kUnit * 32 + steps.from * 1024));
            store_sums(to);
        }
    }
}

template <class T, bool kCap>
void backward_head(const Attention& a, const AttentionTask& task, int64_t head, int64_t slot,
                   bool add, const BackwardSpace& x) {
    const Tiles tiles;
    const int64_t width = padded(a), n = task.length, kv = head / (a.heads / a.kv_heads);
    const auto clear = [&](float* at, int64_t items) {
        __builtin_memset(at, 0, static_cast<uint64_t>(items) * sizeof *at);
    };
    clear(x.dq, up_to(n, kUnit) * width);
    clear(x.delta, up_to(n, kUnit));
    clear(x.lse, up_to(n, kUnit));
    deltas<T>(a, task, head, x.delta);
    const float* lse = a.lse + head * a.tokens + task.first;
    for (int64_t r = 0; r < n; ++r) x.lse[r] = lse[r] * kLog2e;
    backward_queries<T>(a, task, head, x);
    for (int64_t key = 0; key < n; key += kBlock) {
        const int64_t keys = least(kBlock, n - key);
        backward_keys<T>(a, task, kv, key, keys, x);
        clear(x.dk, kBlock * width);
        clear(x.dv, kBlock * width);
        const int64_t last = a.window ? least(n, key + keys - 1 + a.window) : n;
        for (int64_t row = key; row < last; row += kUnit) {
            for (int64_t at = 0; at < keys && key + at < row + kUnit; at += kUnit) {
                backward_unit<T, kCap>(a, x, n, key + at, at, row);
            }
        }
        float* sums = a.sums + (slot * a.tokens + task.first + key) * a.width;
        keep(a, x.dk, keys, a.scale, add, sums);
        keep(a, x.dv, keys, 1.0f, add, sums + a.slots * a.tokens * a.width);
    }
    for (int64_t r = 0; r < n; r += 32) {
        write_columns<T>(a, x.dq + r * width, least(32, n - r), a.dq,
                         (task.first + r) * a.heads + head, [&](int64_t) { return a.scale; });
    }
}

#include "attention_calls.h"

void forward(const Attention& a) { start(a, false); }
void backward(const Attention& a) { start(a, true); }

}  // namespace

extern const AttentionTable attention;
const AttentionTable attention{scratch_floats, forward, backward};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
