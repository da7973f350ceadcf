// Attention backward on tiles. Included by attention_amx.cpp, in its namespace.

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
