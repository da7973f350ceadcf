// The products of split.h. Included by gemm_avx512.cpp, after gemm_kernels.h in its namespace.
//
// A block of C is 32 x 32 items: four tiles of sums, and two of each operand. The three products
// of a step of 32 items make 12 tile products of 10 tile loads: the multiplier is never short.

constexpr int kAmxRows = 32;

typedef std::uint16_t u16x16 __attribute__((vector_size(32)));
typedef std::uint32_t u32x16 __attribute__((vector_size(64)));

struct Halves {
    u16x16 high, low;
};

// To nearest even; items that are not finite give a low part that is NaN.
static inline Halves halves_of(v16 x) {
    const __m512 value = (__m512)x;
    const __m256bh high = _mm512_cvtneps_pbh(value);
    const __m512 back = (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)high), 16);
    const __m256bh low = _mm512_cvtneps_pbh(_mm512_sub_ps(value, back));
    return {(u16x16)high, (u16x16)low};
}

static inline std::uint16_t* at_or_null(std::uint16_t* base, std::int64_t offset) {
    return base ? base + offset : nullptr;
}

// ---- operands

static void split_rows(Matrix x, std::int64_t width, const SplitRows& out) {
#pragma omp parallel for schedule(static)
    for (std::int64_t r = 0; r < out.padded; ++r) {
        for (std::int64_t b = 0; b < out.blocks; ++b) {
            const std::int64_t to = (b * out.padded + r) * out.block, from = b * out.block;
            const std::int64_t count = r < out.rows ? least(out.block, width - from) : 0;
            std::int64_t i = 0;
            if (x.bf16 && count > 0) {
                const auto* items = static_cast<const std::uint16_t*>(x.data) + r * x.stride + from;
                __builtin_memcpy(out.high + to, items, count * 2);
                i = count;
            } else {
                const float* items = static_cast<const float*>(x.data) + r * x.stride + from;
                for (; i < count; i += 16) {
                    alignas(64) float buffer[16] = {};
                    const bool whole = i + 16 <= count;
                    if (!whole) __builtin_memcpy(buffer, items + i, (count - i) * 4);
                    const Halves halves = halves_of(load16(whole ? items + i : buffer));
                    __builtin_memcpy(out.high + to + i, &halves.high, 32);
                    __builtin_memcpy(out.low + to + i, &halves.low, 32);
                }
            }
            for (; i < out.block; ++i) {
                out.high[to + i] = 0;
                if (out.low) out.low[to + i] = 0;
            }
        }
    }
}

// Two rows of 32 floats as one lane of a panel: [32][2] halves.
static inline void store_pair(const float* even, const float* odd, std::uint16_t* high,
                              std::uint16_t* low) {
    for (int half = 0; half < kTileColumns; half += 16) {
        const Halves a = halves_of(load16(even + half)), b = halves_of(load16(odd + half));
        const u32x16 high_pair =
            __builtin_convertvector(a.high, u32x16) | __builtin_convertvector(b.high, u32x16) << 16;
        const u32x16 low_pair =
            __builtin_convertvector(a.low, u32x16) | __builtin_convertvector(b.low, u32x16) << 16;
        __builtin_memcpy(high + 2 * half, &high_pair, 64);
        __builtin_memcpy(low + 2 * half, &low_pair, 64);
    }
}

static Packed split_pack(const SplitPack& pack, Matrix w) {
    bool finite = true, exact = true;
#pragma omp parallel for schedule(static) reduction(&& : finite, exact)
    for (std::int64_t p = 0; p < pack.panels; ++p) {
        alignas(64) float lanes[16 * kTileColumns];
        const std::int64_t first = p * kTileColumns;
        const std::int64_t columns = least(kTileColumns, pack.rows - first);
        const std::int64_t padded = pack.blocks * pack.block;
        v16 beyond = {};
        u32x16 left = {};
        for (std::int64_t k = 0; k < padded; k += 16) {
            const std::int64_t count = least(16, pack.depth - k);
            __builtin_memset(lanes, 0, sizeof lanes);
            if (count > 0) transpose_float(w, first, columns, k, count, lanes);
            for (int l = 0; l < 16; l += 2) {
                const std::int64_t to = (p * padded + k + l) * kTileColumns;
                const float* even = lanes + l * kTileColumns;
                store_pair(even, even + kTileColumns, pack.high + to, pack.low + to);
                for (int j = 0; j < 2 * kTileColumns; j += 16) beyond += load16(even + j) * 0.0f;
                for (int j = 0; j < 2 * kTileColumns; j += 32) {
                    u32x16 bits;
                    __builtin_memcpy(&bits, pack.low + to + j, 64);
                    left |= bits & 0x7fff7fff;  // −0 is zero too
                }
            }
        }
        bool some = false;
        for (int i = 0; i < 16; ++i) some = some || left[i];
        finite = finite && sum16(beyond) == 0;  // Inf · 0 and NaN · 0 are NaN
        exact = exact && !some;
    }
    return !finite ? Packed::kNotFinite : exact ? Packed::kExact : Packed::kSplit;
}

// A low-rank update as one more block of the contraction, its rank padded to whole steps.
struct SplitUpdate {
    std::int64_t rank, padded_rank;
    std::uint16_t* memory;
    SplitRows left;
    std::uint16_t *high, *low;  // right: [panels][padded_rank / 2][32][2]

    // right: [panels][rank][32]
    SplitUpdate(const Update& update, const float* right, std::int64_t rows, std::int64_t panels)
        : rank(update.rank), padded_rank(ceil_div(rank, 32) * 32) {
        const std::int64_t padded = ceil_div(rows, kAmxRows) * kAmxRows;
        const std::int64_t of_left = padded * padded_rank;
        const std::int64_t of_right = panels * padded_rank * kTileColumns;
        memory = static_cast<std::uint16_t*>(
            std::aligned_alloc(64, ceil_div(4 * (of_left + of_right) + 1, 64) * 64));
        high = memory + 2 * of_left;
        low = high + of_right;
        left = {rows, padded, padded_rank, rank ? 1 : 0, memory, memory + of_left};
        if (!rank) return;
        split_rows({update.left, update.stride, false}, rank, left);
        alignas(64) const float zeros[kTileColumns] = {};
#pragma omp parallel for schedule(static)
        for (std::int64_t p = 0; p < panels; ++p) {
            for (std::int64_t k = 0; k < padded_rank; k += 2) {
                const float* even = right + (p * rank + k) * kTileColumns;
                const std::int64_t to = (p * padded_rank + k) * kTileColumns;
                store_pair(k < rank ? even : zeros, k + 1 < rank ? even + kTileColumns : zeros,
                           high + to, low + to);
            }
        }
    }
    ~SplitUpdate() { std::free(memory); }
    SplitUpdate(const SplitUpdate&) = delete;
    SplitUpdate& operator=(const SplitUpdate&) = delete;
};

// ---- tiles

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

#define TRIMPOT_LOAD_A(from)                  \
    _tile_loadd(4, (from) + 32 * s, a_bytes); \
    _tile_loadd(5, (from) + 32 * s + 16 * a_row, a_bytes)
#define TRIMPOT_LOAD_B(from)                             \
    _tile_loadd(6, (from) + 32 * kTileColumns * s, 128); \
    _tile_loadd(7, (from) + 32 * kTileColumns * s + 32, 128)
#define TRIMPOT_MULTIPLY     \
    _tile_dpbf16ps(0, 4, 6); \
    _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(2, 5, 6); \
    _tile_dpbf16ps(3, 5, 7)

// sums [32][32] (+)= `steps` · 32 items of 32 rows of A with 32 columns of B.
template <bool A_LOW, bool B_LOW>
static inline void micro_split(std::int64_t steps, const std::uint16_t* a_high,
                               const std::uint16_t* a_low, std::int64_t a_row,
                               const std::uint16_t* b_high, const std::uint16_t* b_low, float* sums,
                               bool add) {
    const std::int64_t a_bytes = 2 * a_row;
    constexpr std::int64_t kLower = 16 * kTileColumns;
    if (add) {
        _tile_loadd(0, sums, 128);
        _tile_loadd(1, sums + 16, 128);
        _tile_loadd(2, sums + kLower, 128);
        _tile_loadd(3, sums + kLower + 16, 128);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (std::int64_t s = 0; s < steps; ++s) {
        TRIMPOT_LOAD_A(a_high);
        TRIMPOT_LOAD_B(b_high);
        TRIMPOT_MULTIPLY;
        if (A_LOW) {
            TRIMPOT_LOAD_A(a_low);
            TRIMPOT_MULTIPLY;
            if (B_LOW) {
                TRIMPOT_LOAD_A(a_high);
            }
        }
        if (B_LOW) {
            TRIMPOT_LOAD_B(b_low);
            TRIMPOT_MULTIPLY;
        }
    }
    _tile_stored(0, sums, 128);
    _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + kLower, 128);
    _tile_stored(3, sums + kLower + 16, 128);
}

#undef TRIMPOT_LOAD_A
#undef TRIMPOT_LOAD_B
#undef TRIMPOT_MULTIPLY

// One task's part of C while it is summed: [panel of the task][row][32]. Rows of C itself are
// kilobytes apart and share few sets of the L1 cache; they are written once, at the end.
struct SplitSums {
    const Task& task;
    std::int64_t rows;
    Floats items;

    SplitSums(const Split& split, const Task& of)
        : task(of), rows(split.share), items(split.group * split.share * kTileColumns) {}

    float* at(std::int64_t p, std::int64_t row) const {
        return items.data + ((p - task.panel) * rows + row - task.row) * kTileColumns;
    }

    // Panel p (+)= block b of `a`, with 32 columns of the right operand.
    void multiply(std::int64_t p, const SplitRows& a, std::int64_t b, std::int64_t steps,
                  const std::uint16_t* b_high, const std::uint16_t* b_low, bool add) const {
        const auto micro = a.low ? (b_low ? micro_split<true, true> : micro_split<true, false>)
                                 : (b_low ? micro_split<false, true> : micro_split<false, false>);
        // The compiler is not told what tile loads read: all that was stored must be in memory.
        __asm__ volatile("" ::: "memory");
        for (std::int64_t r = task.row; r < task.end; r += kAmxRows) {
            const std::int64_t from = (b * a.padded + r) * a.block;
            micro(steps, a.high + from, at_or_null(a.low, from), a.block, b_high, b_low, at(p, r),
                  add);
        }
    }

    void update(std::int64_t p, const SplitUpdate& low) const {
        if (!low.rank) return;
        const std::int64_t from = p * low.padded_rank * kTileColumns;
        multiply(p, low.left, 0, low.padded_rank / 32, low.high + from, low.low + from, true);
    }

    // C (+)= panel p, + bias.
    void put(std::int64_t p, float* c, std::int64_t stride, std::int64_t columns, const float* bias,
             bool add) const {
        for (std::int64_t r = task.row; r < task.end; r += kAmxRows) {
            const Place place{c + r * stride + p * kTileColumns, stride,
                              static_cast<int>(least(kAmxRows, task.end - r)),
                              static_cast<int>(least(kTileColumns, columns - p * kTileColumns))};
            put_float(at(p, r), bias ? bias + p * kTileColumns : nullptr, add, 1, place);
        }
    }
};

static void split_forward(const SplitRows& x, const SplitPack& pack, float* y, std::int64_t stride,
                          const float* bias, Update update) {
    if (!x.rows || !pack.rows) return;
    const Split split(x.rows, pack.rows, kAmxRows);
    const SplitUpdate low(update, update.right, x.rows, pack.panels);
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t t = 0; t < split.tasks(); ++t) {
        const Tiles tiles;
        const Task task(split, t, x.rows);
        const SplitSums sums(split, task);
        for (std::int64_t b = 0; b < pack.blocks; ++b) {
            for (std::int64_t p = task.panel; p < task.last; ++p) {
                const std::int64_t from = (p * pack.blocks + b) * pack.block * kTileColumns;
                sums.multiply(p, x, b, pack.block / 32, pack.high + from,
                              at_or_null(pack.low, from), b > 0);
                if (b + 1 < pack.blocks) continue;
                sums.update(p, low);
                sums.put(p, y, stride, pack.rows, bias, false);
            }
        }
    }
}

static void split_gradient(const SplitRows& dy, const SplitPack& pack, float* dx,
                           std::int64_t stride, bool add, Update update) {
    if (!dy.rows) return;
    const Split split(dy.rows, pack.depth, kAmxRows);
    const std::int64_t all = pack.panels * kTileColumns;
    const Floats right = panels_of(update.right, update.rank, pack.depth);
    const SplitUpdate low(update, right.data, dy.rows, split.panels);
    const auto as_integers = [&](std::uint16_t* halves) {
        return Pack{pack.rows,  pack.depth,  pack.panels,
                    pack.block, pack.blocks, reinterpret_cast<std::int16_t*>(halves),
                    nullptr,    nullptr,     nullptr,
                    nullptr};
    };
    const Pack high = as_integers(pack.high), rest = as_integers(pack.low);
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t t = 0; t < split.tasks(); ++t) {
        const Tiles tiles;
        const Task task(split, t, dy.rows);
        const SplitSums sums(split, task);
        alignas(64) std::uint16_t of_high[kGradientBlock * kTileColumns];
        alignas(64) std::uint16_t of_low[kGradientBlock * kTileColumns];
        for (std::int64_t g = 0; g < dy.blocks; ++g) {
            const std::int64_t items = least(kGradientBlock, all - g * kGradientBlock);
            for (std::int64_t p = task.panel; p < task.last; ++p) {
                transpose_panel(high, p * 16, g, reinterpret_cast<std::int16_t*>(of_high));
                if (pack.low) {
                    transpose_panel(rest, p * 16, g, reinterpret_cast<std::int16_t*>(of_low));
                }
                sums.multiply(p, dy, g, items / 32, of_high, pack.low ? of_low : nullptr, g > 0);
                if (g + 1 < dy.blocks) continue;
                sums.update(p, low);
                sums.put(p, dx, stride, pack.depth, nullptr, add);
            }
        }
    }
}
