#include "gemm.h"

#include <cstdlib>
#include <cstring>

#include "bytes.h"
#include "cpu.h"

namespace trimpot {

namespace generic {
extern const GemmTable gemm;
extern const ByteTable bytes;
}  // namespace generic
#if defined(__x86_64__)
namespace avx2 {
extern const GemmTable gemm;
extern const ByteTable bytes;
}  // namespace avx2
namespace avx512 {
extern const GemmTable gemm;
extern const ByteTable bytes;
}  // namespace avx512
#endif

std::int64_t block_length(std::int64_t depth) {
    constexpr std::int64_t kLongest = 288, kShortest = 160;
    std::int64_t best = 0, best_total = 0;
    for (std::int64_t blocks = (depth + kLongest - 1) / kLongest;
         blocks <= (depth + kShortest - 1) / kShortest; ++blocks) {
        const std::int64_t length = ((depth + blocks - 1) / blocks + 31) / 32 * 32;
        if (!best || blocks * length < best_total) {
            best = length;
            best_total = blocks * length;
        }
    }
    return best ? best : 32;
}

namespace {

struct Tables {
    const GemmTable& gemm;
    const ByteTable& bytes;
};

Tables choose() {
#if defined(__x86_64__)
    const char* wanted = std::getenv("TRIMPOT_ISA");
    const auto allowed = [&](const char* name) { return !wanted || !std::strcmp(wanted, name); };
    if (allowed("avx512") && cpu_has("avx512vnni") && cpu_has("avx512bw") && cpu_has("avx512dq") &&
        cpu_has("avx512vl")) {
        return {avx512::gemm, avx512::bytes};
    }
    if ((allowed("avx512") || allowed("avx2")) && cpu_has("avx2") && cpu_has("fma")) {
        return {avx2::gemm, avx2::bytes};
    }
#endif
    return {generic::gemm, generic::bytes};
}

const Tables& chosen() {
    static const Tables tables = choose();
    return tables;
}

}  // namespace

const GemmTable& gemm_table() { return chosen().gemm; }

const ByteTable& byte_table() { return chosen().bytes; }

}  // namespace trimpot
