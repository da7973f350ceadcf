// XXH64 of token arrays, written from its specification:
// "xxHash fast digest algorithm", doc/xxhash_spec.md in the xxHash repository, version 0.2.0.
#include "hash.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "cpu.h"

#if defined(TRIMPOT_X86)
#include <immintrin.h>
#endif

namespace trimpot {
namespace {

using Bytes = const unsigned char*;
using std::size_t;
using std::uint64_t;

constexpr uint64_t kPrime1 = 0x9E3779B185EBCA87;
constexpr uint64_t kPrime2 = 0xC2B2AE3D27D4EB4F;
constexpr uint64_t kPrime3 = 0x165667B19E3779F9;
constexpr uint64_t kPrime4 = 0x85EBCA77C2B2AE63;
constexpr uint64_t kPrime5 = 0x27D4EB2F165667C5;

constexpr size_t kStripe = 32;     // bytes that the four accumulators take at a time
constexpr size_t kSide = 8;        // documents that a wide variant hashes side by side
constexpr size_t kWorthwhile = 8;  // stripes; shorter documents gain nothing from company

constexpr uint64_t rotate(uint64_t x, int by) { return x << by | x >> (64 - by); }

constexpr uint64_t round(uint64_t acc, uint64_t lane) {
    return rotate(acc + lane * kPrime2, 31) * kPrime1;
}

template <typename T>
T load(Bytes at) {
    T value;
    std::memcpy(&value, at, sizeof value);  // little-endian: CMakeLists.txt sees to it
    return value;
}

struct Document {
    Bytes data;
    size_t bytes;

    size_t stripes() const { return bytes / kStripe; }
};

// Specification, step 1.
void begin(uint64_t* acc, uint64_t seed) {
    acc[0] = seed + kPrime1 + kPrime2;
    acc[1] = seed + kPrime2;
    acc[2] = seed;
    acc[3] = seed - kPrime1;
}

// Step 2.
void consume(uint64_t* acc, Bytes data, size_t stripes) {
    uint64_t a = acc[0], b = acc[1], c = acc[2], d = acc[3];
    for (; stripes > 0; --stripes, data += kStripe) {
        a = round(a, load<uint64_t>(data));
        b = round(b, load<uint64_t>(data + 8));
        c = round(c, load<uint64_t>(data + 16));
        d = round(d, load<uint64_t>(data + 24));
    }
    acc[0] = a, acc[1] = b, acc[2] = c, acc[3] = d;
}

// Steps 3 to 7. `tail` is the end of the document after its whole stripes. It is a whole number
// of tokens of four bytes, so the specification's step for single bytes has nothing to do.
uint64_t finish(const uint64_t* acc, Document document, uint64_t seed) {
    uint64_t h = seed + kPrime5;
    if (document.stripes() > 0) {
        h = rotate(acc[0], 1) + rotate(acc[1], 7) + rotate(acc[2], 12) + rotate(acc[3], 18);
        for (int i = 0; i < 4; ++i) h = (h ^ round(0, acc[i])) * kPrime1 + kPrime4;
    }
    h += document.bytes;
    Bytes tail = document.data + document.stripes() * kStripe;
    size_t left = document.bytes % kStripe;
    for (; left >= 8; left -= 8, tail += 8) {
        h = rotate(h ^ round(0, load<uint64_t>(tail)), 27) * kPrime1 + kPrime4;
    }
    if (left >= 4) h = rotate(h ^ load<std::uint32_t>(tail) * kPrime1, 23) * kPrime2 + kPrime3;
    h = (h ^ h >> 33) * kPrime2;
    h = (h ^ h >> 29) * kPrime3;
    return h ^ h >> 32;
}

uint64_t hash_one(Document document, uint64_t seed) {
    uint64_t acc[4];
    begin(acc, seed);
    consume(acc, document.data, document.stripes());
    return finish(acc, document, seed);
}

// The first `stripes` stripes of kSide documents into their accumulators, from `seed` on.
using SideBySide = void (*)(const Document* documents, size_t stripes, uint64_t seed,
                            uint64_t (*acc)[4]);

#if defined(TRIMPOT_X86)

// Two documents to a register: their stripes lie contiguous, so nothing is gathered. Four
// independent chains hide the latency of the 64-bit multiplication.
__attribute__((target("avx512f,avx512dq"))) void side_by_side_avx512dq(const Document* documents,
                                                                       size_t stripes,
                                                                       uint64_t seed,
                                                                       uint64_t (*acc)[4]) {
    constexpr size_t kPairs = kSide / 2;
    const __m512i prime1 = _mm512_set1_epi64(static_cast<long long>(kPrime1));
    const __m512i prime2 = _mm512_set1_epi64(static_cast<long long>(kPrime2));
    uint64_t start[4];
    begin(start, seed);
    const __m512i first =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<__m256i*>(start)));
    __m512i chain[kPairs];
    for (auto& c : chain) c = first;
    for (size_t at = 0; at < stripes * kStripe; at += kStripe) {
        for (size_t p = 0; p < kPairs; ++p) {
            const auto* low = reinterpret_cast<const __m256i*>(documents[2 * p].data + at);
            const auto* high = reinterpret_cast<const __m256i*>(documents[2 * p + 1].data + at);
            const __m512i lanes = _mm512_inserti64x4(
                _mm512_castsi256_si512(_mm256_loadu_si256(low)), _mm256_loadu_si256(high), 1);
            const __m512i sum = _mm512_add_epi64(chain[p], _mm512_mullo_epi64(lanes, prime2));
            chain[p] = _mm512_mullo_epi64(_mm512_rol_epi64(sum, 31), prime1);
        }
    }
    for (size_t p = 0; p < kPairs; ++p) _mm512_storeu_si512(acc[2 * p], chain[p]);
}

#endif

// Neighbours of nearly equal length, such as the rows of packed or truncated data, go side by
// side; all others one by one, because eight streams that soon fall back to one lose more to cold
// memory than they gain. (Zen 5, GB/s side by side against one by one: rows of 500 tokens in
// cache 70 against 21, rows of 1,024 in memory 26 against 21; mixed lengths of 50 to 1,000 were
// 12 against 18 without this rule and are 17.8 with it. Gathering like lengths from further off
// did no better. AVX2, which must put its multiplication together from three, did not gain.)
template <typename DocumentAt>
void hash_wide(SideBySide side_by_side, DocumentAt document_at, size_t documents, uint64_t seed,
               uint64_t* hashes) {
    size_t i = 0;
    while (i < documents) {
        Document side[kSide];
        side[0] = document_at(i);
        size_t shortest = side[0].stripes(), longest = shortest, count = 1;
        const auto alike = [&] { return shortest >= kWorthwhile && 8 * shortest >= 7 * longest; };
        for (; count < kSide && i + count < documents && alike(); ++count) {
            side[count] = document_at(i + count);
            shortest = std::min(shortest, side[count].stripes());
            longest = std::max(longest, side[count].stripes());
        }
        if (count < kSide || !alike()) {
            for (size_t k = 0; k < count; ++k) hashes[i + k] = hash_one(side[k], seed);
        } else {
            uint64_t acc[kSide][4];
            side_by_side(side, shortest, seed, acc);
            for (size_t k = 0; k < kSide; ++k) {
                consume(acc[k], side[k].data + shortest * kStripe, side[k].stripes() - shortest);
                hashes[i + k] = finish(acc[k], side[k], seed);
            }
        }
        i += count;
    }
}

struct Variant {
    const char* name;
    bool runs;
    SideBySide side_by_side;  // null: document by document
};

const std::vector<Variant>& variants() {
    static const std::vector<Variant> all = {
#if defined(TRIMPOT_X86)
        {"avx512dq", cpu_has("avx512f") && cpu_has("avx512dq"), side_by_side_avx512dq},
#endif
        {"portable", true, nullptr},
    };
    return all;
}

}  // namespace

std::vector<std::string> hash_variants() {
    std::vector<std::string> names;
    for (const Variant& v : variants()) {
        if (v.runs) names.emplace_back(v.name);
    }
    return names;
}

void hash_documents(const std::int32_t* tokens, const std::int64_t* offsets, size_t documents,
                    uint64_t seed, uint64_t* hashes, const std::string& variant) {
    const auto& all = variants();
    const auto chosen = std::find_if(all.begin(), all.end(),
                                     [&](const Variant& v) { return v.runs && variant == v.name; });
    if (chosen == all.end()) {
        throw std::invalid_argument("hash variant " + variant + " does not run on this processor");
    }
    const auto document_at = [&](size_t i) {
        return Document{reinterpret_cast<Bytes>(tokens + offsets[i]),
                        static_cast<size_t>(offsets[i + 1] - offsets[i]) * sizeof(std::int32_t)};
    };
    if (chosen->side_by_side != nullptr) {
        hash_wide(chosen->side_by_side, document_at, documents, seed, hashes);
        return;
    }
    for (size_t i = 0; i < documents; ++i) hashes[i] = hash_one(document_at(i), seed);
}

}  // namespace trimpot
