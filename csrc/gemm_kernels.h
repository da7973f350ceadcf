// Everything around the tile, for one instruction set. Included by gemm_<isa>.cpp, inside a
// namespace of its own, after <cmath>, <cstdint>, <cstdlib>, <omp.h> and gemm.h.
//
// Results do not depend on the number of threads: each tile of C is summed by one thread, over the
// blocks of the contraction in their order.

#include "gemm_micro.h"

typedef float v16 __attribute__((vector_size(64)));
typedef std::int32_t i16x __attribute__((vector_size(64)));
typedef std::int16_t s16 __attribute__((vector_size(32)));

constexpr float kLargest = 32766.0f;
constexpr double kInt32 = 2147483647.0;
// Lanes of a block: 24 KiB of 32 columns and 10 KiB of 14 rows.
constexpr std::int64_t kFloatBlock = 192;
// Columns that a task takes at most, in panels of 32. AVX2 comes with smaller L2 caches, which a
// task's left rows fill: its part of C is not kept there between blocks, but fetched ahead.
#if defined(TRIMPOT_GEMM_AVX2)
constexpr std::int64_t kPanelsOfTask = 24;
#else
constexpr std::int64_t kPanelsOfTask = 8;
#endif

static inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }
static inline std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

static inline float widen(std::uint16_t half) {
    const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
    float value;
    __builtin_memcpy(&value, &bits, sizeof value);
    return value;
}

static inline float item(const Matrix& m, std::int64_t row, std::int64_t column) {
    const std::int64_t at = row * m.stride + column;
    return m.bf16 ? widen(static_cast<const std::uint16_t*>(m.data)[at])
                  : static_cast<const float*>(m.data)[at];
}

static inline v16 load16(const float* at) {
    v16 value;
    __builtin_memcpy(&value, at, sizeof value);
    return value;
}

static inline void store16(float* at, v16 value) { __builtin_memcpy(at, &value, sizeof value); }

static inline float sum16(v16 v) {
    float total = 0;
    for (int i = 0; i < 16; ++i) total += v[i];
    return total;
}

// Rounds to nearest even: adding 1.5 · 2²³ leaves the integer in the low bits of the float.
static inline i16x round16(v16 v) {
    const v16 shifted = v + 12582912.0f;
    i16x bits;
    __builtin_memcpy(&bits, &shifted, sizeof bits);
    return bits;
}

static inline void store_int16(std::int16_t* at, v16 v) {
    const s16 low = __builtin_convertvector(round16(v), s16);
    __builtin_memcpy(at, &low, sizeof low);
}

// Registers: shuffles of wider vectors, and choices between them, GCC 12 makes item by item.
// TRIMPOT_LANES(of, j) is a list of of(j), of(j + 1), … for each lane of one.
#define TRIMPOT_4(of, j) of(j), of((j) + 1), of((j) + 2), of((j) + 3)
#define TRIMPOT_8(of, j) TRIMPOT_4(of, j), TRIMPOT_4(of, (j) + 4)
#if defined(TRIMPOT_GEMM_AVX512)
constexpr int kLanes = 16;
#define TRIMPOT_LANES(of, j) TRIMPOT_8(of, j), TRIMPOT_8(of, (j) + 8)
#elif defined(TRIMPOT_GEMM_AVX2)
constexpr int kLanes = 8;
#define TRIMPOT_LANES(of, j) TRIMPOT_8(of, j)
#else
constexpr int kLanes = 4;
#define TRIMPOT_LANES(of, j) TRIMPOT_4(of, j)
#endif
typedef std::int32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef float Singles __attribute__((vector_size(4 * kLanes)));
constexpr int kParts = 16 / kLanes;  // of 16 items

template <int S>
static inline void exchange(Lanes& a, Lanes& b) {
#define TRIMPOT_LOW(j) ((j) & S ? kLanes + (j) - S : (j))
#define TRIMPOT_HIGH(j) ((j) & S ? kLanes + (j) : (j) + S)
    const Lanes low = __builtin_shufflevector(a, b, TRIMPOT_LANES(TRIMPOT_LOW, 0));
    b = __builtin_shufflevector(a, b, TRIMPOT_LANES(TRIMPOT_HIGH, 0));
    a = low;
#undef TRIMPOT_LOW
#undef TRIMPOT_HIGH
}

// Each row of 16 items has kParts registers.
template <int S>
static inline void exchange_all(Lanes (*v)[kParts]) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        if (i & S) continue;
#pragma GCC unroll 4
        for (int p = 0; p < kParts; ++p) {
            if constexpr (S < kLanes) {
                exchange<S>(v[i][p], v[i + S][p]);
            } else if (!(p * kLanes & S)) {
                const Lanes right = v[i][p + S / kLanes];
                v[i][p + S / kLanes] = v[i + S][p];
                v[i + S][p] = right;
            }
        }
    }
}

// 16 x 16 items of 32 bits, in place: four rounds of exchanging off-diagonal blocks.
static inline void transpose16(Lanes (*v)[kParts]) {
    exchange_all<8>(v);
    exchange_all<4>(v);
    exchange_all<2>(v);
    exchange_all<1>(v);
}

// a0 b0 a1 b1 … of two rows of 32 int16.
static inline void interleave(const Lanes* a, const Lanes* b, std::int16_t* out) {
    typedef std::int16_t Pairs __attribute__((vector_size(4 * kLanes)));
    for (int p = 0; p < kParts; ++p, out += 4 * kLanes) {
        const Pairs x = (Pairs)a[p], y = (Pairs)b[p];
#define TRIMPOT_PAIR(j) (j) / 2 + (j) % 2 * 2 * kLanes
        const Pairs first = __builtin_shufflevector(x, y, TRIMPOT_LANES(TRIMPOT_PAIR, 0),
                                                    TRIMPOT_LANES(TRIMPOT_PAIR, kLanes));
        const Pairs second = __builtin_shufflevector(x, y, TRIMPOT_LANES(TRIMPOT_PAIR, 2 * kLanes),
                                                     TRIMPOT_LANES(TRIMPOT_PAIR, 3 * kLanes));
#undef TRIMPOT_PAIR
        __builtin_memcpy(out, &first, sizeof first);
        __builtin_memcpy(out + 2 * kLanes, &second, sizeof second);
    }
}

#undef TRIMPOT_LANES
#undef TRIMPOT_8
#undef TRIMPOT_4

// Reads a row into floats, times factor, zero up to `padded` (a multiple of 16).
static inline void read_row(const Matrix& m, std::int64_t row, std::int64_t from,
                            std::int64_t count, const float* factor, float* out,
                            std::int64_t padded) {
    const std::int64_t at = row * m.stride + from;
    if (m.bf16) {
        const std::uint16_t* x = static_cast<const std::uint16_t*>(m.data) + at;
        for (std::int64_t i = 0; i < count; ++i) out[i] = widen(x[i]);
    } else {
        __builtin_memcpy(out, static_cast<const float*>(m.data) + at, count * sizeof(float));
    }
    if (factor) {
        for (std::int64_t i = 0; i < count; ++i) out[i] *= factor[from + i];
    }
    for (std::int64_t i = count; i < padded; ++i) out[i] = 0;
}

// (largest magnitude, L2 norm) of a buffer whose length is a multiple of 16. The norm is not
// finite where an item is not; a buffer under 1e-36 counts as zero.
static inline float norm_of(const float* x, std::int64_t count, float* largest) {
    Singles top[kParts] = {}, sum[kParts] = {};
    for (std::int64_t i = 0; i < count; i += 16) {
        Singles v[kParts];
        __builtin_memcpy(v, x + i, sizeof v);
        for (int p = 0; p < kParts; ++p) {
            const Singles magnitude = (Singles)((Lanes)v[p] & 0x7fffffff);
            top[p] = magnitude > top[p] ? magnitude : top[p];
        }
    }
    float lanes[16], most = 0;
    __builtin_memcpy(lanes, top, sizeof lanes);
    for (float lane : lanes) most = lane > most ? lane : most;
    *largest = most;
    if (most < 1e-36f) most = 1;  // NaN alone leaves 0 here, and shows in the sum
    const float inverse = 1 / most;
    for (std::int64_t i = 0; i < count; i += 16) {
        Singles v[kParts];
        __builtin_memcpy(v, x + i, sizeof v);
        for (int p = 0; p < kParts; ++p) sum[p] += v[p] * inverse * (v[p] * inverse);
    }
    v16 squares;
    __builtin_memcpy(&squares, sum, sizeof squares);
    return std::sqrt(sum16(squares)) * most;
}

static void quantise(Matrix x, std::int64_t width, const float* factor, const float* limits,
                     const Rows& out) {
#pragma omp parallel for schedule(static)
    for (std::int64_t row = 0; row < out.padded; ++row) {
        alignas(64) float buffer[512];
        for (std::int64_t b = 0; b < out.blocks; ++b) {
            std::int16_t* q = out.q + (b * out.padded + row) * out.block;
            float* scale = out.scale + b * out.padded + row;
            if (row >= out.rows) {
                __builtin_memset(q, 0, out.block * sizeof *q);
                *scale = 0;
                continue;
            }
            const std::int64_t from = b * out.block;
            read_row(x, row, from, least(out.block, width - from), factor, buffer, out.block);
            float largest;
            const float norm = norm_of(buffer, out.block, &largest);
            if (!(norm < __builtin_inff())) {
                __builtin_memset(q, 0, out.block * sizeof *q);
                *scale = __builtin_nanf("");  // the whole row of the result is not a number
                continue;
            }
            float up = 0;
            if (norm > 1e-36f) {
                up = limits[b] / norm;
                if (up * largest > kLargest) up = kLargest / largest;
            }
            *scale = up > 0 ? 1 / up : 0;
            for (std::int64_t i = 0; i < out.block; i += 16) {
                store_int16(q + i, load16(buffer + i) * up);
            }
        }
    }
}

// ---- the pack

// Memory of a call, 64-byte aligned.
struct Floats {
    float* data;

    explicit Floats(std::int64_t count)
        : data(static_cast<float*>(std::aligned_alloc(64, ceil_div(count * 4 + 1, 64) * 64))) {}
    Floats(Floats&& other) noexcept : data(other.data) { other.data = nullptr; }
    ~Floats() { std::free(data); }
    Floats(const Floats&) = delete;
    Floats& operator=(const Floats&) = delete;
};

static void column_scales(const Pack* packs, const Matrix* weights, int count) {
    const std::int64_t depth = packs[0].depth;
    std::int64_t total = 0;
    for (int w = 0; w < count; ++w) total += packs[w].rows;
#pragma omp parallel for schedule(static)
    for (std::int64_t strip = 0; strip < ceil_div(depth, 256); ++strip) {
        float sums[256] = {}, most[256] = {}, buffer[256];
        const std::int64_t from = strip * 256, width = least(256, depth - from);
        for (int w = 0; w < count; ++w) {
            for (std::int64_t n = 0; n < packs[w].rows; ++n) {
                read_row(weights[w], n, from, width, nullptr, buffer, 256);
                for (int i = 0; i < 256; ++i) {
                    const float size = buffer[i] < 0 ? -buffer[i] : buffer[i];
                    sums[i] += size * size;
                    most[i] = size > most[i] ? size : most[i];
                }
            }
        }
        for (std::int64_t i = 0; i < width; ++i) {
            const float c = std::sqrt(sums[i] / static_cast<float>(total));
            // A column of zeros counts for nothing: at 1 it would drown the others in x·c.
            const float otherwise = c == 0 && most[i] == 0 ? 0 : 1;
            packs[0].column_scale[from + i] = c > 1e-18f && c < 1e18f ? c : otherwise;
        }
    }
}

// One row of W into column `lane` of its panel. False where it is not finite.
static bool pack_row(const Pack& pack, const Matrix& w, std::int64_t n, std::int64_t panel,
                     int lane, const float* inverse, float* buffer) {
    const std::int64_t padded = pack.blocks * pack.block;
    read_row(w, n, 0, pack.depth, inverse, buffer, padded);
    float scale = 0;
    for (std::int64_t b = 0; b < pack.blocks; ++b) {
        float largest;
        const float norm = norm_of(buffer + b * pack.block, pack.block, &largest);
        if (!(norm < 1e30f)) return false;
        if (norm / 46300.0f > scale) scale = norm / 46300.0f;
        if (largest / kLargest > scale) scale = largest / kLargest;
    }
    pack.row_scale[panel * kTileColumns + lane] = scale;
    const float up = scale > 1e-36f ? 1 / scale : 0;
    std::int16_t* q = pack.q + panel * padded * kTileColumns + 2 * lane;
    for (std::int64_t k = 0; k < padded; k += 16) {
        std::int16_t rounded[16];
        store_int16(rounded, load16(buffer + k) * up);
        for (int i = 0; i < 16; i += 2) {
            __builtin_memcpy(q + (k + i) * kTileColumns, rounded + i, 4);
        }
    }
    return true;
}

// The norm that a block of the other operand may have. 1.001: squares are summed in float.
// Rounding to integers adds up to √block / 2 to a norm.
static inline float room_beside(float squares, std::int64_t block) {
    const double norm = std::sqrt(static_cast<double>(squares)) * 1.001 + 1;
    return static_cast<float>(kInt32 / norm - std::sqrt(static_cast<double>(block)) / 2 - 1);
}

// Largest sum of squares of a column, in block b of the contraction along K.
static float block_squares(const Pack& pack, std::int64_t b) {
    float most = 0;
    for (std::int64_t p = 0; p < pack.panels; ++p) {
        const std::int16_t* q = pack.q + (p * pack.blocks + b) * pack.block * kTileColumns;
        float sums[kTileColumns] = {};
        for (std::int64_t l = 0; l < pack.block / 2; ++l, q += 2 * kTileColumns) {
            for (int c = 0; c < kTileColumns; ++c) {
                const float x = q[2 * c], y = q[2 * c + 1];
                sums[c] += x * x + y * y;
            }
        }
        for (float s : sums) most = s > most ? s : most;
    }
    return most;
}

// The same along N, of the rows of group g.
static float group_squares(const Pack& pack, std::int64_t g) {
    constexpr std::int64_t kPanels = kGradientBlock / kTileColumns;
    const std::int64_t lanes = pack.blocks * pack.block / 2;
    const std::int64_t end = least(pack.panels, (g + 1) * kPanels);
    float most = 0;
    for (std::int64_t l = 0; l < lanes; ++l) {
        float even[16] = {}, odd[16] = {};
        for (std::int64_t p = g * kPanels; p < end; ++p) {
            const std::int16_t* q = pack.q + (p * lanes + l) * 2 * kTileColumns;
            for (int c = 0; c < kTileColumns; ++c) {
                const float x = q[2 * c], y = q[2 * c + 1];
                even[c % 16] += x * x;
                odd[c % 16] += y * y;
            }
        }
        float first = 0, second = 0;
        for (int c = 0; c < 16; ++c) {
            first += even[c];
            second += odd[c];
        }
        most = first > most ? first : most;
        most = second > most ? second : most;
    }
    return most;
}

static void finish_limits(const Pack* packs, int count) {
#pragma omp parallel for schedule(static)
    for (std::int64_t b = 0; b < packs[0].blocks; ++b) {
        float most = 0;
        for (int w = 0; w < count; ++w) {
            const float squares = block_squares(packs[w], b);
            most = squares > most ? squares : most;
        }
        packs[0].limit[b] = room_beside(most, packs[0].block);
    }
    for (int w = 0; w < count; ++w) {
        const Pack& pack = packs[w];
        const std::int64_t groups = ceil_div(pack.panels * kTileColumns, kGradientBlock);
#pragma omp parallel for schedule(static)
        for (std::int64_t g = 0; g < groups; ++g) {
            pack.gradient_limit[g] = room_beside(group_squares(pack, g), kGradientBlock);
        }
    }
}

static bool pack_panel(const Pack& pack, const Matrix& w, std::int64_t p, const float* inverse) {
    const std::int64_t padded = pack.blocks * pack.block;
    const Floats buffer(padded);
    for (int lane = 0; lane < kTileColumns; ++lane) {
        const std::int64_t n = p * kTileColumns + lane;
        if (n < pack.rows) {
            if (!pack_row(pack, w, n, p, lane, inverse, buffer.data)) return false;
            continue;
        }
        pack.row_scale[n] = 0;
        std::int16_t* q = pack.q + p * padded * kTileColumns + 2 * lane;
        for (std::int64_t k = 0; k < padded; k += 2) __builtin_memset(q + k * kTileColumns, 0, 4);
    }
    return true;
}

static bool pack_weights(const Pack* packs, const Matrix* weights, int count) {
    column_scales(packs, weights, count);
    const Floats inverse(packs[0].depth);
    for (std::int64_t k = 0; k < packs[0].depth; ++k) {
        const float c = packs[0].column_scale[k];
        inverse.data[k] = c != 0 ? 1 / c : 1;
    }
    bool finite = true;
    for (int w = 0; w < count; ++w) {
#pragma omp parallel for schedule(static) reduction(&& : finite)
        for (std::int64_t p = 0; p < packs[w].panels; ++p) {
            finite = pack_panel(packs[w], weights[w], p, inverse.data) && finite;
        }
    }
    if (finite) finish_limits(packs, count);
    return finite;
}

// ---- what a tile becomes

struct Place {
    float* c;  // of the tile's first item
    std::int64_t stride;
    int rows, columns;
};

// c (+)= tile · left (per row) · right (per column) [+ bias on the first block]
static inline void put_int(const std::int32_t* tile, const float* left, const float* right,
                           const float* bias, bool add, const Place& at) {
    if (at.columns < kTileColumns) {
        for (int r = 0; r < at.rows; ++r) {
            for (int j = 0; j < at.columns; ++j) {
                float value = float(tile[r * kTileColumns + j]) * left[r] * right[j];
                float* c = at.c + r * at.stride + j;
                *c = add ? *c + value : bias ? bias[j] + value : value;
            }
        }
        return;
    }
    const v16 right0 = load16(right), right1 = load16(right + 16);
    const v16 none = {};
    const v16 bias0 = bias ? load16(bias) : none, bias1 = bias ? load16(bias + 16) : none;
    for (int r = 0; r < at.rows; ++r) {
        i16x t0, t1;
        __builtin_memcpy(&t0, tile + r * kTileColumns, 64);
        __builtin_memcpy(&t1, tile + r * kTileColumns + 16, 64);
        float* c = at.c + r * at.stride;
        const v16 base0 = add ? load16(c) : bias0, base1 = add ? load16(c + 16) : bias1;
        store16(c, base0 + __builtin_convertvector(t0, v16) * right0 * left[r]);
        store16(c + 16, base1 + __builtin_convertvector(t1, v16) * right1 * left[r]);
    }
}

static inline void put_float(const float* tile, const float* bias, bool add, float factor,
                             const Place& at) {
    for (int r = 0; r < at.rows; ++r) {
        float* c = at.c + r * at.stride;
        const float* t = tile + r * kTileColumns;
        if (at.columns < kTileColumns) {
            for (int j = 0; j < at.columns; ++j) {
                const float base = add ? c[j] : bias ? bias[j] : 0;
                c[j] = base + factor * t[j];
            }
            continue;
        }
        for (int j = 0; j < kTileColumns; j += 16) {
            v16 base = {};
            if (add)
                base = load16(c + j);
            else if (bias)
                base = load16(bias + j);
            store16(c + j, base + factor * load16(t + j));
        }
    }
}

static inline bool whole(const Place& at) { return at.rows == kTileRows && at.columns % 16 == 0; }

// c (+)= a · b [+ bias], of rows that lie one behind another.
static inline void fp32_tile(std::int64_t lanes, const float* a, const float* b, const float* bias,
                             bool add, const Place& at) {
    const char *left = reinterpret_cast<const char*>(a), *right = reinterpret_cast<const char*>(b);
#if defined(TRIMPOT_GEMM_AVX2)
    if (whole(at)) {
        direct<Fp32Lane>(lanes, left, 4 * lanes, right, at.c, at.stride, at.columns, bias, add,
                         [](int, int, __m256 sums, __m256 base) { return base + sums; });
        return;
    }
#endif
    alignas(64) float tile[kTileRows * kTileColumns];
    micro_fp32(lanes, left, 4 * lanes, 4, right, 128, tile);
    put_float(tile, bias, add, 1, at);
}

// c (+)= (a · b) · left (per row) · right (per column) [+ bias]. row: items from row to row of a.
static inline void int16_tile(std::int64_t lanes, const std::int16_t* a, std::int64_t row,
                              const std::int16_t* b, const float* left, const float* right,
                              const float* bias, bool add, const Place& at) {
    const char *rows = reinterpret_cast<const char*>(a), *panel = reinterpret_cast<const char*>(b);
#if defined(TRIMPOT_GEMM_AVX2)
    if (whole(at)) {
        direct<Int16Lane>(lanes, rows, 2 * row, panel, at.c, at.stride, at.columns, bias, add,
                          [=](int r, int column, __m256i sums, __m256 base) {
                              const __m256 scaled =
                                  _mm256_cvtepi32_ps(sums) * _mm256_loadu_ps(right + column);
                              return base + scaled * _mm256_set1_ps(left[r]);
                          });
        return;
    }
#endif
    alignas(64) std::int32_t tile[kTileRows * kTileColumns];
    micro_int16(lanes, rows, 2 * row, 4, panel, 128, tile);
    put_int(tile, left, right, bias, add, at);
}

// A float matrix whose last tile of rows is whole: a copy of those rows, padded with zeros.
struct Padded {
    const float* data;
    std::int64_t stride, rows, width;
    float* tail;

    Padded(const float* x, std::int64_t x_stride, std::int64_t m, std::int64_t k)
        : data(x), stride(x_stride), rows(m), width(k), tail(nullptr) {
        const std::int64_t left = m % kTileRows;
        if (!left || !x) return;
        tail = static_cast<float*>(std::calloc(kTileRows * k + 1, sizeof(float)));
        for (std::int64_t r = 0; r < left; ++r) {
            __builtin_memcpy(tail + r * k, x + (m - left + r) * x_stride, k * sizeof(float));
        }
    }
    ~Padded() { std::free(tail); }
    Padded(const Padded&) = delete;
    Padded& operator=(const Padded&) = delete;

    const float* at(std::int64_t row, std::int64_t* row_stride) const {
        if (row + kTileRows > rows) {
            *row_stride = width;
            return tail;
        }
        *row_stride = stride;
        return data + row * stride;
    }
};

static inline void add_update(const Padded& left, std::int64_t row, const float* right,
                              std::int64_t right_stride, std::int64_t rank, const Place& at) {
    alignas(64) float tile[kTileRows * kTileColumns];
    std::int64_t stride;
    const float* a = left.at(row, &stride);
    micro_fp32(rank, reinterpret_cast<const char*>(a), stride * 4, 4,
               reinterpret_cast<const char*>(right), right_stride * 4, tile);
    put_float(tile, nullptr, true, 1, at);
}

// A vector, with zeros up to a whole panel.
static Floats padded_copy(const float* x, std::int64_t count) {
    Floats copy(ceil_div(count, kTileColumns) * kTileColumns);
    __builtin_memcpy(copy.data, x, count * 4);
    for (std::int64_t i = count; i % kTileColumns; ++i) copy.data[i] = 0;
    return copy;
}

// A row-major [rows, columns] matrix as [panel][row][32], zeros past its last column.
static Floats panels_of(const float* x, std::int64_t rows, std::int64_t columns) {
    const std::int64_t panels = rows ? ceil_div(columns, kTileColumns) : 0;
    Floats out(panels * rows * kTileColumns);
    for (std::int64_t p = 0; p < panels; ++p) {
        const std::int64_t width = least(kTileColumns, columns - p * kTileColumns);
        for (std::int64_t r = 0; r < rows; ++r) {
            float* to = out.data + (p * rows + r) * kTileColumns;
            __builtin_memcpy(to, x + r * columns + p * kTileColumns, width * 4);
            for (std::int64_t c = width; c < kTileColumns; ++c) to[c] = 0;
        }
    }
    return out;
}

// How a result is cut into tasks. One of them keeps its left rows of a block (up to 448 x 768 B)
// in the L2 cache, of 1 MiB also a group of 8 panels of 32 columns and its part of C; the rows of
// a tile are read from there once per group.
struct Split {
    std::int64_t share, shares, group, groups, panels;

    Split(std::int64_t rows, std::int64_t columns, std::int64_t tile_rows = kTileRows) {
        panels = ceil_div(columns, kTileColumns);
        groups = ceil_div(panels, kPanelsOfTask);
        group = ceil_div(panels, groups);
        const std::int64_t threads = omp_get_max_threads();
        std::int64_t wanted = ceil_div(rows, 448);
        if (wanted * groups < 4 * threads) wanted = ceil_div(4 * threads, groups);
        wanted = ceil_div(wanted, threads) * threads;
        share = ceil_div(ceil_div(rows, wanted), tile_rows) * tile_rows;
        shares = ceil_div(rows, share);
    }
    std::int64_t tasks() const { return shares * groups; }
};

struct Task {
    std::int64_t row, end, panel, last;

    Task(const Split& split, std::int64_t number, std::int64_t rows) {
        row = number / split.groups * split.share;
        end = least(rows, row + split.share);
        panel = number % split.groups * split.group;
        last = least(split.panels, panel + split.group);
    }
};

// The place of the tile at row r and panel p in a result of `columns` columns.
static inline Place place(float* c, std::int64_t stride, std::int64_t columns, std::int64_t r,
                          std::int64_t end, std::int64_t p) {
    return {c + r * stride + p * kTileColumns, stride, static_cast<int>(least(kTileRows, end - r)),
            static_cast<int>(least(kTileColumns, columns - p * kTileColumns))};
}

static void forward(const Rows& a, const Pack& pack, float* y, std::int64_t stride,
                    const float* bias, Update update) {
    if (!a.rows || !pack.rows) return;
    const Split split(a.rows, pack.rows);
    const Padded left(update.left, update.stride, a.rows, update.rank);
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t t = 0; t < split.tasks(); ++t) {
        const Task task(split, t, a.rows);
        for (std::int64_t b = 0; b < pack.blocks; ++b) {
            for (std::int64_t p = task.panel; p < task.last; ++p) {
                const std::int16_t* right =
                    pack.q + (p * pack.blocks + b) * pack.block * kTileColumns;
                for (std::int64_t r = task.row; r < task.end; r += kTileRows) {
                    const std::int16_t* q = a.q + (b * a.padded + r) * a.block;
                    const Place at = place(y, stride, pack.rows, r, task.end, p);
                    int16_tile(a.block / 2, q, a.block, right, a.scale + b * a.padded + r,
                               pack.row_scale + p * kTileColumns,
                               bias ? bias + p * kTileColumns : nullptr, b > 0, at);
                    if (b + 1 == pack.blocks && update.rank) {
                        add_update(left, r, update.right + p * update.rank * kTileColumns,
                                   kTileColumns, update.rank, at);
                    }
                }
            }
        }
    }
}

// 32 columns (16 lanes) of the forward pack, for up to 256 of its rows, as a right operand of the
// gradient: out [row / 2][32][2].
static inline void transpose_panel(const Pack& pack, std::int64_t lane, std::int64_t group,
                                   std::int16_t* out) {
    constexpr std::int64_t kPanels = kGradientBlock / kTileColumns;
    const std::int64_t from = group * kPanels, end = least(pack.panels, from + kPanels);
    for (std::int64_t p = from; p < end; ++p) {
        const std::int16_t* q =
            pack.q + (p * pack.blocks * pack.block / 2 + lane) * 2 * kTileColumns;
        for (int half = 0; half < 2; ++half) {
            Lanes v[16][kParts];
            for (int k = 0; k < 16; ++k) {
                __builtin_memcpy(v[k], q + k * 2 * kTileColumns + half * 32, 64);
            }
            transpose16(v);
            std::int16_t* to = out + ((p - from) * kTileColumns + half * 16) * kTileColumns;
            for (int n = 0; n < 16; n += 2) interleave(v[n], v[n + 1], to + n * kTileColumns);
        }
    }
}

static void gradient(const Rows& dy, const Pack& pack, float* dx, std::int64_t stride, bool add,
                     Update update) {
    if (!dy.rows) return;
    const Split split(dy.rows, pack.depth);
    const std::int64_t all = pack.panels * kTileColumns;
    const Padded left(update.left, update.stride, dy.rows, update.rank);
    const Floats low = panels_of(update.right, update.rank, pack.depth);
    const Floats scale = padded_copy(pack.column_scale, pack.depth);
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t t = 0; t < split.tasks(); ++t) {
        const Task task(split, t, dy.rows);
        alignas(64) std::int16_t right[kGradientBlock * kTileColumns];
        for (std::int64_t g = 0; g < dy.blocks; ++g) {
            const std::int64_t lanes = least(kGradientBlock, all - g * kGradientBlock) / 2;
            for (std::int64_t p = task.panel; p < task.last; ++p) {
                transpose_panel(pack, p * 16, g, right);
                for (std::int64_t r = task.row; r < task.end; r += kTileRows) {
                    const std::int16_t* q = dy.q + (g * dy.padded + r) * dy.block;
                    const Place at = place(dx, stride, pack.depth, r, task.end, p);
                    int16_tile(lanes, q, dy.block, right, dy.scale + g * dy.padded + r,
                               scale.data + p * kTileColumns, nullptr, add || g > 0, at);
                    if (g + 1 == dy.blocks && update.rank) {
                        add_update(left, r, low.data + p * update.rank * kTileColumns, kTileColumns,
                                   update.rank, at);
                    }
                }
            }
        }
    }
}

// ---- small right operands in int16

static void skinny(const Rows& a, const float* limits, const float* data, std::int64_t row,
                   std::int64_t column, const float* divisor, std::int64_t depth, std::int64_t n,
                   float* out, std::int64_t stride, float factor) {
    const std::int64_t panels = ceil_div(n, kTileColumns);
    for (std::int64_t p = 0; p < panels; ++p) {
        const int columns = static_cast<int>(least(kTileColumns, n - p * kTileColumns));
        const std::int64_t size = a.blocks * a.block * kTileColumns;
        std::int16_t* q = static_cast<std::int16_t*>(std::aligned_alloc(64, size * 2));
        float* scale =
            static_cast<float*>(std::aligned_alloc(64, a.blocks * kTileColumns * sizeof(float)));
#pragma omp parallel for schedule(static)
        for (std::int64_t b = 0; b < a.blocks; ++b) {
            alignas(64) float buffer[512];
            for (int c = 0; c < kTileColumns; ++c) {
                const std::int64_t from = b * a.block;
                for (std::int64_t i = 0; i < a.block; ++i) {
                    const std::int64_t k = from + i;
                    const bool is = c < columns && k < depth;
                    float d = is && divisor ? divisor[k] : 1;
                    buffer[i] =
                        is && d != 0 ? data[k * row + (p * kTileColumns + c) * column] / d : 0;
                }
                float largest;
                const float norm = norm_of(buffer, a.block, &largest);
                const double room = kInt32 / (limits[b] + std::sqrt(double(a.block)) / 2 + 1);
                float up = 0;
                if (norm > 1e-36f) {
                    up = static_cast<float>(room - std::sqrt(double(a.block)) / 2 - 1) / norm;
                    if (up * largest > kLargest) up = kLargest / largest;
                }
                scale[b * kTileColumns + c] =
                    norm < __builtin_inff() ? (up > 0 ? factor / up : 0) : __builtin_nanf("");
                if (!(norm < __builtin_inff())) up = 0;
                for (std::int64_t i = 0; i < a.block; i += 16) {
                    std::int16_t rounded[16];
                    v16 v = load16(buffer + i) * up;
                    if (up == 0) v = v16{};
                    store_int16(rounded, v);
                    std::int16_t* to = q + (b * a.block + i) * kTileColumns + 2 * c;
                    for (int j = 0; j < 16; j += 2) {
                        __builtin_memcpy(to + j * kTileColumns, rounded + j, 4);
                    }
                }
            }
        }
#pragma omp parallel for schedule(static)
        for (std::int64_t r = 0; r < a.rows; r += kTileRows) {
            const Place at{out + r * stride + p * kTileColumns, stride,
                           static_cast<int>(least(kTileRows, a.rows - r)), columns};
            for (std::int64_t b = 0; b < a.blocks; ++b) {
                const std::int16_t* left = a.q + (b * a.padded + r) * a.block;
                int16_tile(a.block / 2, left, a.block, q + b * a.block * kTileColumns,
                           a.scale + b * a.padded + r, scale + b * kTileColumns, nullptr, b > 0,
                           at);
            }
        }
        std::free(q);
        std::free(scale);
    }
}

// ---- fp32

// Rows [first, first + columns) of W, items [from, from + lanes), as [lane][32].
static inline void transpose_float(const Matrix& w, std::int64_t first, std::int64_t columns,
                                   std::int64_t from, std::int64_t lanes, float* out) {
    for (int half = 0; half < kTileColumns; half += 16) {
        for (std::int64_t l = 0; l < lanes; l += 16) {
            Lanes v[16][kParts];
            for (int c = 0; c < 16; ++c) {
                const std::int64_t row = first + half + c, count = least(16, lanes - l);
                if (half + c < columns && count == 16 && !w.bf16) {
                    const float* x = static_cast<const float*>(w.data) + row * w.stride + from + l;
                    __builtin_prefetch(x + 64);
                    __builtin_memcpy(v[c], x, 64);
                    continue;
                }
                alignas(64) float buffer[16] = {};
                if (half + c < columns) read_row(w, row, from + l, count, nullptr, buffer, 16);
                __builtin_memcpy(v[c], buffer, 64);
            }
            transpose16(v);
            for (std::int64_t i = 0; i < least(16, lanes - l); ++i) {
                __builtin_memcpy(out + (l + i) * kTileColumns + half, v[i], 64);
            }
        }
    }
}

// Rows [from, from + lanes) of a row-major matrix, 32 columns of it; zeros past the last column.
static inline void copy_panel(const Matrix& w, std::int64_t from, std::int64_t lanes,
                              std::int64_t first, std::int64_t columns, float* out) {
    for (std::int64_t l = 0; l < lanes; ++l) {
        if (!w.bf16) {
            const float* next = static_cast<const float*>(w.data) + (from + l + 12) * w.stride;
            __builtin_prefetch(next + first);
            __builtin_prefetch(next + first + 16);
        }
        read_row(w, from + l, first, least(kTileColumns, columns), nullptr, out + l * kTileColumns,
                 kTileColumns);
    }
}

struct Product {
    const float* a;
    std::int64_t a_stride;
    float* c;
    std::int64_t stride, columns;
    const float* bias;
};

// A block of left rows, copied together: rows 8 KiB apart would share a few sets of the L1 cache.
static inline void gather(const Product& job, const Task& task, std::int64_t from,
                          std::int64_t lanes, float* left) {
    for (std::int64_t r = task.row; r < task.end; ++r) {
        __builtin_memcpy(left + (r - task.row) * lanes, job.a + r * job.a_stride + from, lanes * 4);
    }
}

// The tiles of panel p, one block of the contraction.
static inline void fp32_panel(const Product& job, const Task& task, std::int64_t p,
                              const float* left, const float* right, std::int64_t lanes, bool add) {
    const float* bias = job.bias ? job.bias + p * kTileColumns : nullptr;
    for (std::int64_t r = task.row; r < task.end; r += kTileRows) {
        fp32_tile(lanes, left + (r - task.row) * lanes, right, bias, add,
                  place(job.c, job.stride, job.columns, r, task.end, p));
    }
}

static void forward_fp32(const float* x, std::int64_t x_stride, std::int64_t m, Matrix w,
                         std::int64_t n, std::int64_t k, float* y, std::int64_t stride,
                         const float* bias, Update update) {
    if (!m || !n) return;
    const Split split(m, n);
    const Product base{x, x_stride, y, stride, n, bias};
    const Product low{update.left, update.stride, y, stride, n, nullptr};
    const std::int64_t blocks = ceil_div(k, kFloatBlock);
    const std::int64_t more = ceil_div(update.rank, kFloatBlock);
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t t = 0; t < split.tasks(); ++t) {
        const Task task(split, t, m);
        alignas(64) float right[kFloatBlock * kTileColumns];
        const Floats left(split.share * kFloatBlock);
        for (std::int64_t b = 0; b < blocks + more; ++b) {
            const Product& job = b < blocks ? base : low;
            const std::int64_t from = (b < blocks ? b : b - blocks) * kFloatBlock;
            const std::int64_t lanes = least(kFloatBlock, (b < blocks ? k : update.rank) - from);
            gather(job, task, from, lanes, left.data);
            for (std::int64_t p = task.panel; p < task.last; ++p) {
                const std::int64_t column = p * kTileColumns;
                const float* panel = update.right + (p * update.rank + from) * kTileColumns;
                if (b < blocks) {
                    transpose_float(w, column, least(kTileColumns, n - column), from, lanes, right);
                    panel = right;
                }
                fp32_panel(job, task, p, left.data, panel, lanes, b > 0);
            }
        }
    }
}

static void gradient_fp32(const float* dy, std::int64_t dy_stride, std::int64_t m, Matrix w,
                          std::int64_t n, std::int64_t k, float* dx, std::int64_t stride, bool add,
                          Update update) {
    if (!m || !k) return;
    const Split split(m, k);
    const Product base{dy, dy_stride, dx, stride, k, nullptr};
    const Product low{update.left, update.stride, dx, stride, k, nullptr};
    const Matrix lower{update.right, k, false};
    const std::int64_t blocks = ceil_div(n, kFloatBlock);
    const std::int64_t more = ceil_div(update.rank, kFloatBlock);
#pragma omp parallel for schedule(dynamic)
    for (std::int64_t t = 0; t < split.tasks(); ++t) {
        const Task task(split, t, m);
        alignas(64) float right[kFloatBlock * kTileColumns];
        const Floats left(split.share * kFloatBlock);
        for (std::int64_t b = 0; b < blocks + more; ++b) {
            const Product& job = b < blocks ? base : low;
            const std::int64_t from = (b < blocks ? b : b - blocks) * kFloatBlock;
            const std::int64_t lanes = least(kFloatBlock, (b < blocks ? n : update.rank) - from);
            gather(job, task, from, lanes, left.data);
            for (std::int64_t p = task.panel; p < task.last; ++p) {
                const std::int64_t column = p * kTileColumns;
                copy_panel(b < blocks ? w : lower, from, lanes, column, k - column, right);
                fp32_panel(job, task, p, left.data, right, lanes, add || b > 0);
            }
        }
    }
}

// 8 rows by 32 columns: ranks are multiples of 8 more often than of 14. a: [lanes][8 of `a_lane`].
static inline void micro_narrow(std::int64_t lanes, const float* a, std::int64_t a_lane,
                                const float* b, float* tile) {
#if defined(TRIMPOT_GEMM_AVX2)
    for (int half = 0; half < kTileColumns; half += 16) {
        for (int r = 0; r < 8; r += 4) {
            micro_part<Fp32Lane, 4>(lanes, reinterpret_cast<const char*>(a + r), 4, 4 * a_lane,
                                    reinterpret_cast<const char*>(b + half), 4 * kTileColumns,
                                    reinterpret_cast<char*>(tile + r * kTileColumns + half));
        }
    }
#else
    v16 sums[8][2] = {};
    for (std::int64_t l = 0; l < lanes; ++l, a += a_lane, b += kTileColumns) {
        const v16 b0 = load16(b), b1 = load16(b + 16);
#pragma GCC unroll 8
        for (int r = 0; r < 8; ++r) {
            sums[r][0] += b0 * a[r];
            sums[r][1] += b1 * a[r];
        }
    }
    __builtin_memcpy(tile, sums, sizeof sums);
#endif
}

// Contraction over rows, in blocks whose rows of b stay in the L2 cache and the TLB.
static void outer(const float* a, std::int64_t a_stride, const float* b, std::int64_t b_stride,
                  std::int64_t m, std::int64_t p, std::int64_t n, float* out, std::int64_t stride,
                  float factor) {
    if (!m) {
        for (std::int64_t r = 0; r < p; ++r) __builtin_memset(out + r * stride, 0, n * 4);
        return;
    }
    const Matrix right{b, b_stride, false};
    const std::int64_t padded = ceil_div(p, 8) * 8, panels = ceil_div(n, kTileColumns);
    const Floats packed(m * padded);
#pragma omp parallel for schedule(static)
    for (std::int64_t i = 0; i < m; ++i) {  // rows of a, padded to whole tiles
        __builtin_memcpy(packed.data + i * padded, a + i * a_stride, p * 4);
        for (std::int64_t r = p; r < padded; ++r) packed.data[i * padded + r] = 0;
    }
#pragma omp parallel for schedule(static)
    for (std::int64_t j = 0; j < panels; ++j) {
        alignas(64) float tile[8 * kTileColumns], copy[kFloatBlock * kTileColumns];
        for (std::int64_t from = 0; from < m; from += kFloatBlock) {
            const std::int64_t lanes = least(kFloatBlock, m - from);
            copy_panel(right, from, lanes, j * kTileColumns, n - j * kTileColumns, copy);
            for (std::int64_t r = 0; r < p; r += 8) {
                micro_narrow(lanes, packed.data + from * padded + r, padded, copy, tile);
                Place at = place(out, stride, n, r, p, j);
                at.rows = static_cast<int>(least(8, p - r));
                put_float(tile, nullptr, from > 0, factor, at);
            }
        }
    }
}

// ---- dropout: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3")

static inline void philox(std::uint32_t* c, std::uint32_t k0, std::uint32_t k1) {
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t a = std::uint64_t{0xD2511F53} * c[0];
        const std::uint64_t b = std::uint64_t{0xCD9E8D57} * c[2];
        c[0] = static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k0;
        c[1] = static_cast<std::uint32_t>(b);
        c[2] = static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k1;
        c[3] = static_cast<std::uint32_t>(a);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
}

static void dropout(const float* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                    std::int64_t first_row, std::uint64_t seed, std::uint32_t threshold,
                    float scale, float* out) {
    const auto low = static_cast<std::uint32_t>(seed),
               high = static_cast<std::uint32_t>(seed >> 32);
#pragma omp parallel for schedule(static)
    for (std::int64_t r = 0; r < rows; ++r) {
        const auto row = static_cast<std::uint64_t>(first_row + r);
        for (std::int64_t j = 0; j < columns; j += 4) {
            std::uint32_t word[4] = {static_cast<std::uint32_t>(j / 4),
                                     static_cast<std::uint32_t>(row),
                                     static_cast<std::uint32_t>(row >> 32), 0};
            philox(word, low, high);
            const std::int64_t width = least(4, columns - j);
            for (std::int64_t i = 0; i < width; ++i) {
                out[r * columns + j + i] =
                    word[i] < threshold ? x[r * stride + j + i] * scale : 0.0f;
            }
        }
    }
}
