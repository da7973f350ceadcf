#include "split.h"

#include <cstdlib>

#include "cpu.h"

#if defined(TRIMPOT_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>

namespace trimpot {

namespace avx512 {
extern const SplitTable split;
}

namespace {

// Linux gives a process the 8 KiB of tile state only if it asks (kernel: Documentation/arch/x86/
// xstate.rst); all of its threads then have them.
bool permitted() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool ready() {
    if (std::getenv("TRIMPOT_ISA")) return false;  // a lower instruction set was asked for
    for (const char* feature :
         {"amx-tile", "amx-bf16", "avx512bf16", "avx512bw", "avx512dq", "avx512vl", "avx512vnni"}) {
        if (!cpu_has(feature)) return false;
    }
    return permitted();
}

}  // namespace

const SplitTable* split_table() {
    static const bool is = ready();
    return is ? &avx512::split : nullptr;
}

}  // namespace trimpot

#else

namespace trimpot {
const SplitTable* split_table() { return nullptr; }
}  // namespace trimpot

#endif
