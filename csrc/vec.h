// Vectors of floats for the sources that are compiled once for each instruction set: TRIMPOT_ISA
// names the namespace, kWidth follows from the compiler's flags. GCC's and Clang's vector
// extensions do the arithmetic; intrinsics only what those do not offer.
//
// Everything has internal linkage, and nothing of std:: is used: an inline function with external
// linkage would exist once for each instruction set under one name, and the linker would keep any
// of them. These sources are compiled with -ffp-contract=off: a product and a sum round by
// themselves unless fma() is written.
#pragma once

#include <stdint.h>

#include "type.h"

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define TRIMPOT_INLINE __attribute__((always_inline))

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef uint32_t Bits __attribute__((vector_size(4 * kWidth)));
typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

// Elements that are worth waking other threads for.
constexpr int64_t kSerial = 16384;

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline Floats all(float x) { return x - Floats{}; }
static inline Bits bits_of(Floats x) { return (Bits)x; }
static inline Floats floats_of(Bits x) { return (Floats)x; }

// a > b ? a : b, and so b where one is NaN.
static inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_max_ps((__m256)a, (__m256)b);
#else
    return a > b ? a : b;
#endif
}

// a < b ? a : b, and so b where one is NaN.
static inline Floats smaller(Floats a, Floats b) {
#if defined(__AVX512F__)
    return (Floats)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    return (Floats)_mm256_min_ps((__m256)a, (__m256)b);
#else
    return a < b ? a : b;
#endif
}

// 16 bits to 32 and back, the lower ones. GCC 12 makes six instructions of one in a conversion.
static inline Bits widen(Halves x) {
#if defined(__AVX512F__)
    return (Bits)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
    return (Bits)_mm256_cvtepu16_epi32((__m128i)x);
#else
    return __builtin_convertvector(x, Bits);
#endif
}

static inline Halves narrow(Bits x) {
#if defined(__AVX512F__)
    return (Halves)_mm512_cvtepi32_epi16((__m512i)x);
#else
    return __builtin_convertvector(x, Halves);
#endif
}

// a·b + c, in one rounding where the instruction set has that.
static inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
    return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__)
    return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
    return (Floats)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    return a * b + c;
#endif
}

// Rounded correctly.
static inline Floats root(Floats x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX2__)
    return (Floats)_mm256_sqrt_ps((__m256)x);
#elif defined(__x86_64__)
    return (Floats)_mm_sqrt_ps((__m128)x);
#elif defined(__aarch64__)
    return (Floats)vsqrtq_f32((float32x4_t)x);
#else
    for (int i = 0; i < kWidth; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

// Sum of the lanes, by halves.
static inline float total(Floats x) {
    float lanes[kWidth];
    __builtin_memcpy(lanes, &x, sizeof x);
    for (int half = kWidth / 2; half; half /= 2) {
        for (int i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

static inline float largest(Floats x) {
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float most = x[0];
    for (int i = 1; i < kWidth; ++i) most = x[i] > most ? x[i] : most;
    return most;
#endif
}

// eˣ within 1 ulp with fma (2 without); inf, 0 and NaN as they should be. Cody and Waite's
// reduction to |r| ≤ ln 2 / 2, coefficients of SLEEF's expf (Shibata and Petrogalli 2020).
static inline Floats exp(Floats x) {
    x = larger(all(-104.0f), smaller(all(89.0f), x));
    constexpr float kRound = 12582912.0f;  // 1.5 · 2²³: the sum has no room for a fraction
    const Floats shifted = fma(x, all(1.44269504088896341f), all(kRound));
    const Floats n = shifted - kRound;
    Floats r = fma(n, all(-0.693145751953125f), x);
    r = fma(n, all(-1.428606765330187045e-06f), r);
    Floats p = fma(r, all(0.000198527617612853646278381f), all(0.00139304355252534151077271f));
    p = fma(p, r, all(0.00833336077630519866943359f));
    p = fma(p, r, all(0.0416664853692054748535156f));
    p = fma(p, r, all(0.166666671633720397949219f));
    p = fma(p, r, all(0.5f));
    p = fma(p * r, r, r) + 1.0f;
#if defined(__AVX512F__)
    return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
    // 2ⁿ in two factors: n reaches −150, where one would not be a normal number.
    const Ints power = (Ints)shifted - (Ints)all(kRound);
    const Ints half = power >> 1;
    const Floats first = (Floats)((half + 127) << 23);
    const Floats second = (Floats)((power - half + 127) << 23);
    return p * first * second;
#endif
}

struct Sigmoid {
    Floats sigma, rest;
};

// σ(x) and 1 − σ(x), which keeps its digits where it is small.
static inline Sigmoid sigmoid(Floats x) {
    const Floats e = exp(-x), sigma = 1.0f / (1.0f + e);
    return {sigma, e > 1e30f ? all(1.0f) : e * sigma};
}

// Within 2 ulp. Below 0.625 by a polynomial (Chebyshev fit of (tanh x / x − 1)/x² over x², error
// 5e-9), else 1 − 2/(e²ˣ + 1).
static inline Floats tanh(Floats x) {
    const Floats square = x * x;
    Floats p = fma(square, all(0.0022958412f), all(-0.00834698f));
    p = fma(p, square, all(0.021769961f));
    p = fma(p, square, all(-0.053959407f));
    p = fma(p, square, all(0.13333304f));
    p = fma(p, square, all(-0.33333334f));
    const Floats near = fma(p * square, x, x);
    const Floats far = 1.0f - 2.0f / (exp(x + x) + 1.0f);
    return square < 0.390625f ? near : far;
}

// ---- items in memory

struct Float {
    using Item = float;
    using Packed = Floats;
    static inline Floats unpack(Packed x) { return x; }
    static inline Packed pack(Floats x) { return x; }
};

struct Bf16 {
    using Item = uint16_t;
    using Packed = Halves;
    static inline Floats unpack(Packed x) { return floats_of(widen(x) << 16); }
    // To nearest even. The bits of NaN are torch's.
    static inline Packed pack(Floats x) {
        const Bits bits = bits_of(x);
        const Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        const Bits quiet = Bits{} + 0x7fc0;
        return narrow(x != x ? quiet : rounded);
    }
};

struct Fp16 {
    using Item = uint16_t;
    using Packed = Halves;
#if defined(__AVX512F__)
    static inline Floats unpack(Packed x) { return (Floats)_mm512_cvtph_ps((__m256i)x); }
    static inline Packed pack(Floats x) {
        return (Packed)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
#elif defined(__AVX2__) && defined(__F16C__)
    static inline Floats unpack(Packed x) { return (Floats)_mm256_cvtph_ps((__m128i)x); }
    static inline Packed pack(Floats x) {
        return (Packed)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
#else
    // In integers. (Giesen 2012, "half_to_float_fast" and "float_to_half_fast3_rtne")
    static inline Floats unpack(Packed x) {
        const Bits half = widen(x);
        const Bits exponent = half & 0x7c00, sign = (half & 0x8000) << 16;
        const Bits moved = ((half & 0x7fff) << 13) + (112u << 23);
        const Bits special = moved + (112u << 23);  // inf, NaN
        const Bits tiny = bits_of(floats_of(moved + (1u << 23)) - floats_of(Bits{} + (113u << 23)));
        const Bits one = exponent == 0x7c00 ? special : moved;
        return floats_of((exponent == 0 ? tiny : one) | sign);
    }
    static inline Packed pack(Floats x) {
        const Bits bits = bits_of(x), sign = bits & 0x80000000u, f = bits ^ sign;
        const Bits magic = Bits{} + (126u << 23);  // adding it rounds to a multiple of 2⁻²⁴
        const Bits tiny = bits_of(floats_of(f) + floats_of(magic)) - magic;
        const Bits normal = (f - (112u << 23) + 0xfff + ((f >> 13) & 1)) >> 13;
        const Bits infinite = Bits{} + 0x7c00, quiet = (Bits{} + 0x7e00) | ((f >> 13) & 0x3ff);
        const Bits huge = f > 0x7f800000u ? quiet : infinite;
        const Bits finite = f < (113u << 23) ? tiny : normal;
        const Bits out = f >= (143u << 23) ? huge : finite;
        return narrow(out | (sign >> 16));
    }
#endif
};

// `count` items (at most kWidth), zeros behind them.
template <class T>
TRIMPOT_INLINE inline Floats load(const typename T::Item* at, int64_t count) {
    typename T::Packed packed = {};
    if (count == kWidth) {
        __builtin_memcpy(&packed, at, sizeof packed);
    } else {
        __builtin_memcpy(&packed, at, static_cast<uint64_t>(count) * sizeof *at);
    }
    return T::unpack(packed);
}

template <class T>
TRIMPOT_INLINE inline void store_packed(typename T::Item* at, typename T::Packed packed,
                                        int64_t count) {
    if (count == kWidth) {
        __builtin_memcpy(at, &packed, sizeof packed);
    } else {
        __builtin_memcpy(at, &packed, static_cast<uint64_t>(count) * sizeof *at);
    }
}

template <class T>
TRIMPOT_INLINE inline void store(typename T::Item* at, Floats x, int64_t count) {
    store_packed<T>(at, T::pack(x), count);
}

// ---- loops

// f(i, n) for n = kWidth items from i on, in turn, and for the rest. What f does to an item must
// not depend on where in a vector it stands: then no split over threads changes a bit.
template <class F>
TRIMPOT_INLINE inline void sweep(int64_t count, F f) {
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) f(i, static_cast<int64_t>(kWidth));
    if (i < count) f(i, count - i);
}

// Sum over f(i, n, sum), which gives the sum with n more items in it. Four sums in turn hide the
// latency of the addition; loads past the end give zeros.
template <class F>
TRIMPOT_INLINE inline float fold(int64_t count, F f) {
    Floats a = {}, b = {}, c = {}, d = {};
    int64_t i = 0;
    for (; i + 4 * kWidth <= count; i += 4 * kWidth) {
        a = f(i, static_cast<int64_t>(kWidth), a);
        b = f(i + kWidth, static_cast<int64_t>(kWidth), b);
        c = f(i + 2 * kWidth, static_cast<int64_t>(kWidth), c);
        d = f(i + 3 * kWidth, static_cast<int64_t>(kWidth), d);
    }
    for (; i + kWidth <= count; i += kWidth) a = f(i, static_cast<int64_t>(kWidth), a);
    if (i < count) b = f(i, count - i, b);
    return total((a + b) + (c + d));
}

// f(Float()), f(Bf16()) or f(Fp16()).
template <class F>
inline void with_type(Type type, F f) {
    switch (type) {
        case Type::kFloat:
            return f(Float());
        case Type::kBf16:
            return f(Bf16());
        case Type::kFp16:
            return f(Fp16());
    }
}

}  // namespace
}  // namespace TRIMPOT_ISA
}  // namespace trimpot
