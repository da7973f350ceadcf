// Operands of amx_tiles.h from rows of floats. Included by attention_amx.cpp, in its namespace.
//
// The 32 items of a step of a contraction lie in the order 0, 16, 1, 17 … in every operand: a pair
// is then two vectors, one moved up by 16 bits, and needs no permutation.

constexpr int64_t kLine = 32;  // bf16 of a line of 64 bytes

// bf16 of both parts.
struct Halved {
    uint16_t *high, *low;

    Halved from(int64_t offset) const { return {high + offset, low + offset}; }
    Split16 operand(int64_t offset) const { return {high + offset, low + offset}; }
};

// Both parts of floats in the upper 16 bits of each item; what lies below them is not used. Ties
// round up: the low part makes up for it.
struct Parts {
    Bits high, low;
};

constexpr uint32_t kUpper = 0xffff0000u, kTie = 0x8000u;

TRIMPOT_INLINE static inline Parts parts_of(Floats x) {
    const Bits high = bits_of(x) + kTie;
    return {high, bits_of(x - floats_of(high & kUpper)) + kTie};
}

TRIMPOT_INLINE static inline void store_line(uint16_t* to, Bits first, Bits second) {
    const Bits line = (first >> 16) | (second & kUpper);
    __builtin_memcpy(to, &line, sizeof line);
}

TRIMPOT_INLINE static inline void store_lines(const Halved& to, int64_t at, const Parts& first,
                                              const Parts& second) {
    store_line(to.high + at, first.high, second.high);
    store_line(to.low + at, first.low, second.low);
}

// Parts of what a caller passed in: NaN may have any bits, of which + kTie would make a number.
TRIMPOT_INLINE static inline Parts parts_at(const float* from) {
    const Floats x = load<Float>(from, kWidth);
    return parts_of(x != x ? floats_of(Bits{} + 0x7fc00000u) : x);
}

// 16 rows of 16 pairs, `from` and `to` apart in pairs, are exchanged with its columns.
static void transpose(const uint16_t* from, int64_t from_row, uint16_t* to, int64_t to_row) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from + i * 2 * from_row);
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {  // a[i + j]: column j of each group of four
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0x88);  // columns i, 8 + i of rows 0 to 7
        b[i + 4] = _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd);
        b[i + 8] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0x88);
        b[i + 12] = _mm512_shuffle_i32x4(a[i + 8], a[i + 12], 0xdd);
    }
    for (int i = 0; i < 4; ++i) {
        const auto put = [&](int column, __m512i items) {
            _mm512_storeu_si512(to + column * 2 * to_row, items);
        };
        put(i, _mm512_shuffle_i32x4(b[i], b[i + 8], 0x88));
        put(i + 8, _mm512_shuffle_i32x4(b[i], b[i + 8], 0xdd));
        put(i + 4, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0x88));
        put(i + 12, _mm512_shuffle_i32x4(b[i + 4], b[i + 12], 0xdd));
    }
}

template <bool kLow>
static void transpose_both(const Halved& from, int64_t from_row, const Halved& to, int64_t to_row) {
    transpose(from.high, from_row, to.high, to_row);
    if (kLow) transpose(from.low, from_row, to.low, to_row);
}

// 32 rows → left operand that contracts over columns: [2][width / 32][16][32].
static void left_of(const float* rows, int64_t width, const Halved& out) {
    for (int64_t r = 0; r < 32; ++r) {
        const int64_t to = (r / 16 * width + r % 16 * 2) * 16;
        for (int64_t i = 0; i < width; i += 32) {
            store_lines(out, to + i * 16, parts_at(rows + r * width + i),
                        parts_at(rows + r * width + i + 16));
        }
    }
}

// left_of → right operand that contracts over columns: [width / 2][32][2].
template <bool kLow>
static void right_from_left(const Halved& left, int64_t width, const Halved& out) {
    for (int64_t half = 0; half < 2; ++half) {
        for (int64_t i = 0; i < width; i += 32) {
            transpose_both<kLow>(left.from((half * width + i) * 16), 16,
                                 out.from(i * 32 + half * kLine), 32);
        }
    }
}

// 32 rows → right operand that contracts over rows: [width / 32][16][32][2], panels `panel` apart.
static void right_of(const float* rows, int64_t width, int64_t panel, const Halved& out) {
    for (int64_t i = 0; i < width; i += 16) {
        const int64_t to = i / 32 * panel + i % 32 * 2;
        for (int64_t r = 0; r < 16; ++r) {
            store_lines(out, to + r * 2 * kLine, parts_at(rows + r * width + i),
                        parts_at(rows + (r + 16) * width + i));
        }
    }
}

// right_of, its panels 1,024 apart → left operand that contracts over rows, a step of `steps`:
// [width / 16][steps][16][32].
template <bool kLow>
static void left_from_right(const Halved& right, int64_t width, int64_t steps, const Halved& out) {
    for (int64_t i = 0; i < width; i += 16) {
        transpose_both<kLow>(right.from(i / 32 * 1024 + i % 32 * 2), 32, out.from(i * 32 * steps),
                             16);
    }
}

// ---- memory

// Hands out parts of a thread's memory, each from a line of its own; counts only where there is
// none.
struct Memory {
    float* at;
    int64_t used = 0;

    float* floats(int64_t count) {
        float* taken = at ? at + used : nullptr;
        used += up_to(count, 16);
        return taken;
    }
    Halved halved(int64_t count) {
        const int64_t each = up_to(count, 32) / 2;
        return {reinterpret_cast<uint16_t*>(floats(each)),
                reinterpret_cast<uint16_t*>(floats(each))};
    }
};

// The compiler is not told what tile loads read: all that was stored must be in memory.
TRIMPOT_INLINE static inline void fence() { __asm__ volatile("" ::: "memory"); }

// Floats [width][32] → rows of [T, heads, D], the row r times factor(r).
template <class T, class Factor>
void write_columns(const Attention& a, const float* columns, int64_t count, void* out, int64_t at,
                   Factor factor) {
    alignas(64) float rows[32 * 16];
    for (int64_t d = 0; d < a.width; d += 16) {
        for (int64_t half = 0; half < 2; ++half) {
            transpose(reinterpret_cast<const uint16_t*>(columns + d * 32 + half * 16), 32,
                      reinterpret_cast<uint16_t*>(rows + half * 256), 16);
        }
        const int64_t items = least(16, a.width - d);
        for (int64_t r = 0; r < count; ++r) {
            auto* to = static_cast<typename T::Item*>(out) + (at + r * a.heads) * a.width + d;
            store<T>(to, load<Float>(rows + r * 16, kWidth) * factor(r), items);
        }
    }
}
