// Attention backward. Included by attention.cpp, in its namespace.

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
