// The elementwise kernels for Python. Addresses come as integers (torch's data_ptr()), 0 for what
// is not there: a call costs a microsecond. kernels/cpp/ checks device, dtype, shape and stride
// before it. Typed in kernels/_native.pyi.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <string>

#include "bindings.h"
#include "isa.h"

namespace py = pybind11;

namespace trimpot {
namespace {

using Address = std::uintptr_t;
using Int = std::int64_t;

template <typename T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

Type type_of(int number) {
    if (number < 0 || number > 2) throw py::value_error("a type is 0, 1 or 2");
    return static_cast<Type>(number);
}

std::string use_isa(const std::optional<std::string>& name) {
    if (name) chosen_isa() = isa_up_to(*name);
    return name_of(chosen_isa());
}

void norm_forward(int type, Address x, Int x_stride, Address residual, Int residual_stride,
                  Address weight, Address y, Address s, Address rstd, Int rows, Int columns,
                  float eps, float offset) {
    const NormForward call{
        type_of(type),     at<void>(x), x_stride,    at<void>(residual), residual_stride,
        at<float>(weight), at<void>(y), at<void>(s), at<float>(rstd),    rows,
        columns,           eps,         offset};
    py::gil_scoped_release released;
    norm_table().forward(call);
}

void norm_backward(int type, Address dy, Int dy_stride, Address ds, Int ds_stride, Address s,
                   Int s_stride, Address weight, Address rstd, Address dx, Address partials,
                   Address dw, Int blocks, Int rows, Int columns, float offset) {
    const NormBackward call{type_of(type),
                            at<void>(dy),
                            dy_stride,
                            at<void>(ds),
                            ds_stride,
                            at<void>(s),
                            s_stride,
                            at<float>(weight),
                            at<float>(rstd),
                            at<void>(dx),
                            at<float>(partials),
                            at<float>(dw),
                            blocks,
                            rows,
                            columns,
                            offset};
    py::gil_scoped_release released;
    norm_table().backward(call);
}

void glu_forward(int type, bool gelu, Address gate, Int gate_stride, Address up, Int up_stride,
                 Address y, Int rows, Int columns) {
    const GluForward call{type_of(type), gelu,        at<void>(gate), gate_stride, at<void>(up),
                          up_stride,     at<void>(y), rows,           columns};
    py::gil_scoped_release released;
    glu_table().forward(call);
}

void glu_backward(int type, bool gelu, Address dy, Int dy_stride, Address gate, Int gate_stride,
                  Address up, Int up_stride, Address dgate, Address dup, Int rows, Int columns) {
    const GluBackward call{type_of(type),   gelu,          at<void>(dy), dy_stride,
                           at<void>(gate),  gate_stride,   at<void>(up), up_stride,
                           at<void>(dgate), at<void>(dup), rows,         columns};
    py::gil_scoped_release released;
    glu_table().backward(call);
}

// (address, batch stride, token stride, head stride)
using Strided = std::tuple<Address, Int, Int, Int>;
// (heads, in, out, weight, rstd, x, partials, dw)
using Side = std::tuple<Int, Strided, Address, Address, Address, Strided, Address, Address>;
// (type, cos, its batch and token stride, sin, its batch and token stride)
using Angles = std::tuple<int, Address, Int, Int, Address, Int, Int>;

Heads heads_of(const Strided& x) {
    const auto& [data, batch, token, head] = x;
    return {at<void>(data), batch, token, head};
}

RopeSide side_of(const Side& side) {
    const auto& [heads, in, out, weight, rstd, x, partials, dw] = side;
    return {heads,           heads_of(in), at<void>(out),       at<float>(weight),
            at<float>(rstd), heads_of(x),  at<float>(partials), at<float>(dw)};
}

void rope(bool back, int type, const Angles& angles, const std::array<Int, 4>& sizes, Int blocks,
          float eps, float offset, const Side& q, const Side& k) {
    const auto& [angle_type, cos, cos_batch, cos_token, sin, sin_batch, sin_token] = angles;
    const auto& [batch, length, width, half] = sizes;
    if (width > kRopeWidest) throw py::value_error("heads are wider than kRopeWidest");
    const Rope call{type_of(type),
                    {type_of(angle_type), at<void>(cos), cos_batch, cos_token, at<void>(sin),
                     sin_batch, sin_token},
                    batch,
                    length,
                    width,
                    half,
                    blocks,
                    eps,
                    offset,
                    {side_of(q), side_of(k)}};
    py::gil_scoped_release released;
    (back ? rope_table().backward : rope_table().forward)(call);
}

void adamw_step(Address param, Address grad, int grad_type, Address exp_avg, Address exp_avg_sq,
                Address copy, int copy_type, Int count, float grad_scale, float keep, float beta1,
                float rest1, float beta2, float rest2, float rate, float correction, float eps) {
    const AdamW call{at<float>(param),
                     at<void>(grad),
                     type_of(grad_type),
                     at<float>(exp_avg),
                     at<float>(exp_avg_sq),
                     at<void>(copy),
                     type_of(copy_type),
                     count,
                     grad_scale,
                     keep,
                     beta1,
                     rest1,
                     beta2,
                     rest2,
                     rate,
                     correction,
                     eps};
    py::gil_scoped_release released;
    optim_table().adamw(call);
}

void softmax_loss(Address logits, Int stride, Int rows, Int columns, Address labels,
                  Address weights, Int ignore_index, float label_smoothing, float z_loss,
                  float softcap, Address loss, Address lse, bool gradient) {
    const SoftmaxLoss call{
        at<float>(logits), stride,          rows,   columns, at<Int>(labels), at<float>(weights),
        ignore_index,      label_smoothing, z_loss, softcap, at<float>(loss), at<float>(lse),
        gradient};
    py::gil_scoped_release released;
    softmax_table().loss(call);
}

void nf4_quantise(int type, Address weight, Address thresholds, Address packed, Address absmax,
                  Int count) {
    const Nf4Quantise call{type_of(type),         at<void>(weight),
                           at<float>(thresholds), at<std::uint8_t>(packed),
                           at<float>(absmax),     count};
    py::gil_scoped_release released;
    nf4_table().quantise(call);
}

void nf4_dequantise(int type, Address packed, Address absmax, Address nested_absmax,
                    Address nested_map, float offset, Address code, Address out, Int count) {
    const Nf4Dequantise call{type_of(type),
                             at<std::uint8_t>(packed),
                             at<void>(absmax),
                             at<float>(nested_absmax),
                             at<float>(nested_map),
                             offset,
                             at<float>(code),
                             at<void>(out),
                             count};
    py::gil_scoped_release released;
    nf4_table().dequantise(call);
}

}  // namespace

void bind_elementwise(py::module_& m) {
    m.attr("rope_widest") = kRopeWidest;
    m.def("elementwise_isa", &use_isa, py::arg("name") = py::none());
    m.def("norm_forward", &norm_forward);
    m.def("norm_backward", &norm_backward);
    m.def("glu_forward", &glu_forward);
    m.def("glu_backward", &glu_backward);
    m.def("rope", &rope);
    m.def("adamw_step", &adamw_step);
    m.def("softmax_loss", &softmax_loss);
    m.def("nf4_quantise", &nf4_quantise);
    m.def("nf4_dequantise", &nf4_dequantise);
}

}  // namespace trimpot
