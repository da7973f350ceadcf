// Parts of attention that all its arithmetics share. Included by attention.cpp and
// attention_amx.cpp, in their namespaces.

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

// ---- scores

// Which items of a tile are seen: of row r the columns low + r … high + r − 1 that come before
// `end`.
struct Sight {
    int64_t low, high, end;
    bool all, none;
};

// value where row r sees the columns from `column` on, else `otherwise`.
static inline Floats where_seen(const Sight& see, int64_t r, int64_t column, Floats value,
                                float otherwise) {
    Ints index;
    for (int i = 0; i < kWidth; ++i) index[i] = i;
    const auto low = static_cast<int32_t>(most(-1, least(see.low + r - column, kWidth)));
    const int64_t to = least(see.high + r, see.end);
    const auto high = static_cast<int32_t>(most(-1, least(to - column, kWidth)));
    return (index >= low) & (index < high) ? value : all(otherwise);
}

// ---- backward

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
