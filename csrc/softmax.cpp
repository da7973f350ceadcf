// Compiled once for each instruction set, see vec.h. A row (V floats) stays in the L2 cache for
// its three passes: largest, sum of exponentials, gradient.
#include "softmax.h"

#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

constexpr int64_t kBlock = 4096;  // items of a partial sum: 4 kWidth lanes of 64 to 256 terms

// With a soft cap c a row holds t = tanh(z/c) from the first pass on, so that 1 − t² is that of the
// tanh and not of a rounded product; its logits are c·t.
template <bool kCap>
inline Floats logit(Floats x, float cap) {
    return kCap ? x * cap : x;
}

// Largest logit. NaN may be passed over: it shows in the sum.
template <bool kCap>
float cap_and_largest(float* z, int64_t columns, float cap) {
    const float infinity = __builtin_inff();
    Floats most = all(-infinity);
    sweep(columns, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        Floats v = load<Float>(z + i, n);
        if constexpr (kCap) {
            v = tanh(v / cap);
            store<Float>(z + i, v, n);
        }
        for (int64_t lane = n; lane < kWidth; ++lane) v[lane] = -infinity;
        most = larger(v, most);
    });
    return kCap ? largest(most) * cap : largest(most);
}

// Σ e^(z − most); kKeep: the exponentials take the place of z.
template <bool kCap, bool kKeep>
float sum_of_exp(float* z, int64_t columns, float most, float cap) {
    float sum = 0;
    for (int64_t from = 0; from < columns; from += kBlock) {
        float* at = z + from;
        const int64_t count = least(kBlock, columns - from);
        sum += fold(count, [&](int64_t i, int64_t n, Floats part) TRIMPOT_INLINE {
            Floats e = exp(logit<kCap>(load<Float>(at + i, n), cap) - most);
            if constexpr (kKeep) store<Float>(at + i, e, n);
            for (int64_t lane = n; lane < kWidth; ++lane) e[lane] = 0;
            return part + e;
        });
    }
    return sum;
}

float sum_of(const float* z, int64_t columns) {
    float sum = 0;
    for (int64_t from = 0; from < columns; from += kBlock) {
        const int64_t count = least(kBlock, columns - from);
        sum += fold(count, [&](int64_t i, int64_t n, Floats part)
                               TRIMPOT_INLINE { return part + load<Float>(z + from + i, n); });
    }
    return sum;
}

void fill(float* z, int64_t columns, float value) {
    sweep(columns,
          [&](int64_t i, int64_t n) TRIMPOT_INLINE { store<Float>(z + i, all(value), n); });
}

// z holds e^(z − most) → e^(z − most)·scale − less.
void gradient(float* z, int64_t columns, float scale, float less) {
    sweep(columns, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        store<Float>(z + i, load<Float>(z + i, n) * scale - less, n);
    });
}

// The same where z holds t, times 1 − t².
void capped_gradient(float* z, int64_t columns, float most, float scale, float less, float cap) {
    sweep(columns, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        const Floats t = load<Float>(z + i, n);
        store<Float>(z + i, (exp(t * cap - most) * scale - less) * (1.0f - t * t), n);
    });
}

template <bool kCap, bool kGradient>
void one_row(const SoftmaxLoss& a, int64_t row) {
    float* z = a.logits + row * a.stride;
    const int64_t label = a.labels[row];
    const bool ignored = label == a.ignore_index;
    const bool inside = !ignored && label >= 0 && label < a.columns;
    const float w = a.weights ? a.weights[row] : 1.0f, count = static_cast<float>(a.columns);
    const float smooth = a.label_smoothing, nan = __builtin_nanf("");

    const float most = cap_and_largest<kCap>(z, a.columns, a.softcap);
    const float kept = inside ? z[label] : nan, at_label = kCap ? kept * a.softcap : kept;
    float mean = smooth != 0 ? sum_of(z, a.columns) / count : 0.0f;
    if constexpr (kCap) mean *= a.softcap;
    constexpr bool kKeep = kGradient && !kCap;
    const float sum = sum_of_exp<kCap, kKeep>(z, a.columns, most, a.softcap);
    const float logarithm = __builtin_logf(sum), lse = most + logarithm;
    a.lse[row] = lse;
    if (ignored) {
        a.loss[row] = 0;
        if constexpr (kGradient) fill(z, a.columns, 0);
        return;
    }
    // lse − z_y as (most − z_y) + log: a likely label's loss keeps its digits.
    float loss = (most - at_label) + logarithm;
    if (smooth != 0) loss = (1.0f - smooth) * loss + smooth * (lse - mean);
    a.loss[row] = w * (loss + a.z_loss * lse * lse);
    if constexpr (kGradient) {
        if (!inside) return fill(z, a.columns, nan);
        // The label's in double: p − 1 of a likely one would be little but rounding.
        const double factor = 1 + 2.0 * a.z_loss * lse, even = double{smooth} / a.columns;
        double slope = 1;
        float exponential = z[label];
        const auto scale = static_cast<float>(w * factor / sum);
        const auto less = static_cast<float>(w * even);
        if constexpr (kCap) {
            exponential = exp(all(at_label - most))[0];
            slope = 1 - double{kept} * kept;
            capped_gradient(z, a.columns, most, scale, less, a.softcap);
        } else {
            gradient(z, a.columns, scale, less);
        }
        const double miss = exponential * factor / sum - even - (1 - double{smooth});
        z[label] = static_cast<float>(w * miss * slope);
    }
}

template <bool kCap, bool kGradient>
void all_rows(const SoftmaxLoss& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.columns > kSerial)
    for (int64_t row = 0; row < a.rows; ++row) one_row<kCap, kGradient>(a, row);
}

void loss(const SoftmaxLoss& a) {
    if (a.softcap > 0) {
        a.gradient ? all_rows<true, true>(a) : all_rows<true, false>(a);
    } else {
        a.gradient ? all_rows<false, true>(a) : all_rows<false, false>(a);
    }
}

}  // namespace

extern const SoftmaxTable softmax;
const SoftmaxTable softmax{loss};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
