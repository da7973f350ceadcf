// The door: Python's buffers in, checked for type, shape and stride; plain pointers behind it.
// Each function releases the GIL while it works. Typed for Python in kernels/_native.pyi.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "cpu.h"
#include "hash.h"
#include "pack.h"

namespace py = pybind11;

namespace {

// Rises with every change of a signature, together with INTERFACE in kernels/native.py: an
// extension left over from another checkout is then refused by name instead of failing oddly.
constexpr int kInterface = 10;

template <typename T>
struct Vector {
    T* data;
    py::ssize_t size;
};

// A contiguous one-dimensional buffer of T. ValueError says which argument is not one.
// The pointer lives as long as the Python object does, which the caller's arguments hold.
template <typename T>
Vector<T> vector_of(const py::buffer& buffer, const char* name) {
    constexpr bool kWritable = !std::is_const_v<T>;
    using Item = std::remove_const_t<T>;
    const py::buffer_info info = buffer.request(kWritable);
    const std::string argument(name);
    if (!info.item_type_is_equivalent_to<Item>()) {
        throw py::value_error(argument + " has items of format '" + info.format + "', '" +
                              py::format_descriptor<Item>::format() + "' is wanted");
    }
    if (info.ndim != 1) {
        throw py::value_error(argument + " has " + std::to_string(info.ndim) +
                              " dimensions, 1 is wanted");
    }
    if (info.shape[0] > 1 && info.strides[0] != static_cast<py::ssize_t>(sizeof(T))) {
        throw py::value_error(argument + " has a stride of " + std::to_string(info.strides[0]) +
                              " bytes, contiguous is wanted");
    }
    return {static_cast<T*>(info.ptr), info.shape[0]};
}

std::int64_t pack(const py::buffer& lengths_buffer, std::int64_t capacity,
                  const py::buffer& bins_buffer) {
    const auto lengths = vector_of<const std::int64_t>(lengths_buffer, "lengths");
    const auto bins = vector_of<std::int64_t>(bins_buffer, "bins");
    if (bins.size != lengths.size) throw py::value_error("bins and lengths differ in size");
    py::gil_scoped_release released;
    for (py::ssize_t i = 0; i < lengths.size; ++i) {
        if (lengths.data[i] < 0 || lengths.data[i] > capacity) {
            throw std::invalid_argument("lengths[" + std::to_string(i) +
                                        "] is not within 0 and the capacity");
        }
    }
    return trimpot::pack(lengths.data, static_cast<std::size_t>(lengths.size), capacity, bins.data);
}

void hash_documents(const py::buffer& tokens_buffer, const py::buffer& offsets_buffer,
                    std::uint64_t seed, const py::buffer& hashes_buffer,
                    const std::string& variant) {
    const auto tokens = vector_of<const std::int32_t>(tokens_buffer, "tokens");
    const auto offsets = vector_of<const std::int64_t>(offsets_buffer, "offsets");
    const auto hashes = vector_of<std::uint64_t>(hashes_buffer, "hashes");
    if (offsets.size != hashes.size + 1) {
        throw py::value_error("offsets must have one item more than hashes");
    }
    py::gil_scoped_release released;
    std::int64_t before = 0;
    for (py::ssize_t i = 0; i < offsets.size; ++i) {
        if (offsets.data[i] < before || offsets.data[i] > tokens.size) {
            throw std::invalid_argument("offsets[" + std::to_string(i) +
                                        "] falls, or is not within the tokens");
        }
        before = offsets.data[i];
    }
    trimpot::hash_documents(tokens.data, offsets.data, static_cast<std::size_t>(hashes.size), seed,
                            hashes.data, variant);
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
    m.doc() = "C++ kernels of trimpot. Import trimpot.kernels.native instead.";
    m.attr("interface") = kInterface;
    m.def("cpu_features", &trimpot::cpu_features);
    m.def("hash_variants", &trimpot::hash_variants);
    m.def("pack", &pack, py::arg("lengths"), py::arg("capacity"), py::arg("bins"));
    m.def("hash_documents", &hash_documents, py::arg("tokens"), py::arg("offsets"), py::arg("seed"),
          py::arg("hashes"), py::arg("variant"));
    trimpot::bind_gemm(m);
    trimpot::bind_elementwise(m);
    trimpot::bind_attention(m);
    trimpot::bind_pool(m);
}
