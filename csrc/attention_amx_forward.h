// Attention forward on tiles. Included by attention_amx.cpp, in its namespace.

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
