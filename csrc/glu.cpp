// Compiled once for each instruction set, see vec.h.
#include "glu.h"

#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

constexpr float kScale = 1.5957691216057308f;  // 2·√(2/π)
constexpr float kCubic = 0.044715f;
constexpr int64_t kBlock = 4096;  // items that a thread takes at once

// v(g) and v′(g), with which the activation is g·σ(v(g)).
template <bool kGelu>
inline Floats argument(Floats g) {
    if constexpr (!kGelu) return g;
    return kScale * g * fma(kCubic * g, g, all(1.0f));
}

template <bool kGelu>
inline Floats slope(Floats g) {
    if constexpr (!kGelu) return all(1.0f);
    return kScale * fma(3.0f * kCubic * g, g, all(1.0f));
}

// f(row, column, count) over blocks of rows.
template <class F>
inline void over_blocks(int64_t rows, int64_t columns, F f) {
    const int64_t blocks = (columns + kBlock - 1) / kBlock;
#pragma omp parallel for schedule(static) if (rows * columns > kSerial)
    for (int64_t task = 0; task < rows * blocks; ++task) {
        const int64_t column = task % blocks * kBlock;
        f(task / blocks, column, least(kBlock, columns - column));
    }
}

template <class T, bool kGelu>
void forward_typed(const GluForward& a) {
    using Item = typename T::Item;
    over_blocks(a.rows, a.columns, [&](int64_t row, int64_t column, int64_t count) {
        const Item* gate = static_cast<const Item*>(a.gate) + row * a.gate_stride + column;
        const Item* up = static_cast<const Item*>(a.up) + row * a.up_stride + column;
        Item* y = static_cast<Item*>(a.y) + row * a.columns + column;
        sweep(count, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
            const Floats g = load<T>(gate + i, n);
            const Floats active = g / (1.0f + exp(-argument<kGelu>(g)));
            store<T>(y + i, active * load<T>(up + i, n), n);
        });
    });
}

template <class T, bool kGelu>
void backward_typed(const GluBackward& a) {
    using Item = typename T::Item;
    over_blocks(a.rows, a.columns, [&](int64_t row, int64_t column, int64_t count) {
        const Item* dy = static_cast<const Item*>(a.dy) + row * a.dy_stride + column;
        const Item* gate = static_cast<const Item*>(a.gate) + row * a.gate_stride + column;
        const Item* up = static_cast<const Item*>(a.up) + row * a.up_stride + column;
        Item* dgate = static_cast<Item*>(a.dgate) + row * a.columns + column;
        Item* dup = static_cast<Item*>(a.dup) + row * a.columns + column;
        sweep(count, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
            const Floats d = load<T>(dy + i, n), g = load<T>(gate + i, n);
            const auto [sigma, rest] = sigmoid(argument<kGelu>(g));
            store<T>(dup + i, d * (g * sigma), n);
            const Floats change = sigma * fma(g * rest, slope<kGelu>(g), all(1.0f));
            store<T>(dgate + i, d * load<T>(up + i, n) * change, n);
        });
    });
}

void forward(const GluForward& a) {
    with_type(a.type, [&](auto type) {
        using T = decltype(type);
        a.gelu ? forward_typed<T, true>(a) : forward_typed<T, false>(a);
    });
}

void backward(const GluBackward& a) {
    with_type(a.type, [&](auto type) {
        using T = decltype(type);
        a.gelu ? backward_typed<T, true>(a) : backward_typed<T, false>(a);
    });
}

}  // namespace

extern const GluTable glu;
const GluTable glu{forward, backward};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
