// Blocks of the pool for Python: objects with a buffer, whose memory goes back when they go.
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <memory>

#include "bindings.h"
#include "pool.h"

namespace py = pybind11;

namespace trimpot {
namespace {

// As many addresses as twice the machine's memory. Never destroyed: tensors may outlive all else.
Pool& pool() {
    static Pool* const the = new Pool(2 * static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
                                      static_cast<std::size_t>(sysconf(_SC_PAGESIZE)));
    return *the;
}

struct Block {
    void* const memory;
    const std::size_t bytes;

    Block(void* from, std::size_t size) : memory(from), bytes(size) {}
    ~Block() { pool().give_back(memory); }
    Block(const Block&) = delete;
    Block& operator=(const Block&) = delete;
};

// Null, which is None, where the system has no more.
std::unique_ptr<Block> block(std::size_t bytes) {
    void* memory = pool().take(bytes);
    return memory ? std::make_unique<Block>(memory, bytes) : nullptr;
}

}  // namespace

void bind_pool(py::module_& m) {
    py::class_<Block>(m, "Block", py::buffer_protocol()).def_buffer([](Block& of) {
        return py::buffer_info(static_cast<unsigned char*>(of.memory),
                               static_cast<py::ssize_t>(of.bytes));
    });
    m.def("pool_block", &block);
    m.def("pool_in_use", [] { return pool().in_use(); });
    m.def("pool_extent", [] { return pool().extent(); });
}

}  // namespace trimpot
