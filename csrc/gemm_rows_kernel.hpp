// The kernel of gemm_rows.hpp in vectors of PWM_FAST_LANES floats: scalar products of A's rows with several of W's at once.
// Neighbouring rows of W are streams of their own for the processor's prefetching, which one sequence does not saturate:
// four read 33 MB in 0.8 of the time of a plain loop over them, and prefetches in software made it slower.
// Included by one source file per instruction set (see elementwise_vector.hpp).
#pragma once

#include "elementwise_vector.hpp"
#include "gemm.hpp"

namespace {

using pwm_fast::Product;

constexpr int kTileRows = 3;     // of A
constexpr int kTileColumns = 4;  // rows of W: 12 accumulators, 3 vectors of A and one of W fill 16 registers

PWM_FAST_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
    return _mm512_fmadd_ps(a, b, c);
#elif defined(__AVX2__)
    return _mm256_fmadd_ps(a, b, c);
#else
    return a * b + c;
#endif
}

// c[i][j] = bias[j] + the scalar product of rows i of A and j of W: one chain of multiply-adds per lane, whatever the tile.
template <int kRows, int kColumns>
void tile(const float* a, int64_t a_row, const float* w, int64_t w_row, int64_t depth, const float* bias, float* c,
          int64_t ldc) {
    Vec sum[kRows][kColumns] = {};
    for_columns(depth, [&](int64_t k, auto part) __attribute__((always_inline)) {
        Vec rows[kRows];
#pragma GCC unroll 3
        for (int i = 0; i < kRows; ++i) rows[i] = part.load(a + i * a_row + k);
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) {
            const Vec weights = part.load(w + j * w_row + k);
#pragma GCC unroll 3
            for (int i = 0; i < kRows; ++i) sum[i][j] = multiply_add(rows[i], weights, sum[i][j]);
        }
    });
#pragma GCC unroll 3
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) c[i * ldc + j] = (bias ? bias[j] : 0.0f) + sum_lanes(sum[i][j]);
    }
}

using Tile = void (*)(const float*, int64_t, const float*, int64_t, int64_t, const float*, float*, int64_t);

constexpr Tile kTiles[kTileRows][kTileColumns] = {{tile<1, 1>, tile<1, 2>, tile<1, 3>, tile<1, 4>},
                                                  {tile<2, 1>, tile<2, 2>, tile<2, 3>, tile<2, 4>},
                                                  {tile<3, 1>, tile<3, 2>, tile<3, 3>, tile<3, 4>}};

void multiply_rows(const Product& p, int64_t first, int64_t last) {
    for (int64_t j = first; j < last; j += kTileColumns) {  // these rows of W stay in the first-level cache for all of A's
        const int64_t columns = last - j < kTileColumns ? last - j : kTileColumns;
        for (int64_t i = 0; i < p.m; i += kTileRows) {
            const int64_t rows = p.m - i < kTileRows ? p.m - i : kTileRows;
            kTiles[rows - 1][columns - 1](p.a.data + i * p.a.row, p.a.row, p.b.data + j * p.b.column, p.b.column, p.k,
                                          p.bias ? p.bias + j : nullptr, p.c + i * p.ldc + j, p.ldc);
        }
    }
}

}  // namespace
