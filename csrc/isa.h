// The instruction set whose tables run, of those that the elementwise sources are compiled for.
// For the bindings alone: these inline functions must not be compiled with more than the baseline.
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "cpu.h"
#include "glu.h"
#include "nf4.h"
#include "norm.h"
#include "optim.h"
#include "rope.h"
#include "softmax.h"

namespace trimpot {

enum class Isa { kGeneric, kAvx2, kAvx512 };

inline const char* name_of(Isa isa) {
    constexpr const char* kNames[] = {"generic", "avx2", "avx512"};
    return kNames[static_cast<int>(isa)];
}

inline Isa best_isa() {
#if defined(__x86_64__)
    if (!cpu_has("avx2") || !cpu_has("fma") || !cpu_has("f16c")) return Isa::kGeneric;
    for (const char* feature : {"avx512f", "avx512bw", "avx512dq", "avx512vl"}) {
        if (!cpu_has(feature)) return Isa::kAvx2;
    }
    return Isa::kAvx512;
#else
    return Isa::kGeneric;
#endif
}

// The one of that name, or the best below it that this machine has.
inline Isa isa_up_to(const std::string& name) {
    for (const Isa isa : {Isa::kGeneric, Isa::kAvx2, Isa::kAvx512}) {
        if (name == name_of(isa)) return isa < best_isa() ? isa : best_isa();
    }
    throw std::invalid_argument("the instruction set is '" + name +
                                "'; generic, avx2 or avx512 is wanted");
}

// What runs. TRIMPOT_ISA lowers it for a process, assignment for a test.
inline Isa& chosen_isa() {
    static Isa chosen = [] {
        const char* wanted = std::getenv("TRIMPOT_ISA");
        return wanted ? isa_up_to(wanted) : best_isa();
    }();
    return chosen;
}

#if defined(__x86_64__)
#define TRIMPOT_TABLE(Table, name)                                                  \
    namespace generic {                                                             \
    extern const Table name;                                                        \
    }                                                                               \
    namespace avx2 {                                                                \
    extern const Table name;                                                        \
    }                                                                               \
    namespace avx512 {                                                              \
    extern const Table name;                                                        \
    }                                                                               \
    inline const Table& name##_table() {                                            \
        const Table* const tables[] = {&generic::name, &avx2::name, &avx512::name}; \
        return *tables[static_cast<int>(chosen_isa())];                             \
    }
#else
#define TRIMPOT_TABLE(Table, name) \
    namespace generic {            \
    extern const Table name;       \
    }                              \
    inline const Table& name##_table() { return generic::name; }
#endif

TRIMPOT_TABLE(NormTable, norm)
TRIMPOT_TABLE(RopeTable, rope)
TRIMPOT_TABLE(GluTable, glu)
TRIMPOT_TABLE(OptimTable, optim)
TRIMPOT_TABLE(SoftmaxTable, softmax)
TRIMPOT_TABLE(AttentionTable, attention)
TRIMPOT_TABLE(Nf4Table, nf4)

#undef TRIMPOT_TABLE

}  // namespace trimpot
