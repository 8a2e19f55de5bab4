// random_pair of csrc/philox.hpp for as many indices at once as a vector has 64-bit numbers: one by one, the rounds take a
// quarter of the time of start states. Included by one source file per instruction set, as sampling_gather.hpp.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "sampling.hpp"

namespace {

constexpr int64_t kPairs = PWM_FAST_LANES / 2;

// Of each number the low half is a word of the counter; what is in the high half changes nothing.
typedef uint64_t Words __attribute__((vector_size(8 * kPairs)));

inline __attribute__((always_inline)) Words times(Words words, uint32_t factor) {
#ifdef __AVX512F__
    return reinterpret_cast<Words>(_mm512_mul_epu32(reinterpret_cast<__m512i>(words), _mm512_set1_epi64(factor)));
#else
    return reinterpret_cast<Words>(_mm256_mul_epu32(reinterpret_cast<__m256i>(words), _mm256_set1_epi64x(factor)));
#endif
}

void random_pairs(uint64_t seed, uint32_t stream, uint64_t step, uint32_t index, int64_t count,
                  pwm_fast::RandomPairs& pairs) {
    static_assert(pwm_fast::RandomPairs::kMost % kPairs == 0, "whole vectors are written");
    Words indices;
    for (int64_t i = 0; i < kPairs; ++i) indices[i] = index + static_cast<uint64_t>(i);
    for (int64_t i = 0; i < count; i += kPairs, indices += kPairs) {
        Words word0 = indices, word1 = Words{} + stream, word2 = Words{} + step, word3 = Words{} + (step >> 32);
        auto key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
        for (int round = 0; round < 10; ++round) {
            const Words product0 = times(word0, 0xD2511F53u), product1 = times(word2, 0xCD9E8D57u);
            word0 = (product1 >> 32) ^ word1 ^ key0;
            word1 = product1;
            word2 = (product0 >> 32) ^ word3 ^ key1;
            word3 = product0;
            key0 += 0x9E3779B9u;
            key1 += 0xBB67AE85u;
        }
        const Words first = (word0 & 0xFFFFFFFFu) | (word1 << 32), second = (word2 & 0xFFFFFFFFu) | (word3 << 32);
        __builtin_memcpy(pairs.first + i, &first, sizeof first);
        __builtin_memcpy(pairs.second + i, &second, sizeof second);
    }
}

}  // namespace
