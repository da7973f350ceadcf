#include "pool.h"

#include <sys/mman.h>

#include <algorithm>

namespace trimpot {
namespace {

constexpr std::size_t kPage = 4096, kLine = 64, kLines = kPage / kLine;
constexpr std::size_t kStep = std::size_t{64} << 20;  // addresses become usable in such steps
constexpr std::size_t kStride = 17;                   // lines from one block's begin to the next's

std::size_t pages(std::size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

Pool::Pool(std::size_t reserve) {
    void* found = mmap(nullptr, pages(reserve), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return;
    base_ = static_cast<char*>(found);
    reserved_ = pages(reserve);
}

Pool::~Pool() {
    if (base_) munmap(base_, reserved_);
}

void* Pool::take(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t length = pages(bytes + kPage - kLine);
    Offset at = top_;
    const auto fits = by_size_.lower_bound({length, 0});
    if (fits != by_size_.end()) {
        at = fits->second;
        const std::size_t rest = fits->first - length;
        drop_hole(holes_.find(at));
        if (rest) add_hole(at + length, rest);
    } else {
        // The hole at the end, if there is one, is the begin of what is added.
        const auto last = holes_.empty() ? holes_.end() : std::prev(holes_.end());
        const bool grown = last != holes_.end() && last->first + last->second == top_;
        if (grown) at = last->first;
        if (!grow(at + length)) return nullptr;
        if (grown) drop_hole(last);
        top_ = at + length;
    }
    taken_.emplace(at, length);
    used_ += length;
    turn_ = (turn_ + kStride) % kLines;
    return base_ + at + turn_ * kLine;
}

void Pool::give_back(void* block) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const Offset inside = static_cast<std::size_t>(static_cast<char*>(block) - base_);
    const auto found = std::prev(taken_.upper_bound(inside));
    Offset at = found->first;
    std::size_t length = found->second;
    taken_.erase(found);
    used_ -= length;
    const auto after = holes_.find(at + length);
    if (after != holes_.end()) {
        length += after->second;
        drop_hole(after);
    }
    const auto next = holes_.lower_bound(at);
    if (next != holes_.begin()) {
        const auto before = std::prev(next);
        if (before->first + before->second == at) {
            at = before->first;
            length += before->second;
            drop_hole(before);
        }
    }
    add_hole(at, length);
}

std::size_t Pool::in_use() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return used_;
}

std::size_t Pool::extent() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return top_;
}

bool Pool::grow(std::size_t until) {
    if (until > reserved_) return false;
    if (until <= opened_) return true;
    const std::size_t wanted = std::min((until + kStep - 1) / kStep * kStep, reserved_);
    if (mprotect(base_ + opened_, wanted - opened_, PROT_READ | PROT_WRITE)) return false;
    opened_ = wanted;
    return true;
}

void Pool::add_hole(Offset at, std::size_t length) {
    holes_.emplace(at, length);
    by_size_.emplace(length, at);
}

void Pool::drop_hole(std::map<Offset, std::size_t>::iterator hole) {
    by_size_.erase({hole->second, hole->first});
    holes_.erase(hole);
}

}  // namespace trimpot
