// Compiled once for each instruction set, see vec.h. A row is read from memory once; its second
// pass finds it in the cache.
#include "norm.h"

#include "partials.h"
#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

template <class T>
float add_and_square(const typename T::Item* x, const typename T::Item* residual,
                     typename T::Item* s, int64_t columns) {
    if (!residual) {
        return fold(columns, [&](int64_t i, int64_t n, Floats sum) TRIMPOT_INLINE {
            const Floats v = load<T>(x + i, n);
            return fma(v, v, sum);
        });
    }
    return fold(columns, [&](int64_t i, int64_t n, Floats sum) TRIMPOT_INLINE {
        const typename T::Packed packed = T::pack(load<T>(x + i, n) + load<T>(residual + i, n));
        store_packed<T>(s + i, packed, n);
        const Floats v = T::unpack(packed);
        return fma(v, v, sum);
    });
}

template <class T>
void forward_typed(const NormForward& a) {
    using Item = typename T::Item;
    const int64_t columns = a.columns;
#pragma omp parallel for schedule(static) if (a.rows * columns > kSerial)
    for (int64_t row = 0; row < a.rows; ++row) {
        const Item* x = static_cast<const Item*>(a.x) + row * a.x_stride;
        const Item* residual = nullptr;
        Item* s = nullptr;
        if (a.residual) {
            residual = static_cast<const Item*>(a.residual) + row * a.residual_stride;
            s = static_cast<Item*>(a.s) + row * columns;
        }
        const float squares = add_and_square<T>(x, residual, s, columns);
        const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(columns) + a.eps);
        a.rstd[row] = rstd;
        const Item* normed = residual ? s : x;
        Item* y = static_cast<Item*>(a.y) + row * columns;
        sweep(columns, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
            const Floats weight = load<Float>(a.weight + i, n) + a.offset;
            store<T>(y + i, load<T>(normed + i, n) * rstd * weight, n);
        });
    }
}

// One row; partial[j] += dy·ŝ where dw is wanted.
template <class T, bool kSum, bool kAdd>
void backward_row(const NormBackward& a, int64_t row, float* partial) {
    using Item = typename T::Item;
    const Item* dy = static_cast<const Item*>(a.dy) + row * a.dy_stride;
    const Item* ds = kAdd ? static_cast<const Item*>(a.ds) + row * a.ds_stride : nullptr;
    const Item* s = static_cast<const Item*>(a.s) + row * a.s_stride;
    Item* dx = static_cast<Item*>(a.dx) + row * a.columns;
    const float rstd = a.rstd[row];
    const float dot = fold(a.columns, [&](int64_t i, int64_t n, Floats sum) TRIMPOT_INLINE {
        const Floats g = load<T>(dy + i, n) * (load<Float>(a.weight + i, n) + a.offset);
        return fma(g, load<T>(s + i, n) * rstd, sum);
    });
    const float mean = dot / static_cast<float>(a.columns);
    sweep(a.columns, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        const Floats d = load<T>(dy + i, n), normed = load<T>(s + i, n) * rstd;
        const Floats g = d * (load<Float>(a.weight + i, n) + a.offset);
        Floats out = (g - normed * mean) * rstd;
        if constexpr (kAdd) out += load<T>(ds + i, n);
        store<T>(dx + i, out, n);
        if constexpr (kSum) {
            store<Float>(partial + i, load<Float>(partial + i, n) + d * normed, n);
        }
    });
}

template <class T, bool kSum, bool kAdd>
void backward_typed(const NormBackward& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.columns > kSerial)
    for (int64_t block = 0; block < a.blocks; ++block) {
        float* partial = kSum ? a.partials + block * a.columns : nullptr;
        if constexpr (kSum) clear(partial, a.columns);
        const Span rows = span_of(block, a.blocks, a.rows);
        for (int64_t row = rows.first; row < rows.last; ++row) {
            backward_row<T, kSum, kAdd>(a, row, partial);
        }
    }
    if constexpr (kSum) sum_partials(a.partials, a.blocks, a.columns, a.dw);
}

void forward(const NormForward& a) {
    with_type(a.type, [&](auto type) { forward_typed<decltype(type)>(a); });
}

void backward(const NormBackward& a) {
    with_type(a.type, [&](auto type) {
        using T = decltype(type);
        if (a.partials) {
            a.ds ? backward_typed<T, true, true>(a) : backward_typed<T, true, false>(a);
        } else {
            a.ds ? backward_typed<T, false, true>(a) : backward_typed<T, false, false>(a);
        }
    });
}

}  // namespace

extern const NormTable norm;
const NormTable norm{forward, backward};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
