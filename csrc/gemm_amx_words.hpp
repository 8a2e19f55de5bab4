// Floats as AMX multiplies them: tiles of 16 rows of 32 places along k, in 16 words of two bfloat16. Within such a step
// word j holds places j and j + 16, in A and in B: whole vectors become words, without a shuffle between their halves.
// A float32 is the exact sum of three bfloat16, high + middle + low, and 16 bits of its mantissa of the first two.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#include "gemm_parts.hpp"
#include "transpose_avx512.hpp"

namespace {

constexpr int64_t kRows = 16;          // of a tile
constexpr int64_t kDepth = 32;         // places along k of a tile
constexpr int64_t kTileFloats = 256;   // a tile in memory, 1 KB
constexpr int64_t kBlock = 2 * kRows;  // C is worked on in blocks of 2 by 2 tiles; B's panels are as wide

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// words[s * step ...]: the sixteen words (first[j], second[j]), rounded to bfloat16, then what that left of them, twice.
template <int kSplits>
PWM_FAST_INLINE void split(__m512 first, __m512 second, float* words, int64_t step) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                           20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
#pragma GCC unroll 3
    for (int s = 0; s < kSplits; ++s, words += step) {
        const auto rounded = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first));
        const __m512i pairs = _mm512_maskz_permutexvar_epi16(~__mmask32{0}, order, rounded);
        _mm512_storeu_si512(words, pairs);
        if (s + 1 == kSplits) return;
        first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(kAll, pairs, 16)));
        second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536))));
    }
}

// Sixteen vectors of words from `in`, `stride` floats apart, each with its second half `second` floats further on.
template <int kSplits>
PWM_FAST_INLINE void split_rows(const float* in, int64_t stride, int64_t second, float* out, int64_t step) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < kRows; ++i) {
        const float* const row = in + i * stride;
        split<kSplits>(_mm512_loadu_ps(row), _mm512_loadu_ps(row + second), out + i * kRows, step);
    }
}

// Up to 16 places and 32 along k of a matrix, with strides `across` and `along`, as tiles whose rows are the places (A's)
// or steps along k (B's); zero beyond. The tiles of the splits lie `step` floats apart.
template <int kSplits>
void pack_tile(const float* in, int64_t across, int64_t along, int64_t places, int64_t depth, bool rows_are_places,
               float* out, int64_t step) {
    alignas(64) float copy[kRows * kDepth];
    // A vector's words are of one place, or of 16 places at j and j + 16. Floats lie together along k, or across it.
    const bool whole = places == kRows && depth == kDepth;
    if (whole && along == 1 && rows_are_places) return split_rows<kSplits>(in, across, kLanes, out, step);
    if (whole && across == 1 && !rows_are_places) return split_rows<kSplits>(in, along, kLanes * along, out, step);
    if (whole && along == 1) {  // floats change places: they are fewer than their words
        for (int64_t k = 0; k < kDepth; k += kLanes) transpose_square(in + k, across, kRows, copy + k * kRows, kRows);
        return split_rows<kSplits>(copy, kRows, kLanes * kRows, out, step);
    }
    if (whole && across == 1) {
        for (int64_t k = 0; k < kDepth; k += kLanes) transpose_square(in + k * along, along, kLanes, copy + k, kDepth);
        return split_rows<kSplits>(copy, kDepth, kLanes, out, step);
    }
    std::memset(copy, 0, sizeof copy);
    const int64_t row = rows_are_places ? kDepth : 1, column = rows_are_places ? 1 : kRows;
    if (across == 1 && column == kRows) {
        for (int64_t k = 0; k < depth; ++k) std::copy_n(in + k * along, places, copy + k * column);
    } else if (along == 1 && row == kDepth) {
        for (int64_t i = 0; i < places; ++i) std::copy_n(in + i * across, depth, copy + i * row);
    } else {
        for (int64_t i = 0; i < places; ++i) {
            for (int64_t k = 0; k < depth; ++k) copy[i * row + k * column] = in[i * across + k * along];
        }
    }
    rows_are_places ? split_rows<kSplits>(copy, kDepth, kLanes, out, step)
                    : split_rows<kSplits>(copy, kRows, kLanes * kRows, out, step);
}

// Two neighbouring strips of 16 places along `depth` as tiles of A, or of B: [step along k][split][strip].
struct Strips {
    const float* in;
    int64_t across, along, step;  // strides of places, along k, and from one step of 32 along k to the next
    int64_t places, depth;
    bool rows_are_places;

    template <int kSplits>
    void pack(float* out) const {
        const float* from = in;
        for (int64_t k = 0; k < depth; k += kDepth, from += step, out += 2 * kSplits * kTileFloats) {
            for (int64_t strip = 0; strip < 2; ++strip) {
                const int64_t count = std::clamp<int64_t>(places - strip * kRows, 0, kRows);
                pack_tile<kSplits>(from + (count ? strip * kRows * across : 0), across, along, count,
                                   std::min(depth - k, kDepth), rows_are_places, out + strip * kTileFloats,
                                   2 * kTileFloats);
            }
        }
    }

    void pack(int64_t splits, float* out) const {
        splits == 1 ? pack<1>(out) : splits == 2 ? pack<2>(out) : pack<3>(out);
    }
};

// Floats of a pair of strips of `depth` places.
int64_t strips_floats(int64_t depth, int64_t splits) { return ceil_div(depth, kDepth) * 2 * splits * kTileFloats; }

}  // namespace
