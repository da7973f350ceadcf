// The matrix products for Python. Addresses come as integers (torch's data_ptr()): a call costs
// a microsecond, and kernels/cpp/gemm.py checks device, dtype, shape and stride before it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "bindings.h"
#include "bytes.h"
#include "gemm.h"
#include "split.h"

namespace py = pybind11;

namespace trimpot {
namespace {

using Address = std::uintptr_t;
using Int = std::int64_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Update update_of(Address left, Int stride, Address right, Int rank) {
    return {at<const float>(left), stride, at<const float>(right), rank};
}

Matrix matrix_of(Address data, Int stride, bool bf16) {
    return {at<const void>(data), stride, bf16};
}

using Weight = std::tuple<Address, Int, bool>;

bool pack(const std::vector<Pack>& packs, const std::vector<Weight>& weights) {
    if (packs.empty() || packs.size() != weights.size()) {
        throw py::value_error("as many packs as weights are wanted, and one at least");
    }
    std::vector<Matrix> matrices;
    for (const auto& [data, stride, bf16] : weights) {
        matrices.push_back(matrix_of(data, stride, bf16));
    }
    return gemm_table().pack(packs.data(), matrices.data(), static_cast<int>(packs.size()));
}

const SplitTable& tiles() {
    const SplitTable* table = split_table();
    if (!table) throw std::runtime_error("this processor has no AMX tiles of bfloat16");
    return *table;
}

void bind_split(py::module_& m) {
    using Free = py::call_guard<py::gil_scoped_release>;
    py::class_<SplitPack>(m, "SplitPack")
        .def(py::init(
            [](Int rows, Int depth, Int panels, Int block, Int blocks, Address high, Address low) {
                return SplitPack{rows,
                                 depth,
                                 panels,
                                 block,
                                 blocks,
                                 at<std::uint16_t>(high),
                                 at<std::uint16_t>(low)};
            }));
    py::class_<SplitRows>(m, "SplitRows")
        .def(py::init([](Int rows, Int padded, Int block, Int blocks, Address high, Address low) {
            return SplitRows{
                rows, padded, block, blocks, at<std::uint16_t>(high), at<std::uint16_t>(low)};
        }));
    m.def("gemm_fast_split", [] { return split_table() != nullptr; });
    m.def(
        "split_pack",
        [](const SplitPack& pack, const Weight& weight) {
            const auto [data, stride, bf16] = weight;
            return static_cast<int>(tiles().pack(pack, matrix_of(data, stride, bf16)));
        },
        Free());
    m.def(
        "split_rows",
        [](Address x, Int stride, bool bf16, Int width, const SplitRows& out) {
            tiles().split(matrix_of(x, stride, bf16), width, out);
        },
        Free());
    m.def(
        "gemm_forward",
        [](const SplitRows& x, const SplitPack& pack, Address y, Int stride, Address bias,
           Address left, Int left_stride, Address right, Int rank) {
            tiles().forward(x, pack, at<float>(y), stride, at<const float>(bias),
                            update_of(left, left_stride, right, rank));
        },
        Free());
    m.def(
        "gemm_gradient",
        [](const SplitRows& dy, const SplitPack& pack, Address dx, Int stride, bool add,
           Address left, Int left_stride, Address right, Int rank) {
            tiles().gradient(dy, pack, at<float>(dx), stride, add,
                             update_of(left, left_stride, right, rank));
        },
        Free());
}

void bind_bytes(py::module_& m) {
    using Free = py::call_guard<py::gil_scoped_release>;
    py::class_<BytePack>(m, "BytePack")
        .def(py::init(
            [](Int rows, Int depth, Int panels, Int block, Int blocks, Address q, Address scale) {
                return BytePack{
                    rows, depth, panels, block, blocks, at<std::uint8_t>(q), at<float>(scale)};
            }));
    py::class_<ByteRows>(m, "ByteRows")
        .def(py::init(
            [](Int rows, Int padded, Int block, Int blocks, Address q, Address scale, Address sum) {
                return ByteRows{rows,
                                padded,
                                block,
                                blocks,
                                at<std::int8_t>(q),
                                at<float>(scale),
                                at<std::int32_t>(sum)};
            }));
    m.def(
        "byte_pack",
        [](const BytePack& pack, const Weight& weight, bool transposed) {
            const auto [data, stride, bf16] = weight;
            return byte_table().pack(pack, matrix_of(data, stride, bf16), transposed);
        },
        Free());
    m.def(
        "byte_rows",
        [](Address x, Int stride, bool bf16, Int width, const ByteRows& out) {
            byte_table().quantise(matrix_of(x, stride, bf16), width, out);
        },
        Free());
    m.def(
        "byte_multiply",
        [](const ByteRows& x, const BytePack& pack, Address y, Int stride, Address bias, bool add,
           Address left, Int left_stride, Address right, Int rank) {
            byte_table().multiply(x, pack, at<float>(y), stride, at<const float>(bias), add,
                                  update_of(left, left_stride, right, rank));
        },
        Free());
}

}  // namespace

void bind_gemm(py::module_& m) {
    using Free = py::call_guard<py::gil_scoped_release>;
    bind_bytes(m);
    bind_split(m);
    py::class_<Pack>(m, "Pack").def(py::init(
        [](Int rows, Int depth, Int panels, Int block, Int blocks, Address q, Address row_scale,
           Address column_scale, Address limit, Address gradient_limit) {
            return Pack{rows,
                        depth,
                        panels,
                        block,
                        blocks,
                        at<std::int16_t>(q),
                        at<float>(row_scale),
                        at<float>(column_scale),
                        at<float>(limit),
                        at<float>(gradient_limit)};
        }));
    py::class_<Rows>(m, "Rows").def(
        py::init([](Int rows, Int padded, Int block, Int blocks, Address q, Address scale) {
            return Rows{rows, padded, block, blocks, at<std::int16_t>(q), at<float>(scale)};
        }));
    m.def("gemm_isa", [] { return gemm_table().name; });
    m.def("gemm_fast_int16", [] { return gemm_table().fast_int16; });
    m.def("gemm_block_length", &block_length);
    m.def("gemm_pack", &pack, Free());
    m.def(
        "gemm_quantise",
        [](Address x, Int stride, bool bf16, Int width, Address factor, Address limits,
           const Rows& out) {
            gemm_table().quantise(matrix_of(x, stride, bf16), width, at<const float>(factor),
                                  at<const float>(limits), out);
        },
        Free());
    m.def(
        "gemm_forward",
        [](const Rows& a, const Pack& pack, Address y, Int stride, Address bias, Address left,
           Int left_stride, Address right, Int rank) {
            gemm_table().forward(a, pack, at<float>(y), stride, at<const float>(bias),
                                 update_of(left, left_stride, right, rank));
        },
        Free());
    m.def(
        "gemm_gradient",
        [](const Rows& dy, const Pack& pack, Address dx, Int stride, bool add, Address left,
           Int left_stride, Address right, Int rank) {
            gemm_table().gradient(dy, pack, at<float>(dx), stride, add,
                                  update_of(left, left_stride, right, rank));
        },
        Free());
    m.def(
        "gemm_skinny",
        [](const Rows& a, Address limits, Address data, Int row, Int column, Address divisor,
           Int depth, Int n, Address out, Int stride, float factor) {
            gemm_table().skinny(a, at<const float>(limits), at<const float>(data), row, column,
                                at<const float>(divisor), depth, n, at<float>(out), stride, factor);
        },
        Free());
    m.def(
        "gemm_forward_fp32",
        [](Address x, Int x_stride, Int rows, Address w, Int w_stride, bool bf16, Int n, Int k,
           Address y, Int stride, Address bias, Address left, Int left_stride, Address right,
           Int rank) {
            gemm_table().forward_fp32(at<const float>(x), x_stride, rows,
                                      matrix_of(w, w_stride, bf16), n, k, at<float>(y), stride,
                                      at<const float>(bias),
                                      update_of(left, left_stride, right, rank));
        },
        Free());
    m.def(
        "gemm_gradient_fp32",
        [](Address dy, Int dy_stride, Int rows, Address w, Int w_stride, bool bf16, Int n, Int k,
           Address dx, Int stride, bool add, Address left, Int left_stride, Address right,
           Int rank) {
            gemm_table().gradient_fp32(at<const float>(dy), dy_stride, rows,
                                       matrix_of(w, w_stride, bf16), n, k, at<float>(dx), stride,
                                       add, update_of(left, left_stride, right, rank));
        },
        Free());
    m.def(
        "gemm_outer",
        [](Address a, Int a_stride, Address b, Int b_stride, Int rows, Int p, Int n, Address out,
           Int stride, float factor) {
            gemm_table().outer(at<const float>(a), a_stride, at<const float>(b), b_stride, rows, p,
                               n, at<float>(out), stride, factor);
        },
        Free());
    m.def(
        "dropout",
        [](Address x, Int stride, Int rows, Int columns, Int first_row, std::uint64_t seed,
           std::uint32_t threshold, float scale, Address out) {
            gemm_table().dropout(at<const float>(x), stride, rows, columns, first_row, seed,
                                 threshold, scale, at<float>(out));
        },
        Free());
}

}  // namespace trimpot
