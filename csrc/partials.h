// Sums over rows that do not depend on the number of threads: fixed blocks of rows, added in order.
// For sources that are compiled once for each instruction set.
#pragma once

#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

struct Span {
    int64_t first, last;
};

// Rows of block `block` of `blocks`.
static inline Span span_of(int64_t block, int64_t blocks, int64_t rows) {
    const int64_t each = (rows + blocks - 1) / blocks;
    return {least(block * each, rows), least((block + 1) * each, rows)};
}

// out[j] = Σ_b partials[b][j]
static inline void sum_partials(const float* partials, int64_t blocks, int64_t columns,
                                float* out) {
#pragma omp parallel for schedule(static) if (blocks * columns > kSerial)
    for (int64_t from = 0; from < columns; from += 4 * kWidth) {
        sweep(least(4 * kWidth, columns - from), [&](int64_t i, int64_t n) TRIMPOT_INLINE {
            Floats sum = {};
            for (int64_t b = 0; b < blocks; ++b) {
                sum += load<Float>(partials + b * columns + from + i, n);
            }
            store<Float>(out + from + i, sum, n);
        });
    }
}

static inline void clear(float* at, int64_t count) {
    __builtin_memset(at, 0, static_cast<uint64_t>(count) * sizeof *at);
}

}  // namespace
}  // namespace TRIMPOT_ISA
}  // namespace trimpot
