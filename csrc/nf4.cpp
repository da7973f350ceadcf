// Compiled once for each instruction set, see vec.h. Each operation rounds by itself, in the
// order of the definition, so that all backends give the same bits.
#include "nf4.h"

#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

constexpr int64_t kBytes = kNf4Block / 2;
constexpr int64_t kBlocks = 64;               // that a thread takes at once
constexpr float kSmallest = 1.17549435e-38f;  // normal; the reciprocal of less may be infinite

// kWidth levels of kWidth / 2 bytes, the high nibble of each first.
static inline Bits nibbles(const uint8_t* at) {
#if defined(__AVX512F__)
    __m512i x = _mm512_cvtepu8_epi64(_mm_loadl_epi64((const __m128i*)at));
    x = _mm512_or_si512(x, _mm512_slli_epi64(x, 32));
    const __m512i shift = _mm512_set1_epi64(4);  // of the lower half; the upper one has 0
    return (Bits)_mm512_and_si512(_mm512_srlv_epi32(x, shift), _mm512_set1_epi32(15));
#elif defined(__AVX2__)
    int32_t four;
    __builtin_memcpy(&four, at, sizeof four);
    __m256i x = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    x = _mm256_or_si256(x, _mm256_slli_epi64(x, 32));
    const __m256i shift = _mm256_set1_epi64x(4);
    return (Bits)_mm256_and_si256(_mm256_srlv_epi32(x, shift), _mm256_set1_epi32(15));
#else
    Bits levels;
    for (int i = 0; i < kWidth; ++i) levels[i] = (at[i / 2] >> (i % 2 ? 0 : 4)) & 15u;
    return levels;
#endif
}

// The code, held in registers.
struct Code {
    explicit Code(const float* table) { __builtin_memcpy(values, table, sizeof values); }
    alignas(64) float values[16];

    inline Floats operator()(Bits level) const {
#if defined(__AVX512F__)
        return (Floats)_mm512_permutexvar_ps((__m512i)level, _mm512_load_ps(values));
#elif defined(__AVX2__)
        const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(values), (__m256i)level);
        const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(values + 8), (__m256i)level);
        // A level's bit 3 is the sign that the blend goes by.
        return (Floats)_mm256_blendv_ps(low, high, (__m256)(level << 28));
#else
        Floats x;
        for (int i = 0; i < kWidth; ++i) x[i] = values[level[i]];
        return x;
#endif
    }
};

static inline float scale_of(const Nf4Dequantise& a, int64_t block) {
    if (!a.nested_absmax) return static_cast<const float*>(a.absmax)[block];
    const uint8_t level = static_cast<const uint8_t*>(a.absmax)[block];
    return a.nested_map[level] * a.nested_absmax[block / kNf4NestedBlock] + a.offset;
}

template <class T>
inline void dequantise_block(const uint8_t* packed, const Code& code, float scale,
                             typename T::Item* out, int64_t count) {
    sweep(count, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        store<T>(out + i, code(nibbles(packed + i / 2)) * scale, n);
    });
}

template <class T>
void dequantise_typed(const Nf4Dequantise& a) {
    const Code code(a.code);
    const int64_t blocks = (a.count + kNf4Block - 1) / kNf4Block;
#pragma omp parallel for schedule(static) if (a.count > kSerial)
    for (int64_t first = 0; first < blocks; first += kBlocks) {
        for (int64_t b = first; b < least(first + kBlocks, blocks); ++b) {
            auto* out = static_cast<typename T::Item*>(a.out) + b * kNf4Block;
            const uint8_t* packed = a.packed + b * kBytes;
            const int64_t count = least(kNf4Block, a.count - b * kNf4Block);
            uint8_t padded[kBytes] = {};  // the last block may end before a vector does
            if (count < kNf4Block) {
                __builtin_memcpy(padded, packed, static_cast<uint64_t>((count + 1) / 2));
                packed = padded;
            }
            dequantise_block<T>(packed, code, scale_of(a, b), out, count);
        }
    }
}

// → absmax
template <class T>
inline float quantise_block(const typename T::Item* weight, const float* thresholds,
                            uint8_t* packed, int64_t count) {
    float items[kNf4Block] = {};
    Floats most = {};
    sweep(count, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        const Floats x = load<T>(weight + i, n);
        store<Float>(items + i, x, n);
        most = larger(most, larger(x, -x));
    });
    const float absmax = largest(most);
    const float inverse = absmax >= kSmallest ? 1.0f / absmax : 0.0f;
    uint32_t levels[kNf4Block];
    for (int64_t i = 0; i < kNf4Block; i += kWidth) {
        const Floats scaled = load<Float>(items + i, kWidth) * inverse;
        Bits level = {};
        for (int k = 0; k < 15; ++k) level -= (Bits)(scaled > all(thresholds[k]));
        __builtin_memcpy(levels + i, &level, sizeof level);
    }
    for (int64_t i = 0; i < (count + 1) / 2; ++i) {
        packed[i] = static_cast<uint8_t>(levels[2 * i] << 4 | levels[2 * i + 1]);
    }
    return absmax;
}

template <class T>
void quantise_typed(const Nf4Quantise& a) {
    const int64_t blocks = (a.count + kNf4Block - 1) / kNf4Block;
#pragma omp parallel for schedule(static) if (a.count > kSerial)
    for (int64_t b = 0; b < blocks; ++b) {
        const auto* weight = static_cast<const typename T::Item*>(a.weight) + b * kNf4Block;
        const int64_t count = least(kNf4Block, a.count - b * kNf4Block);
        a.absmax[b] = quantise_block<T>(weight, a.thresholds, a.packed + b * kBytes, count);
    }
}

void quantise(const Nf4Quantise& a) {
    with_type(a.type, [&](auto type) { quantise_typed<decltype(type)>(a); });
}

void dequantise(const Nf4Dequantise& a) {
    with_type(a.type, [&](auto type) { dequantise_typed<decltype(type)>(a); });
}

}  // namespace

extern const Nf4Table nf4;
const Nf4Table nf4{quantise, dequantise};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
