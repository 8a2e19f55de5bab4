// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): a counter-based generator, so
// the n-th number needs no state and does not depend on which thread asks for it.
#pragma once

#include <array>
#include <cstdint>

namespace pwm_fast {

inline std::array<uint32_t, 4> philox4x32_10(std::array<uint32_t, 4> counter, uint32_t key0, uint32_t key1) {
    for (int round = 0; round < 10; ++round) {
        const uint64_t product0 = uint64_t{0xD2511F53u} * counter[0];
        const uint64_t product1 = uint64_t{0xCD9E8D57u} * counter[2];
        counter = {static_cast<uint32_t>(product1 >> 32) ^ counter[1] ^ key0, static_cast<uint32_t>(product1),
                   static_cast<uint32_t>(product0 >> 32) ^ counter[3] ^ key1, static_cast<uint32_t>(product0)};
        key0 += 0x9E3779B9u;
        key1 += 0xBB67AE85u;
    }
    return counter;
}

struct RandomPair {
    uint64_t first, second;
};

// Twice 64 random bits for element `index` of draw number `step` of one stream of one seed.
inline RandomPair random_pair(uint64_t seed, uint32_t stream, uint64_t step, uint32_t index) {
    const auto words = philox4x32_10({index, stream, static_cast<uint32_t>(step), static_cast<uint32_t>(step >> 32)},
                                     static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
    return {words[0] | (uint64_t{words[1]} << 32), words[2] | (uint64_t{words[3]} << 32)};
}

// Pairs of consecutive indices.
struct RandomPairs {
    static constexpr int64_t kMost = 64;
    uint64_t first[kMost], second[kMost];

    RandomPair operator[](int64_t i) const { return {first[i], second[i]}; }
};

// A number in [0, limit): the high half of the 128-bit product. Its bias is below limit / 2^64. In 32-bit halves, as in
// the numpy definition, where there is no 128-bit integer.
inline uint64_t scale_to(uint64_t bits, uint64_t limit) {
#if defined(__SIZEOF_INT128__)
    __extension__ typedef unsigned __int128 Product;
    return static_cast<uint64_t>(static_cast<Product>(bits) * limit >> 64);
#else
    const uint64_t a0 = bits & 0xFFFFFFFFu, a1 = bits >> 32, b0 = limit & 0xFFFFFFFFu, b1 = limit >> 32;
    const uint64_t low = a0 * b0, mid0 = a1 * b0 + (low >> 32), mid1 = a0 * b1 + (mid0 & 0xFFFFFFFFu);
    return a1 * b1 + (mid0 >> 32) + (mid1 >> 32);
#endif
}

}  // namespace pwm_fast
