// Types of items that kernels take through untyped pointers. The numbers stand in
// kernels/cpp/tensors.py as well.
#pragma once

namespace trimpot {

enum class Type : int { kFloat = 0, kBf16 = 1, kFp16 = 2 };

}  // namespace trimpot
