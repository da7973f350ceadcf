// Blocks of 32 x 32 sums on AMX tiles (Intel SDM vol. 1, ch. 18): four tiles of sums, and two of
// each operand. Included by whoever multiplies with them, inside a namespace.
//
// An operand is a sum of two bfloat16, high + low (split.h). The three products of a step of 32
// items make 12 tile products of 10 tile loads: the multiplier is never short.

// Tiles 0 to 3 hold sums, 4 and 5 rows of A, 6 and 7 columns of B: 16 rows of 64 bytes each.
struct TileLayout {
    std::uint8_t palette, start_row, reserved[14];
    std::uint16_t row_bytes[16];
    std::uint8_t rows[16];
};

// In memory of its own: GCC believes that the intrinsic reads 8 bytes, and drops stores to others.
alignas(64) static const TileLayout tile_layout{
    1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

struct Tiles {
    Tiles() { _tile_loadconfig(&tile_layout); }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

#define TRIMPOT_LOAD_A(from)              \
    _tile_loadd(4, (from) + 512 * s, 64); \
    _tile_loadd(5, (from) + 512 * s + 16 * a_row, 64)
#define TRIMPOT_LOAD_B(from)                \
    _tile_loadd(6, (from) + 1024 * s, 128); \
    _tile_loadd(7, (from) + 1024 * s + 32, 128)
#define TRIMPOT_MULTIPLY     \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7)

// Rows of `stride` floats.
static inline void load_sums(const float* sums, std::int64_t stride = 32) {
    const float* lower = sums + 16 * stride;
    _tile_loadd(0, sums, stride * 4);
    _tile_loadd(1, sums + 16, stride * 4);
    _tile_loadd(2, lower, stride * 4);
    _tile_loadd(3, lower + 16, stride * 4);
}

static inline void zero_sums() {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

static inline void store_sums(float* sums, std::int64_t stride = 32) {
    float* lower = sums + 16 * stride;
    _tile_stored(0, sums, stride * 4);
    _tile_stored(1, sums + 16, stride * 4);
    _tile_stored(2, lower, stride * 4);
    _tile_stored(3, lower + 16, stride * 4);
}

// An operand of one block: rows of A in tiles of 16 x 32, or 32 columns of B. low may be null.
struct Split16 {
    const std::uint16_t *high, *low;

    Split16 from(std::int64_t offset) const {
        return {high + offset, low ? low + offset : nullptr};
    }
};

// The sums += `steps` · 32 items of 32 rows of A with 32 columns of B.
template <bool A_LOW, bool B_LOW>
static inline void sum_steps(std::int64_t steps, std::int64_t a_row, Split16 a, Split16 b) {
    for (std::int64_t s = 0; s < steps; ++s) {
        TRIMPOT_LOAD_A(a.high);
        TRIMPOT_LOAD_B(b.high);
        TRIMPOT_MULTIPLY;
        if (A_LOW) {
            TRIMPOT_LOAD_A(a.low);
            TRIMPOT_MULTIPLY;
            if (B_LOW) {
                TRIMPOT_LOAD_A(a.high);
            }
        }
        if (B_LOW) {
            TRIMPOT_LOAD_B(b.low);
            TRIMPOT_MULTIPLY;
        }
    }
}

#undef TRIMPOT_LOAD_A
#undef TRIMPOT_LOAD_B
#undef TRIMPOT_MULTIPLY
