// Compiled once for each instruction set, see vec.h. Each operation rounds by itself, in the
// order of the definition, so that all backends give the same bits.
#include "optim.h"

#include "vec.h"

namespace trimpot {
namespace TRIMPOT_ISA {
namespace {

constexpr int64_t kBlock = 8192;  // parameters that a thread takes at once

// C: the copy's type.
template <class G, class C>
void adamw_typed(const AdamW& a) {
#pragma omp parallel for schedule(static) if (a.count > kSerial)
    for (int64_t from = 0; from < a.count; from += kBlock) {
        float* param = a.param + from;
        float* exp_avg = a.exp_avg + from;
        float* exp_avg_sq = a.exp_avg_sq + from;
        const auto* grad = static_cast<const typename G::Item*>(a.grad) + from;
        auto* copy = a.copy ? static_cast<typename C::Item*>(a.copy) + from : nullptr;
        sweep(least(kBlock, a.count - from), [&](int64_t i, int64_t n) TRIMPOT_INLINE {
            const Floats g = load<G>(grad + i, n) * a.grad_scale;
            const Floats m = load<Float>(exp_avg + i, n) * a.beta1 + g * a.rest1;
            const Floats v = load<Float>(exp_avg_sq + i, n) * a.beta2 + g * a.rest2 * g;
            const Floats denominator = root(v) / a.correction + a.eps;
            const Floats p = load<Float>(param + i, n) * a.keep - m * a.rate / denominator;
            store<Float>(exp_avg + i, m, n);
            store<Float>(exp_avg_sq + i, v, n);
            store<Float>(param + i, p, n);
            if (copy) store<C>(copy + i, p, n);
        });
    }
}

void adamw(const AdamW& a) {
    with_type(a.grad_type, [&](auto grad) {
        using G = decltype(grad);
        a.copy_type == Type::kFp16 ? adamw_typed<G, Fp16>(a) : adamw_typed<G, Bf16>(a);
    });
}

}  // namespace

extern const OptimTable optim;
const OptimTable optim{adamw};

}  // namespace TRIMPOT_ISA
}  // namespace trimpot
