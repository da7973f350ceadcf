// Parts of the door that stand in files of their own.
#pragma once

#include <pybind11/pybind11.h>

namespace trimpot {

void bind_gemm(pybind11::module_& m);
void bind_elementwise(pybind11::module_& m);
void bind_attention(pybind11::module_& m);
void bind_pool(pybind11::module_& m);

}  // namespace trimpot
