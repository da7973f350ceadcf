#include "cpu.h"

#include <algorithm>
#include <cstddef>
#include <cstdint>

#if defined(TRIMPOT_X86)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace trimpot {
namespace {

#if defined(TRIMPOT_X86)

// Register sets that the operating system saves on a context switch, as bits of XCR0. Without
// them an instruction faults although cpuid lists it. (Intel SDM vol. 1, §13.3)
enum OsState : std::uint64_t {
    kNothing = 0,
    kYmm = 0x6,        // SSE, AVX
    kZmm = 0xE6,       // and opmask, upper halves, upper sixteen
    kTiles = 0x60000,  // TILECFG, TILEDATA; a process must still ask Linux for the data
};

enum Register { kEax, kEbx, kEcx, kEdx };

struct Feature {
    const char* name;
    unsigned leaf, subleaf;
    Register where;
    unsigned bit;
    std::uint64_t needs;
};

// Intel SDM vol. 2A, CPUID; AMD APM vol. 3, appendix E.
constexpr Feature kFeatures[] = {
    {"sse2", 1, 0, kEdx, 26, kNothing},   {"sse3", 1, 0, kEcx, 0, kNothing},
    {"ssse3", 1, 0, kEcx, 9, kNothing},   {"sse4.1", 1, 0, kEcx, 19, kNothing},
    {"sse4.2", 1, 0, kEcx, 20, kNothing}, {"avx", 1, 0, kEcx, 28, kYmm},
    {"f16c", 1, 0, kEcx, 29, kYmm},       {"fma", 1, 0, kEcx, 12, kYmm},
    {"avx2", 7, 0, kEbx, 5, kYmm},        {"bmi2", 7, 0, kEbx, 8, kNothing},
    {"avx512f", 7, 0, kEbx, 16, kZmm},    {"avx512dq", 7, 0, kEbx, 17, kZmm},
    {"avx512bw", 7, 0, kEbx, 30, kZmm},   {"avx512vl", 7, 0, kEbx, 31, kZmm},
    {"avx512vnni", 7, 0, kEcx, 11, kZmm}, {"avx512fp16", 7, 0, kEdx, 23, kZmm},
    {"avx512bf16", 7, 1, kEax, 5, kZmm},  {"avxvnni", 7, 1, kEax, 4, kYmm},
    {"amx-tile", 7, 0, kEdx, 24, kTiles}, {"amx-int8", 7, 0, kEdx, 25, kTiles},
    {"amx-bf16", 7, 0, kEdx, 22, kTiles},
};

std::uint64_t os_state() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kOsxsave = 1u << 27;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kOsxsave)) return 0;
    unsigned low = 0, high = 0;
    // The instruction, not _xgetbv: that intrinsic would want -mxsave for the whole file.
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (std::uint64_t{high} << 32) | low;
}

std::vector<std::string> detect() {
    std::vector<std::string> found;
    const std::uint64_t saved = os_state();
    for (const Feature& f : kFeatures) {
        unsigned r[4] = {0, 0, 0, 0};
        if (f.subleaf > 0) {
            // Leaf 7 tells in eax of its first subleaf how many it has.
            if (!__get_cpuid_count(f.leaf, 0, &r[0], &r[1], &r[2], &r[3])) continue;
            if (r[kEax] < f.subleaf) continue;
        }
        if (!__get_cpuid_count(f.leaf, f.subleaf, &r[0], &r[1], &r[2], &r[3])) continue;
        if ((r[f.where] >> f.bit & 1) && (saved & f.needs) == f.needs) found.emplace_back(f.name);
    }
    return found;
}

#elif defined(__aarch64__) && defined(__linux__)

struct Feature {
    const char* name;
    unsigned long kind;
    unsigned bit;
};

// Bits of AT_HWCAP and AT_HWCAP2: Linux, Documentation/arch/arm64/elf_hwcaps.rst.
constexpr Feature kFeatures[] = {
    {"neon", AT_HWCAP, 1},   {"fp16", AT_HWCAP, 10}, {"dotprod", AT_HWCAP, 20},
    {"sve", AT_HWCAP, 22},   {"sve2", AT_HWCAP2, 1}, {"i8mm", AT_HWCAP2, 13},
    {"bf16", AT_HWCAP2, 14}, {"sme", AT_HWCAP2, 23},
};

std::vector<std::string> detect() {
    std::vector<std::string> found;
    for (const Feature& f : kFeatures) {
        if (getauxval(f.kind) >> f.bit & 1) found.emplace_back(f.name);
    }
    return found;
}

#elif defined(__aarch64__) && defined(__APPLE__)

std::vector<std::string> detect() {
    std::vector<std::string> found{"neon"};
    constexpr const char* kNames[][2] = {{"fp16", "hw.optional.arm.FEAT_FP16"},
                                         {"dotprod", "hw.optional.arm.FEAT_DotProd"},
                                         {"i8mm", "hw.optional.arm.FEAT_I8MM"},
                                         {"bf16", "hw.optional.arm.FEAT_BF16"},
                                         {"sme", "hw.optional.arm.FEAT_SME"}};
    for (const auto& [name, key] : kNames) {
        int value = 0;
        std::size_t size = sizeof value;
        if (sysctlbyname(key, &value, &size, nullptr, 0) == 0 && value) found.emplace_back(name);
    }
    return found;
}

#elif defined(__aarch64__)

std::vector<std::string> detect() { return {"neon"}; }

#else

std::vector<std::string> detect() { return {}; }

#endif

}  // namespace

const std::vector<std::string>& cpu_features() {
    static const std::vector<std::string> features = detect();
    return features;
}

bool cpu_has(const char* feature) {
    const auto& features = cpu_features();
    return std::find(features.begin(), features.end(), feature) != features.end();
}

}  // namespace trimpot
