// The products of split.h. Included by gemm_avx512.cpp, after gemm_kernels.h in its namespace.

constexpr int kAmxRows = 32;

#include "amx_tiles.h"

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

// ---- operands

// Items [column, column + 32) of a row; those from `count` on are zero.
static inline void split_step(Matrix x, std::int64_t row, std::int64_t column, std::int64_t count,
                              std::uint16_t* high, std::uint16_t* low) {
    const std::int64_t from = row * x.stride + column;
    if (x.bf16) {
        std::uint16_t items[32] = {};
        if (count > 0) {
            const auto* data = static_cast<const std::uint16_t*>(x.data) + from;
            __builtin_memcpy(items, data, least(count, 32) * 2);
        }
        __builtin_memcpy(high, items, 64);
        return;
    }
    alignas(64) float buffer[32] = {};
    const float* items = static_cast<const float*>(x.data) + from;
    if (count < 32) {
        if (count > 0) __builtin_memcpy(buffer, items, count * 4);
        items = buffer;
    }
    for (int half = 0; half < 32; half += 16) {
        const Halves halves = halves_of(load16(items + half));
        __builtin_memcpy(high + half, &halves.high, 32);
        __builtin_memcpy(low + half, &halves.low, 32);
    }
}

static void split_rows(Matrix x, std::int64_t width, const SplitRows& out) {
#pragma omp parallel for schedule(static)
    for (std::int64_t tile = 0; tile < out.padded; tile += 16) {
        for (std::int64_t b = 0; b < out.blocks; ++b) {
            for (int r = 0; r < 16; ++r) {
                const bool there = tile + r < out.rows;
                for (std::int64_t i = 0; i < out.block; i += 32) {
                    const std::int64_t to = (b * out.padded + tile) * out.block + i * 16 + r * 32;
                    const std::int64_t column = b * out.block + i;
                    split_step(x, there ? tile + r : 0, column, there ? width - column : 0,
                               out.high + to, out.low ? out.low + to : nullptr);
                }
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
        alignas(64) std::uint16_t looked_at[2 * kTileColumns];  // where there is no low part
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
                std::uint16_t* low = pack.low ? pack.low + to : looked_at;
                store_pair(even, even + kTileColumns, pack.high + to, low);
                for (int j = 0; j < 2 * kTileColumns; j += 16) beyond += load16(even + j) * 0.0f;
                for (int j = 0; j < 2 * kTileColumns; j += 32) {
                    u32x16 bits;
                    __builtin_memcpy(&bits, low + j, 64);
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

// C, and what is added to the products: a bias or what C holds.
struct Result {
    float* c;
    std::int64_t stride, columns;
    const float* bias;
    bool add;
};

// 32 x 32 sums into C. Whole lines of it go past the caches, which then needn't fetch them first:
// 0.7 of the time with 3,072 columns of C (2,048 rows, K = 576), the same with 576.
static inline void put_sums(const float* sums, const Result& to, std::int64_t r, std::int64_t end,
                            std::int64_t p) {
    const std::int64_t first = p * kTileColumns;
    const Place place{to.c + r * to.stride + first, to.stride,
                      static_cast<int>(least(kAmxRows, end - r)),
                      static_cast<int>(least(kTileColumns, to.columns - first))};
    const float* bias = to.bias ? to.bias + first : nullptr;
    const bool lines = (reinterpret_cast<std::uintptr_t>(to.c) | to.stride * 4) % 64 == 0;
    if (to.add || !lines || place.columns < kTileColumns) {
        put_float(sums, bias, to.add, 1, place);
        return;
    }
    for (int j = 0; j < kTileColumns; j += 16) {
        const v16 base = bias ? load16(bias + j) : v16{};
        for (int i = 0; i < place.rows; ++i) {
            const v16 item = base + load16(sums + i * kTileColumns + j);
            _mm512_stream_ps(place.c + i * to.stride + j, (__m512)item);
        }
    }
}

// One task's part of C while it is summed: [panel of the task][row][32]. Rows of C itself are
// kilobytes apart and share few sets of the L1 cache; they are written once, at the end.
struct SplitSums {
    const Task& task;
    std::int64_t rows;
    Floats items;

    SplitSums(const Split& split, const Task& of)
        : task(of), rows(split.share), items(split.group * split.share * kTileColumns) {}
    ~SplitSums() { _mm_sfence(); }  // after stores past the caches

    // Block b of `a` with 32 columns of the right operand, for panel p. The last block is followed
    // by the update, and goes to `result`.
    template <bool A_LOW, bool B_LOW>
    void block(std::int64_t p, const SplitRows& a, std::int64_t b, std::int64_t steps,
               Split16 right, const SplitUpdate& low, const Result& result) const {
        const bool last = b + 1 == a.blocks;
        alignas(64) float whole[kAmxRows * kTileColumns];
        for (std::int64_t r = task.row; r < task.end; r += kAmxRows) {
            float* sums = items.data + ((p - task.panel) * rows + r - task.row) * kTileColumns;
            if (b > 0)
                load_sums(sums);
            else
                zero_sums();
            sum_steps<A_LOW, B_LOW>(
                steps, a.block, Split16{a.high, a.low}.from((b * a.padded + r) * a.block), right);
            if (!last) {
                store_sums(sums);
                continue;
            }
            if (low.rank) {
                sum_steps<true, true>(
                    low.padded_rank / 32, low.padded_rank,
                    Split16{low.left.high, low.left.low}.from(r * low.padded_rank),
                    Split16{low.high, low.low}.from(p * low.padded_rank * kTileColumns));
            }
            store_sums(whole);
            put_sums(whole, result, r, task.end, p);
        }
    }

    void multiply(std::int64_t p, const SplitRows& a, std::int64_t b, std::int64_t steps,
                  Split16 right, const SplitUpdate& low, const Result& result) const {
        // The compiler is not told what tile loads read: all that was stored must be in memory.
        __asm__ volatile("" ::: "memory");
        if (a.low && right.low)
            block<true, true>(p, a, b, steps, right, low, result);
        else if (a.low)
            block<true, false>(p, a, b, steps, right, low, result);
        else if (right.low)
            block<false, true>(p, a, b, steps, right, low, result);
        else
            block<false, false>(p, a, b, steps, right, low, result);
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
                sums.multiply(p, x, b, pack.block / 32, Split16{pack.high, pack.low}.from(from),
                              low, {y, stride, pack.rows, bias, false});
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
                sums.multiply(p, dy, g, items / 32, {of_high, pack.low ? of_low : nullptr}, low,
                              {dx, stride, pack.depth, nullptr, add});
            }
        }
    }
}
