// Attention forward. Included by attention.cpp, in its namespace.

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
