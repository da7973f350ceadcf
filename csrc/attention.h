// Causal attention over packed documents; formulas in kernels/ops/varlen_attention.py.
#pragma once

#include <cstdint>

#include "type.h"

namespace trimpot {

constexpr std::int64_t kAttentionKeys = 224;     // of a block: 7 tiles of 32 columns, 16 of 14 rows
constexpr std::int64_t kAttentionQueries = 112;  // of a block in backward

// [T, heads, D], items of D side by side; strides in items.
struct TokenHeads {
    const void* data;
    std::int64_t token, head;
};

// What one thread does at a time: one document, and in forward `rows` queries from `begin` on.
struct AttentionTask {
    std::int64_t first, length;  // the document's tokens
    std::int64_t head;  // of keys; in backward of queries where every head has a slot of its own
    std::int64_t begin, rows;
};

struct Attention {
    Type type;
    std::int64_t tokens, heads, kv_heads, width;  // T, N, G, D
    float scale;
    std::int64_t window;  // 0: none
    float softcap;        // 0: none
    TokenHeads q, k, v;
    const AttentionTask* tasks;
    std::int64_t task_count;
    int threads;
    float* scratch;        // `scratch_floats` for each thread, 64-byte aligned
    std::int64_t longest;  // most tokens of a document (backward), most rows of a task (forward)
    void* o;               // forward writes [T, N, D] without gaps
    float* lse;            // [N, T]
    TokenHeads o_in, d_o;  // backward
    void *dq, *dk, *dv;    // without gaps
    float* sums;           // [2][slots][T][D]: dk and dv before the last sum and rounding
    std::int64_t slots;    // G, or N: then every query head is a task of its own
};

struct AttentionTable {
    std::int64_t (*scratch_floats)(const Attention&, bool back);
    void (*forward)(const Attention&);
    void (*backward)(const Attention&);
};

}  // namespace trimpot
