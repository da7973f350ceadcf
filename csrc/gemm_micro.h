// The innermost loop: a 14 x 32 tile over 32-bit lanes of the contraction. Included once per
// instruction set, inside its namespace; TRIMPOT_GEMM_AVX512 selects the assembly, else the
// compiler's flags the intrinsics of AVX2.
//
// A lane is one float, two int16 or four bytes: what is loaded and broadcast is the
// same 32 bits, and only the instruction that multiplies and adds differs.
// Left operand: row r, lane l at a + r * row + l * lane (bytes). Right: column c, lane l at
// b + l * b_lane + 4 c. tile: 14 rows of 32 sums, overwritten, 64-byte aligned.

#if defined(TRIMPOT_GEMM_AVX512)

// Assembly, since GCC 12 spills the 28 accumulators of the same loop in intrinsics (105 against
// 270 Gop/s in int16). zmm0-27 hold the tile, 28 and 29 the columns, 30 and 31 a broadcast each.
#define TRIMPOT_ROW(address, even, odd, temporary, instruction)                    \
    "vpbroadcastd " address ",%%zmm" temporary "\n" instruction " %%zmm" temporary \
    ",%%zmm28,%%zmm" even "\n" instruction " %%zmm" temporary ",%%zmm29,%%zmm" odd "\n"
#define TRIMPOT_ZERO(n) "vpxord %%zmm" n ",%%zmm" n ",%%zmm" n "\n"
#define TRIMPOT_KEEP(n, offset) "vmovaps %%zmm" n "," offset "(%[t])\n"

#define TRIMPOT_MICRO(name, instruction)                                                             \
    static inline void name(std::int64_t lanes, const char* a, std::int64_t row,                     \
                            std::int64_t lane, const char* b, std::int64_t b_lane, void* tile) {     \
        const char* a5 = a + 5 * row;                                                                \
        const char* a10 = a + 10 * row;                                                              \
        const std::int64_t row3 = 3 * row;                                                           \
        __asm__ volatile(                                                                          \
            TRIMPOT_ZERO("0") TRIMPOT_ZERO("1") TRIMPOT_ZERO("2") TRIMPOT_ZERO("3")                \
            TRIMPOT_ZERO("4") TRIMPOT_ZERO("5") TRIMPOT_ZERO("6") TRIMPOT_ZERO("7")                \
            TRIMPOT_ZERO("8") TRIMPOT_ZERO("9") TRIMPOT_ZERO("10") TRIMPOT_ZERO("11")              \
            TRIMPOT_ZERO("12") TRIMPOT_ZERO("13") TRIMPOT_ZERO("14") TRIMPOT_ZERO("15")            \
            TRIMPOT_ZERO("16") TRIMPOT_ZERO("17") TRIMPOT_ZERO("18") TRIMPOT_ZERO("19")            \
            TRIMPOT_ZERO("20") TRIMPOT_ZERO("21") TRIMPOT_ZERO("22") TRIMPOT_ZERO("23")            \
            TRIMPOT_ZERO("24") TRIMPOT_ZERO("25") TRIMPOT_ZERO("26") TRIMPOT_ZERO("27")            \
            "test %[n],%[n]\n"                                                                     \
            "jz 2f\n"                                                                              \
            ".p2align 5\n"                                                                         \
            "1:\n"                                                                                 \
            "vmovups (%[b]),%%zmm28\n"                                                             \
            "vmovups 64(%[b]),%%zmm29\n"                                                           \
            TRIMPOT_ROW("(%[a])", "0", "1", "30", instruction)                                     \
            TRIMPOT_ROW("(%[a],%[r])", "2", "3", "31", instruction)                                \
            TRIMPOT_ROW("(%[a],%[r],2)", "4", "5", "30", instruction)                              \
            TRIMPOT_ROW("(%[a],%[r3])", "6", "7", "31", instruction)                               \
            TRIMPOT_ROW("(%[a],%[r],4)", "8", "9", "30", instruction)                              \
            TRIMPOT_ROW("(%[a5])", "10", "11", "31", instruction)                                  \
            TRIMPOT_ROW("(%[a5],%[r])", "12", "13", "30", instruction)                             \
            TRIMPOT_ROW("(%[a5],%[r],2)", "14", "15", "31", instruction)                           \
            TRIMPOT_ROW("(%[a5],%[r3])", "16", "17", "30", instruction)                            \
            TRIMPOT_ROW("(%[a5],%[r],4)", "18", "19", "31", instruction)                           \
            TRIMPOT_ROW("(%[a10])", "20", "21", "30", instruction)                                 \
            TRIMPOT_ROW("(%[a10],%[r])", "22", "23", "31", instruction)                            \
            TRIMPOT_ROW("(%[a10],%[r],2)", "24", "25", "30", instruction)                          \
            TRIMPOT_ROW("(%[a10],%[r3])", "26", "27", "31", instruction)                           \
            "add %[bl],%[b]\n"                                                                     \
            "add %[l],%[a]\n"                                                                      \
            "add %[l],%[a5]\n"                                                                     \
            "add %[l],%[a10]\n"                                                                    \
            "dec %[n]\n"                                                                           \
            "jnz 1b\n"                                                                             \
            "2:\n"                                                                                 \
            TRIMPOT_KEEP("0", "0") TRIMPOT_KEEP("1", "64") TRIMPOT_KEEP("2", "128")                \
            TRIMPOT_KEEP("3", "192") TRIMPOT_KEEP("4", "256") TRIMPOT_KEEP("5", "320")             \
            TRIMPOT_KEEP("6", "384") TRIMPOT_KEEP("7", "448") TRIMPOT_KEEP("8", "512")             \
            TRIMPOT_KEEP("9", "576") TRIMPOT_KEEP("10", "640") TRIMPOT_KEEP("11", "704")           \
            TRIMPOT_KEEP("12", "768") TRIMPOT_KEEP("13", "832") TRIMPOT_KEEP("14", "896")          \
            TRIMPOT_KEEP("15", "960") TRIMPOT_KEEP("16", "1024") TRIMPOT_KEEP("17", "1088")        \
            TRIMPOT_KEEP("18", "1152") TRIMPOT_KEEP("19", "1216") TRIMPOT_KEEP("20", "1280")       \
            TRIMPOT_KEEP("21", "1344") TRIMPOT_KEEP("22", "1408") TRIMPOT_KEEP("23", "1472")       \
            TRIMPOT_KEEP("24", "1536") TRIMPOT_KEEP("25", "1600") TRIMPOT_KEEP("26", "1664")       \
            TRIMPOT_KEEP("27", "1728")                                                             \
            : [n] "+r"(lanes), [a] "+r"(a), [a5] "+r"(a5), [a10] "+r"(a10), [b] "+r"(b)            \
            : [r] "r"(row), [r3] "r"(row3), [l] "r"(lane), [bl] "r"(b_lane), [t] "r"(tile)         \
            : "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9",      \
              "xmm10", "xmm11", "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18",     \
              "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24", "xmm25", "xmm26", "xmm27",     \
              "xmm28", "xmm29", "xmm30", "xmm31", "cc", "memory"); \
    }

TRIMPOT_MICRO(micro_fp32, "vfmadd231ps")
TRIMPOT_MICRO(micro_int16, "vpdpwssd")
TRIMPOT_MICRO(micro_bytes, "vpdpbusd")

#undef TRIMPOT_MICRO
#undef TRIMPOT_ROW
#undef TRIMPOT_ZERO
#undef TRIMPOT_KEEP

#elif defined(__AVX2__) && defined(__FMA__)
#define TRIMPOT_GEMM_AVX2

// 16 registers hold 5 x 16 sums, their columns and a broadcast: the tile falls into halves of 16
// columns, whose right operand stays in the L1 cache while 5 + 5 + 4 rows meet it.
struct Fp32Lane {
    typedef __m256 Sums;
    static inline Sums zero() { return _mm256_setzero_ps(); }
    static inline Sums load(const char* at) {
        return _mm256_loadu_ps(reinterpret_cast<const float*>(at));
    }
    static inline Sums spread(const char* at) {
        return _mm256_broadcast_ss(reinterpret_cast<const float*>(at));
    }
    static inline Sums add(Sums left, Sums right, Sums sums) {
        return _mm256_fmadd_ps(left, right, sums);
    }
    static inline void store(char* at, Sums sums) {
        _mm256_storeu_ps(reinterpret_cast<float*>(at), sums);
    }
};

struct Int16Lane {
    typedef __m256i Sums;
    static inline Sums zero() { return _mm256_setzero_si256(); }
    static inline Sums load(const char* at) {
        return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    }
    static inline Sums spread(const char* at) {
        std::int32_t pair;
        __builtin_memcpy(&pair, at, sizeof pair);
        return _mm256_set1_epi32(pair);
    }
    // Assembly, since GCC 12 takes all products of a lane before their sums and spills those.
    static inline Sums add(Sums left, Sums right, Sums sums) {
        Sums products;
        __asm__(
            "vpmaddwd %[right],%[left],%[products]\n"
            "vpaddd %[products],%[sums],%[sums]"
            : [sums] "+x"(sums), [products] "=&x"(products)
            : [left] "x"(left), [right] "x"(right));
        return sums;
    }
    static inline void store(char* at, Sums sums) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), sums);
    }
};

// put(r, at, sums): the sums of row r from byte `at` of a row on.
template <class Lane, int kRows, class Put>
static inline void micro_sums(std::int64_t lanes, const char* a, std::int64_t row,
                              std::int64_t lane, const char* b, std::int64_t b_lane,
                              const Put& put) {
    typename Lane::Sums sums[kRows][2];
#pragma GCC unroll 5
    for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Lane::zero();
    for (std::int64_t l = 0; l < lanes; ++l, a += lane, b += b_lane) {
        const auto b0 = Lane::load(b), b1 = Lane::load(b + 32);
#pragma GCC unroll 5
        for (int r = 0; r < kRows; ++r) {
            const auto left = Lane::spread(a + r * row);
            sums[r][0] = Lane::add(left, b0, sums[r][0]);
            sums[r][1] = Lane::add(left, b1, sums[r][1]);
        }
    }
#pragma GCC unroll 5
    for (int r = 0; r < kRows; ++r) {
        put(r, 0, sums[r][0]);
        put(r, 32, sums[r][1]);
    }
}

template <class Lane, int kRows>
static inline void micro_part(std::int64_t lanes, const char* a, std::int64_t row,
                              std::int64_t lane, const char* b, std::int64_t b_lane, char* tile) {
    const auto put = [=](int r, int at, typename Lane::Sums sums) {
        Lane::store(tile + r * kTileColumns * 4 + at, sums);
    };
    micro_sums<Lane, kRows>(lanes, a, row, lane, b, b_lane, put);
}

static_assert(kTileRows == 14 && kTileColumns == 32, "rows 0, 5 and 10; halves of 16 columns");

template <class Lane>
static inline void micro(std::int64_t lanes, const char* a, std::int64_t row, std::int64_t lane,
                         const char* b, std::int64_t b_lane, void* tile) {
    for (int half = 0; half < 128; half += 64) {
        char* to = static_cast<char*>(tile) + half;
        micro_part<Lane, 5>(lanes, a, row, lane, b + half, b_lane, to);
        micro_part<Lane, 5>(lanes, a + 5 * row, row, lane, b + half, b_lane, to + 5 * 128);
        micro_part<Lane, 4>(lanes, a + 10 * row, row, lane, b + half, b_lane, to + 10 * 128);
    }
}

template <class Lane, int kRows, class Put>
static inline void direct_part(std::int64_t lanes, const char* a, std::int64_t row, const char* b,
                               float* c, std::int64_t stride, const float* bias, bool add,
                               const Put& put) {
    for (int r = 0; r < kRows; ++r) __builtin_prefetch(c + r * stride, 1);
    const auto on = [&](const auto& base) {
        const auto each = [&](int r, int at, typename Lane::Sums sums) {
            float* to = c + r * stride + at / 4;
            _mm256_storeu_ps(to, put(r, at / 4, sums, base(to, at / 4)));
        };
        micro_sums<Lane, kRows>(lanes, a, row, 4, b, 4 * kTileColumns, each);
    };
    if (add) {
        on([](const float* to, int) { return _mm256_loadu_ps(to); });
    } else if (bias) {
        on([=](const float*, int at) { return _mm256_loadu_ps(bias + at); });
    } else {
        on([](const float*, int) { return _mm256_setzero_ps(); });
    }
}

// 14 rows of 16 columns, or of 32, go from the registers to c. put(r, column, sums, base): what
// the sums of 8 columns make of the base, which is c itself, or else the bias, or zero.
template <class Lane, class Put>
static inline void direct(std::int64_t lanes, const char* a, std::int64_t row, const char* b,
                          float* c, std::int64_t stride, int columns, const float* bias, bool add,
                          const Put& put) {
    for (int j = 0; j < columns; j += 16, b += 64, c += 16, bias += bias ? 16 : 0) {
        const auto from = [&](int first) {
            return [&put, first, j](int r, int column, typename Lane::Sums sums, __m256 base) {
                return put(first + r, j + column, sums, base);
            };
        };
        direct_part<Lane, 5>(lanes, a, row, b, c, stride, bias, add, from(0));
        direct_part<Lane, 5>(lanes, a + 5 * row, row, b, c + 5 * stride, stride, bias, add,
                             from(5));
        direct_part<Lane, 4>(lanes, a + 10 * row, row, b, c + 10 * stride, stride, bias, add,
                             from(10));
    }
}

static inline void micro_fp32(std::int64_t lanes, const char* a, std::int64_t row,
                              std::int64_t lane, const char* b, std::int64_t b_lane, void* tile) {
    micro<Fp32Lane>(lanes, a, row, lane, b, b_lane, tile);
}

static inline void micro_int16(std::int64_t lanes, const char* a, std::int64_t row,
                               std::int64_t lane, const char* b, std::int64_t b_lane, void* tile) {
    micro<Int16Lane>(lanes, a, row, lane, b, b_lane, tile);
}

#else

// The same in plain C++, for any processor; the compiler makes vectors of the inner loop.
static inline void micro_fp32(std::int64_t lanes, const char* a, std::int64_t row,
                              std::int64_t lane, const char* b, std::int64_t b_lane, void* tile) {
    float sums[kTileRows][kTileColumns] = {};
    for (std::int64_t l = 0; l < lanes; ++l) {
        const float* right = reinterpret_cast<const float*>(b + l * b_lane);
        for (int r = 0; r < kTileRows; ++r) {
            const float left = *reinterpret_cast<const float*>(a + r * row + l * lane);
            for (int c = 0; c < kTileColumns; ++c) sums[r][c] += left * right[c];
        }
    }
    __builtin_memcpy(tile, sums, sizeof sums);
}

static inline void micro_int16(std::int64_t lanes, const char* a, std::int64_t row,
                               std::int64_t lane, const char* b, std::int64_t b_lane, void* tile) {
    std::int32_t sums[kTileRows][kTileColumns] = {};
    for (std::int64_t l = 0; l < lanes; ++l) {
        const std::int16_t* right = reinterpret_cast<const std::int16_t*>(b + l * b_lane);
        for (int r = 0; r < kTileRows; ++r) {
            const std::int16_t* left =
                reinterpret_cast<const std::int16_t*>(a + r * row + l * lane);
            for (int c = 0; c < kTileColumns; ++c) {
                sums[r][c] += left[0] * right[2 * c] + left[1] * right[2 * c + 1];
            }
        }
    }
    __builtin_memcpy(tile, sums, sizeof sums);
}

#endif

#if !defined(TRIMPOT_GEMM_AVX512)

// Signed bytes on the left, unsigned ones on the right.
static inline void micro_bytes(std::int64_t lanes, const char* a, std::int64_t row,
                               std::int64_t lane, const char* b, std::int64_t b_lane, void* tile) {
    std::int32_t sums[kTileRows][kTileColumns] = {};
    for (std::int64_t l = 0; l < lanes; ++l) {
        const auto* right = reinterpret_cast<const std::uint8_t*>(b + l * b_lane);
        for (int r = 0; r < kTileRows; ++r) {
            const auto* left = reinterpret_cast<const std::int8_t*>(a + r * row + l * lane);
            for (int c = 0; c < kTileColumns; ++c) {
                for (int i = 0; i < 4; ++i) sums[r][c] += left[i] * right[4 * c + i];
            }
        }
    }
    __builtin_memcpy(tile, sums, sizeof sums);
}

#endif
