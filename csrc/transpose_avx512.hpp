// Transposes of AVX-512 vectors, and masks of their first lanes. Included by one source file per instruction set.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "elementwise_vector.hpp"

namespace {

constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of its own header in the unmasked forms of some operations

__mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1u); }

// Four neighbours of each fourth row from `first` on: row `first + 4 g` in quarter g, zero for rows beyond kRows.
// Loaded so, two stages of shuffles, which one port does, transpose them; whole rows would need four.
template <int kRows>
PWM_FAST_INLINE __m512 quarters(const float* in, int64_t in_row, int first) {
    const auto quarter = [&](int row) { return row < kRows ? _mm_loadu_ps(in + row * in_row) : _mm_setzero_ps(); };
    __m512 v = _mm512_castps128_ps512(quarter(first));
    v = _mm512_mask_broadcast_f32x4(v, 0x00f0, quarter(first + 4));
    v = _mm512_mask_broadcast_f32x4(v, 0x0f00, quarter(first + 8));
    return _mm512_mask_broadcast_f32x4(v, 0xf000, quarter(first + 12));
}

// out[k][i] = in[i][k] for kRows rows i and `count` columns k, a multiple of 4; zero for the rest of out's 16 columns.
template <int kRows>
void transpose(const float* in, int64_t in_row, int64_t count, float* out, int64_t out_row) {
    const auto low = [](__m512 x, __m512 y) {
        return _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, _mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto high = [](__m512 x, __m512 y) {
        return _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, _mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    for (int64_t k = 0; k < count; k += 4, in += 4, out += 4 * out_row) {
        const __m512 r0 = quarters<kRows>(in, in_row, 0), r1 = quarters<kRows>(in, in_row, 1);
        const __m512 r2 = quarters<kRows>(in, in_row, 2), r3 = quarters<kRows>(in, in_row, 3);
        const __m512 t0 = _mm512_maskz_unpacklo_ps(kAll, r0, r1), t1 = _mm512_maskz_unpackhi_ps(kAll, r0, r1);
        const __m512 t2 = _mm512_maskz_unpacklo_ps(kAll, r2, r3), t3 = _mm512_maskz_unpackhi_ps(kAll, r2, r3);
        _mm512_storeu_ps(out, low(t0, t2));
        _mm512_storeu_ps(out + out_row, high(t0, t2));
        _mm512_storeu_ps(out + 2 * out_row, low(t1, t3));
        _mm512_storeu_ps(out + 3 * out_row, high(t1, t3));
    }
}

using Transpose = void (*)(const float*, int64_t, int64_t, float*, int64_t);

constexpr Transpose kTransposes[kLanes] = {
    transpose<1>,  transpose<2>,  transpose<3>,  transpose<4>,  transpose<5>,  transpose<6>,
    transpose<7>,  transpose<8>,  transpose<9>,  transpose<10>, transpose<11>, transpose<12>,
    transpose<13>, transpose<14>, transpose<15>, transpose<16>};

// The same for 16 columns.
inline void transpose_square(const float* in, int64_t in_row, int64_t rows, float* out, int64_t out_row) {
    kTransposes[rows - 1](in, in_row, kLanes, out, out_row);
}

}  // namespace
