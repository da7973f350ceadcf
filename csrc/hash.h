#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace trimpot {

// Names of the variants of hash_documents that this processor runs, fastest first. The last one
// is "portable". All give the same bits.
std::vector<std::string> hash_variants();

// hashes[i] becomes XXH64, with `seed`, of the bytes of tokens[offsets[i]] …
// tokens[offsets[i+1]-1]. Wants 0 <= offsets[0] <= offsets[1] <= … within the tokens; the caller
// has checked. Throws std::invalid_argument for a variant that hash_variants() does not list.
void hash_documents(const std::int32_t* tokens, const std::int64_t* offsets, std::size_t documents,
                    std::uint64_t seed, std::uint64_t* hashes, const std::string& variant);

}  // namespace trimpot
