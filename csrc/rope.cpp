// Compiled once for each instruction set, see vec.h. A token's row of the table serves all its
// heads, of q and of k.
#include "rope.h"

#include "partials.h"
#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

struct Angles {
    alignas(64) float cos[kRopeWidest / 2];
    alignas(64) float sin[kRopeWidest / 2];
};

// The angles of one token; backward rotates the other way.
inline void read_angles(const Rope& a, int64_t b, int64_t t, bool back, Angles* out) {
    with_type(a.angles.type, [&](auto type) {
        using T = decltype(type);
        using Item = typename T::Item;
        const Item* cos = static_cast<const Item*>(a.angles.cos) + b * a.angles.cos_batch +
                          t * a.angles.cos_token;
        const Item* sin = static_cast<const Item*>(a.angles.sin) + b * a.angles.sin_batch +
                          t * a.angles.sin_token;
        sweep(a.half, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
            const Floats s = load<T>(sin + i, n);
            store<Float>(out->cos + i, load<T>(cos + i, n), n);
            store<Float>(out->sin + i, back ? -s : s, n);
        });
    });
}

// The row read(i, n), rotated → write(i, value, n).
template <class Read, class Write>
TRIMPOT_INLINE inline void rotate(const Rope& a, const Angles& angles, Read read, Write write) {
    sweep(a.half, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        const Floats x1 = read(i, n), x2 = read(a.half + i, n);
        const Floats cos = load<Float>(angles.cos + i, n), sin = load<Float>(angles.sin + i, n);
        write(i, fma(x1, cos, -(x2 * sin)), n);
        write(a.half + i, fma(x2, cos, x1 * sin), n);
    });
    sweep(a.width - 2 * a.half, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        write(2 * a.half + i, read(2 * a.half + i, n), n);
    });
}

template <class T>
const typename T::Item* row_of(const Heads& x, int64_t b, int64_t t, int64_t h) {
    return static_cast<const typename T::Item*>(x.data) + b * x.batch + t * x.token + h * x.head;
}

template <class T>
void forward_token(const Rope& a, const RopeSide& side, const Angles& angles, int64_t b,
                   int64_t t) {
    using Item = typename T::Item;
    for (int64_t h = 0; h < side.heads; ++h) {
        const int64_t at = (b * a.length + t) * side.heads + h;
        const Item* x = row_of<T>(side.in, b, t, h);
        Item* y = static_cast<Item*>(side.out) + at * a.width;
        const auto write = [&](int64_t i, Floats v, int64_t n)
                               TRIMPOT_INLINE { store<T>(y + i, v, n); };
        if (!side.weight) {
            rotate(
                a, angles, [&](int64_t i, int64_t n) TRIMPOT_INLINE { return load<T>(x + i, n); },
                write);
            continue;
        }
        const float squares = fold(a.width, [&](int64_t i, int64_t n, Floats sum) TRIMPOT_INLINE {
            const Floats v = load<T>(x + i, n);
            return fma(v, v, sum);
        });
        const float rstd = 1.0f / __builtin_sqrtf(squares / static_cast<float>(a.width) + a.eps);
        side.rstd[at] = rstd;
        rotate(
            a, angles,
            [&](int64_t i, int64_t n) TRIMPOT_INLINE {
                return load<T>(x + i, n) * rstd * (load<Float>(side.weight + i, n) + a.offset);
            },
            write);
    }
}

// Back through the norm of one head: dn → dx; partial += dn·x̂ where there is one.
template <class T>
void norm_backward(const Rope& a, const RopeSide& side, const float* dn, const typename T::Item* x,
                   float rstd, typename T::Item* dx, float* partial) {
    const float dot = fold(a.width, [&](int64_t i, int64_t n, Floats sum) TRIMPOT_INLINE {
        const Floats g = load<Float>(dn + i, n) * (load<Float>(side.weight + i, n) + a.offset);
        return fma(g, load<T>(x + i, n) * rstd, sum);
    });
    const float mean = dot / static_cast<float>(a.width);
    sweep(a.width, [&](int64_t i, int64_t n) TRIMPOT_INLINE {
        const Floats d = load<Float>(dn + i, n), normed = load<T>(x + i, n) * rstd;
        const Floats g = d * (load<Float>(side.weight + i, n) + a.offset);
        store<T>(dx + i, (g - normed * mean) * rstd, n);
        if (partial) store<Float>(partial + i, load<Float>(partial + i, n) + d * normed, n);
    });
}

template <class T>
void backward_token(const Rope& a, const RopeSide& side, const Angles& angles, int64_t b, int64_t t,
                    float* partial) {
    using Item = typename T::Item;
    alignas(64) float dn[kRopeWidest];
    for (int64_t h = 0; h < side.heads; ++h) {
        const int64_t at = (b * a.length + t) * side.heads + h;
        const Item* dy = row_of<T>(side.in, b, t, h);
        Item* dx = static_cast<Item*>(side.out) + at * a.width;
        const auto read = [&](int64_t i, int64_t n) TRIMPOT_INLINE { return load<T>(dy + i, n); };
        if (!side.weight) {
            rotate(a, angles, read,
                   [&](int64_t i, Floats v, int64_t n) TRIMPOT_INLINE { store<T>(dx + i, v, n); });
            continue;
        }
        rotate(a, angles, read,
               [&](int64_t i, Floats v, int64_t n) TRIMPOT_INLINE { store<Float>(dn + i, v, n); });
        norm_backward<T>(a, side, dn, row_of<T>(side.x, b, t, h), side.rstd[at], dx, partial);
    }
}

int64_t items(const Rope& a) {
    return a.batch * a.length * (a.sides[0].heads + a.sides[1].heads) * a.width;
}

template <class T>
void forward_typed(const Rope& a) {
#pragma omp parallel for schedule(static) if (items(a) > kSerial)
    for (int64_t token = 0; token < a.batch * a.length; ++token) {
        const int64_t b = token / a.length, t = token % a.length;
        Angles angles;
        read_angles(a, b, t, false, &angles);
        for (const RopeSide& side : a.sides) forward_token<T>(a, side, angles, b, t);
    }
}

template <class T>
void backward_typed(const Rope& a) {
#pragma omp parallel for schedule(static) if (items(a) > kSerial)
    for (int64_t block = 0; block < a.blocks; ++block) {
        float* partials[2] = {};
        for (int i = 0; i < 2; ++i) {
            if (!a.sides[i].partials) continue;
            partials[i] = a.sides[i].partials + block * a.width;
            clear(partials[i], a.width);
        }
        const Span tokens = span_of(block, a.blocks, a.batch * a.length);
        for (int64_t token = tokens.first; token < tokens.last; ++token) {
            const int64_t b = token / a.length, t = token % a.length;
            Angles angles;
            read_angles(a, b, t, true, &angles);
            for (int i = 0; i < 2; ++i) {
                backward_token<T>(a, a.sides[i], angles, b, t, partials[i]);
            }
        }
    }
    for (const RopeSide& side : a.sides) {
        if (side.partials) sum_partials(side.partials, a.blocks, a.width, side.dw);
    }
}

void forward(const Rope& a) {
    with_type(a.type, [&](auto type) { forward_typed<decltype(type)>(a); });
}

void backward(const Rope& a) {
    with_type(a.type, [&](auto type) { backward_typed<decltype(type)>(a); });
}

}  // namespace

extern const RopeTable rope;
const RopeTable rope{forward, backward};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
