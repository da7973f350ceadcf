// Cross-entropy of logits, and its gradient in their place.
//
//     z ← c·tanh(z/c) where there is a soft cap c;  lse = log Σ_v e^z
//     ℓ = (1 − ls)·(lse − z_y) + ls·(lse − mean_v z),  loss = w·(ℓ + z_loss·lse²)
//     dz = w·(softmax(z)·(1 + 2·z_loss·lse) − (1 − ls)·1_y − ls/V)·(1 − (z/c)²)
#pragma once

#include <cstdint>

namespace trimpot {

struct SoftmaxLoss {
    float* logits;  // [rows, columns]; overwritten
    std::int64_t stride, rows, columns;
    const std::int64_t* labels;  // neither ignore_index nor within 0 … columns − 1: NaN comes out
    const float* weights;        // [rows] w, or null: ones
    std::int64_t ignore_index;   // such a row's loss and gradient are 0
    float label_smoothing, z_loss, softcap;  // softcap 0: none
    float* loss;                             // [rows]
    float* lse;                              // [rows], of ignored rows too
    bool gradient;                           // else the logits stay, or are tanh(z/c)
};

struct SoftmaxTable {
    void (*loss)(const SoftmaxLoss&);
};

}  // namespace trimpot
