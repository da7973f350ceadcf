// Memory of large tensors that is kept when they go, in place of the C library's heap.
//
// glibc cuts an aligned block out of a larger one and hands the pads to small allocations; when the
// block is freed, the next one of its size does not fit into the hole. Here only large blocks live,
// in whole pages and without headers, so a hole is as long as what left it.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>
#include <set>
#include <utility>

namespace trimpot {

// Best fit in one reserved range of addresses. Pages stay with the process once they were used.
class Pool {
  public:
    // Reserves addresses, no memory. Where the system has none to give, `take` gives null.
    explicit Pool(std::size_t reserve);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    // A block on a cache line of its own, or null. Blocks of one size that are taken in turn start
    // at different distances from a page's begin: 4,096 bytes apart, a load waits for a store.
    void* take(std::size_t bytes);
    void give_back(void* block);

    std::size_t in_use();  // bytes that are taken
    std::size_t extent();  // bytes up to the end of the last page that ever was

  private:
    using Offset = std::size_t;
    bool grow(std::size_t until);
    void add_hole(Offset at, std::size_t length);
    void drop_hole(std::map<Offset, std::size_t>::iterator hole);

    std::mutex mutex_;
    char* base_ = nullptr;
    std::size_t reserved_ = 0, opened_ = 0, top_ = 0, used_ = 0;
    std::size_t turn_ = 0;
    std::map<Offset, std::size_t> holes_;               // {where: length}
    std::set<std::pair<std::size_t, Offset>> by_size_;  // the same
    std::map<Offset, std::size_t> taken_;               // {where: length}, in whole pages
};

}  // namespace trimpot
