#include "gemm.h"

#include <cstdlib>
#include <cstring>

#include "cpu.h"

namespace trimpot {

namespace generic {
extern const GemmTable gemm;
}
#if defined(__x86_64__)
namespace avx2 {
extern const GemmTable gemm;
}
namespace avx512 {
extern const GemmTable gemm;
}
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

const GemmTable& choose() {
#if defined(__x86_64__)
    const char* wanted = std::getenv("TRIMPOT_ISA");
    const auto allowed = [&](const char* name) { return !wanted || !std::strcmp(wanted, name); };
    if (allowed("avx512") && cpu_has("avx512vnni") && cpu_has("avx512bw") && cpu_has("avx512dq") &&
        cpu_has("avx512vl")) {
        return avx512::gemm;
    }
    if ((allowed("avx512") || allowed("avx2")) && cpu_has("avx2") && cpu_has("fma")) {
        return avx2::gemm;
    }
#endif
    return generic::gemm;
}

}  // namespace

const GemmTable& gemm_table() {
    static const GemmTable& table = choose();
    return table;
}

}  // namespace trimpot
