// What the processor can do that its family's baseline does not promise. Read once, at run time,
// so that one wheel runs everywhere and still takes the fast path where there is one.
#pragma once

#include <string>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#define TRIMPOT_X86 1
#endif

namespace trimpot {

// Names of the features that both the processor and the operating system support, such as
// "avx2", "avx512vnni", "neon", "sve". Empty on an unknown kind of processor.
const std::vector<std::string>& cpu_features();

bool cpu_has(const char* feature);

}  // namespace trimpot
