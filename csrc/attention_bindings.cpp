// Attention for Python; addresses as in elementwise_bindings.cpp. What threads share out is listed
// here, and their memory taken, where an exception may still leave.
#include <omp.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "gemm.h"
#include "isa.h"
#include "split.h"

namespace py = pybind11;

namespace trimpot {
#ifdef TRIMPOT_AMX
namespace amx {
extern const AttentionTable attention;
}
#endif
namespace {

using Address = std::uintptr_t;
using Int = std::int64_t;
using Tokens = std::tuple<Address, Int, Int>;  // address, strides of token and head
using Sizes = std::array<Int, 4>;              // tokens, heads, heads of keys, width
using Cuts = std::vector<Int>;

constexpr Int kSerialWork =
    1 << 18;  // products of items; below them threads cost more than they do

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

TokenHeads heads_of(const Tokens& x) {
    const auto& [data, token, head] = x;
    return {at<const void>(data), token, head};
}

// Products in pairs of bfloat16 on tiles, or in float32.
const AttentionTable& table_of(bool tiles) {
    if (!tiles) return attention_table();
#ifdef TRIMPOT_AMX
    if (split_table()) return amx::attention;
#endif
    throw py::value_error("this processor has no tiles of bfloat16");
}

struct Free {
    void operator()(float* memory) const { std::free(memory); }
};
using Memory = std::unique_ptr<float, Free>;

Memory floats(Int count) {
    const auto bytes = static_cast<std::size_t>((count + 16) / 16 * 64);
    auto* memory = static_cast<float*>(std::aligned_alloc(64, bytes));
    if (!memory) throw std::bad_alloc();
    return Memory(memory);
}

Attention call_of(int type, const Sizes& sizes, const Cuts& cuts, float scale, Int window,
                  float softcap, const Tokens& q, const Tokens& k, const Tokens& v) {
    if (type < 0 || type > 2) throw py::value_error("a type is 0, 1 or 2");
    if (cuts.empty() || cuts.front() || !std::is_sorted(cuts.begin(), cuts.end()) ||
        cuts.back() > sizes[0]) {
        throw py::value_error("cuts must rise from 0 to the number of tokens at most");
    }
    if (sizes[2] < 1 || sizes[3] < 1 || sizes[1] % sizes[2]) {
        throw py::value_error("heads must divide over heads of keys");
    }
    Attention call{};
    call.type = static_cast<Type>(type);
    call.tokens = sizes[0];
    call.heads = sizes[1];
    call.kv_heads = sizes[2];
    call.width = sizes[3];
    call.scale = scale;
    call.window = window;
    call.softcap = softcap;
    call.q = heads_of(q);
    call.k = heads_of(k);
    call.v = heads_of(v);
    return call;
}

Int pairs(const AttentionTask& task) { return task.rows * (2 * task.begin + task.rows); }

// The longest first: the last to end are short then. Threads follow from the work.
void share_out(Attention* call, std::vector<AttentionTask>* tasks) {
    std::stable_sort(tasks->begin(), tasks->end(),
                     [](const auto& a, const auto& b) { return pairs(a) > pairs(b); });
    Int work = 0;
    for (const AttentionTask& task : *tasks) work += pairs(task) * call->width;
    call->tasks = tasks->data();
    call->task_count = static_cast<Int>(tasks->size());
    const Int most = std::min<Int>(omp_get_max_threads(), call->task_count);
    call->threads = work < kSerialWork ? 1 : static_cast<int>(std::max<Int>(most, 1));
}

// Queries of a task for each head of its group: enough that packing their keys is 3 % of the work,
// few enough that the rows of a whole group stay in the L2 cache. Tiles are done with a key sooner;
// no bit depends on how many they take at a time.
Int task_rows(const Attention& call, bool tiles, Int longest) {
    const Int group = call.heads / call.kv_heads;
    if (!tiles) {
        return std::clamp<Int>(448 / group / kTileRows * kTileRows, 2 * kTileRows, 16 * kTileRows);
    }
    Int rows = std::clamp<Int>(2048 / group / 32 * 32, 32, 1024);
    while (rows > 64 && longest / rows * call.kv_heads < 4 * omp_get_max_threads()) rows -= 32;
    return rows;
}

void forward(bool tiles, int type, const Sizes& sizes, const Cuts& cuts, float scale, Int window,
             float softcap, const Tokens& q, const Tokens& k, const Tokens& v, Address o,
             Address lse) {
    Attention call = call_of(type, sizes, cuts, scale, window, softcap, q, k, v);
    call.o = at<void>(o);
    call.lse = at<float>(lse);
    const AttentionTable& table = table_of(tiles);
    py::gil_scoped_release released;
    Int longest = 0;
    for (std::size_t d = 1; d < cuts.size(); ++d)
        longest = std::max(longest, cuts[d] - cuts[d - 1]);
    const Int rows = task_rows(call, tiles, longest);
    std::vector<AttentionTask> tasks;
    for (std::size_t d = 1; d < cuts.size(); ++d) {
        const Int first = cuts[d - 1], length = cuts[d] - first;
        for (Int begin = 0; begin < length; begin += rows) {
            for (Int head = 0; head < call.kv_heads; ++head) {
                tasks.push_back({first, length, head, begin, std::min(rows, length - begin)});
            }
        }
    }
    call.longest = rows;
    share_out(&call, &tasks);
    const Memory scratch = floats(table.scratch_floats(call, false) * call.threads);
    call.scratch = scratch.get();
    table.forward(call);
}

void backward(bool tiles, int type, const Sizes& sizes, const Cuts& cuts, float scale, Int window,
              float softcap, const Tokens& q, const Tokens& k, const Tokens& v, const Tokens& o,
              const Tokens& d_o, Address lse, Address dq, Address dk, Address dv) {
    Attention call = call_of(type, sizes, cuts, scale, window, softcap, q, k, v);
    call.o_in = heads_of(o);
    call.d_o = heads_of(d_o);
    call.lse = at<float>(lse);
    call.dq = at<void>(dq);
    call.dk = at<void>(dk);
    call.dv = at<void>(dv);
    const AttentionTable& table = table_of(tiles);
    py::gil_scoped_release released;
    // A head of keys at a time needs least memory; where that leaves threads idle, a slot and a
    // task for each head of queries.
    const Int documents = static_cast<Int>(cuts.size()) - 1, threads = omp_get_max_threads();
    const bool few = threads > 1 && documents * call.kv_heads < 4 * threads;
    call.slots = few ? call.heads : call.kv_heads;
    std::vector<AttentionTask> tasks;
    for (std::size_t d = 1; d < cuts.size(); ++d) {
        const Int first = cuts[d - 1], length = cuts[d] - first;
        call.longest = std::max(call.longest, length);
        for (Int head = 0; head < call.slots && length; ++head) {
            tasks.push_back({first, length, head, 0, length});
        }
    }
    share_out(&call, &tasks);
    const Memory scratch = floats(table.scratch_floats(call, true) * call.threads);
    const Memory sums = floats(2 * call.slots * call.tokens * call.width);
    call.scratch = scratch.get();
    call.sums = sums.get();
    table.backward(call);
}

}  // namespace

void bind_attention(py::module_& m) {
    m.def("attention_forward", &forward);
    m.def("attention_backward", &backward);
}

}  // namespace trimpot
