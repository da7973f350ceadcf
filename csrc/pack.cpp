#include "pack.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace trimpot {
namespace {

// Room left in each bin, with the largest room of every subtree above it: node k's children are
// 2k and 2k+1, bin b is node leaves+b. Johnson (1973), "Near-optimal bin packing algorithms", §2.
class Rooms {
  public:
    Rooms(std::size_t bins, std::int64_t capacity) {
        while (leaves_ < bins) leaves_ *= 2;
        room_.assign(2 * leaves_, capacity);
    }

    // The lowest bin with at least `length` of room gives it away. There always is one: no more
    // bins can be open than documents were placed.
    std::size_t place(std::int64_t length) {
        std::size_t node = 1;
        while (node < leaves_) {
            node *= 2;
            if (room_[node] < length) ++node;
        }
        const std::size_t bin = node - leaves_;
        room_[node] -= length;
        while (node /= 2) {
            const std::int64_t largest = std::max(room_[2 * node], room_[2 * node + 1]);
            if (room_[node] == largest) break;
            room_[node] = largest;
        }
        return bin;
    }

  private:
    std::size_t leaves_ = 1;
    std::vector<std::int64_t> room_;
};

}  // namespace

std::int64_t pack(const std::int64_t* lengths, std::size_t documents, std::int64_t capacity,
                  std::int64_t* bins) {
    // Longest first; of equals, the one that stands first. Negated length beside the index makes
    // that the natural order of the pairs, and their sort needs no look-ups.
    std::vector<std::pair<std::int64_t, std::size_t>> order(documents);
    for (std::size_t i = 0; i < documents; ++i) order[i] = {-lengths[i], i};
    std::sort(order.begin(), order.end());

    Rooms rooms(documents, capacity);
    std::int64_t opened = 0;
    for (const auto& [negated, document] : order) {
        const auto bin = static_cast<std::int64_t>(rooms.place(-negated));
        bins[document] = bin;
        opened = std::max(opened, bin + 1);
    }
    return opened;
}

}  // namespace trimpot
