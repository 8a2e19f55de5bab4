// The innermost product of AMX: blocks of C, 2 by 2 tiles, in four of its eight registers.
#pragma once

#include "gemm_amx_words.hpp"

namespace {

// What the eight registers hold: C's tiles in 0 to 3, A's in 4 and 5, B's in 6 and 7, all of 16 rows of 64 bytes.
struct TileShapes {
    TileShapes() {
        struct alignas(64) {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes;
        _tile_loadconfig(&shapes);
    }
    TileShapes(const TileShapes&) = delete;
    TileShapes& operator=(const TileShapes&) = delete;
    ~TileShapes() { _tile_release(); }
};

// Where a tile of C comes from and goes to; C itself where it is whole.
struct Place {
    const float* from;
    int64_t from_row;
    float* to;
    int64_t to_row;
};

// Asks for what the next panel will be read from, a few lines in each step, before it is needed: a tenth of a product by
// 19 MB of weights, a twentieth by a critic's. Where few rows share a panel it would be too many at once to be of use.
constexpr int64_t kMostLines = 16;

struct Fetch {
    const float* from = nullptr;
    int64_t lines = 0;  // in a step

    PWM_FAST_INLINE void some() {
        for (int64_t i = 0; i < lines; ++i, from += kLanes) __builtin_prefetch(from, 0, 2);
    }
};

// A tile is stored some 850 cycles late where more than 130 products of tiles were begun since the last one was: of 512
// places along k, a tenth of the time. Storing one to nowhere now and then costs nothing (Emerald Rapids).
template <int kSplits>
constexpr int64_t kStepsToStore = kSplits == 1 ? 16 : kSplits == 2 ? 4 : 2;

// C's tiles, up to two by two, += A's strips times B's, whose steps lie `b_step` floats apart. Of six products or three the
// smallest come first, in an order that loads as few tiles again as there can be.
template <int kSplits, bool kTwoRows, bool kTwoColumns>
void multiply_tiles(const float* a, const float* b, int64_t b_step, int64_t steps, const Place* c, Fetch& fetch) {
    constexpr int64_t kFloat = sizeof(float), kRow = kRows * kFloat;
    alignas(64) static thread_local float nowhere[kTileFloats];
    const auto load_a = [&](int s) __attribute__((always_inline)) {
        _tile_loadd(4, a + 2 * s * kTileFloats, kRow);
        if constexpr (kTwoRows) _tile_loadd(5, a + (2 * s + 1) * kTileFloats, kRow);
    };
    const auto load_b = [&](int s) __attribute__((always_inline)) {
        _tile_loadd(6, b + 2 * s * kTileFloats, kRow);
        if constexpr (kTwoColumns) _tile_loadd(7, b + (2 * s + 1) * kTileFloats, kRow);
    };
    const auto products = [&]() __attribute__((always_inline)) {
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (kTwoColumns) _tile_dpbf16ps(1, 4, 7);
        if constexpr (kTwoRows) _tile_dpbf16ps(2, 5, 6);
        if constexpr (kTwoRows && kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    };
    asm volatile("" ::: "memory");  // tile loads do not tell the compiler that they read memory
    _tile_loadd(0, c[0].from, c[0].from_row * kFloat);
    if constexpr (kTwoColumns) _tile_loadd(1, c[1].from, c[1].from_row * kFloat);
    if constexpr (kTwoRows) _tile_loadd(2, c[2].from, c[2].from_row * kFloat);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c[3].from, c[3].from_row * kFloat);
    for (int64_t k = 0; k < steps; ++k, a += 2 * kSplits * kTileFloats, b += b_step) {
        if (k % kStepsToStore<kSplits> == kStepsToStore<kSplits> - 1) _tile_stored(0, nowhere, kRow);
        fetch.some();
        load_a(0);
        if constexpr (kSplits == 3) {
            load_b(2), products();
            load_b(1), products();
            load_a(1), products();
            load_b(0), products();
            load_a(2), products();
            load_a(0), products();
        } else if constexpr (kSplits == 2) {
            load_b(1), products();
            load_b(0), products();
            load_a(1), products();
        } else {
            load_b(0), products();
        }
    }
    _tile_stored(0, c[0].to, c[0].to_row * kFloat);
    if constexpr (kTwoColumns) _tile_stored(1, c[1].to, c[1].to_row * kFloat);
    if constexpr (kTwoRows) _tile_stored(2, c[2].to, c[2].to_row * kFloat);
    if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c[3].to, c[3].to_row * kFloat);
}

// Up to 32 rows and columns of C += their blocks of A and B, or = with the bias. Tiles that reach beyond go over a copy.
template <int kSplits>
void multiply_block(const float* a, const float* b, int64_t b_step, int64_t steps, int64_t rows, int64_t columns, float* c,
                    int64_t ldc, const float* bias, bool accumulate, Fetch& fetch) {
    alignas(64) float copies[4][kTileFloats], start[kBlock];
    if (!accumulate) {
        for (int64_t j = 0; j < kBlock; j += kLanes) {
            _mm512_store_ps(start + j, bias ? _mm512_maskz_loadu_ps(lanes(columns - j), bias + j) : _mm512_setzero_ps());
        }
    }
    Place places[4];
    const auto part = [&](int t, auto body) {
        const int64_t row = t / 2 * kRows, column = t % 2 * kRows;
        const __mmask16 mask = lanes(columns - column);
        for (int64_t i = 0; i < std::min(rows - row, kRows); ++i) {
            body(copies[t] + i * kRows, c + (row + i) * ldc + column, mask);
        }
    };
    const bool two_rows = rows > kRows, two_columns = columns > kRows;
    const auto whole = [&](int t) { return rows >= (t / 2 + 1) * kRows && columns >= (t % 2 + 1) * kRows; };
    for (int t = 0; t < 4; ++t) {
        if ((t / 2 && !two_rows) || (t % 2 && !two_columns)) continue;
        float* const here = c + t / 2 * kRows * ldc + t % 2 * kRows;
        places[t] = whole(t) ? Place{here, ldc, here, ldc} : Place{copies[t], kRows, copies[t], kRows};
        if (!accumulate) {
            places[t].from = start + t % 2 * kRows, places[t].from_row = 0;
        } else if (!whole(t)) {
            std::memset(copies[t], 0, sizeof copies[t]);
            part(t, [](float* copy, const float* at, __mmask16 mask) {
                _mm512_store_ps(copy, _mm512_maskz_loadu_ps(mask, at));
            });
        }
    }
    const auto run = two_rows ? (two_columns ? multiply_tiles<kSplits, true, true> : multiply_tiles<kSplits, true, false>)
                              : (two_columns ? multiply_tiles<kSplits, false, true> : multiply_tiles<kSplits, false, false>);
    run(a, b, b_step, steps, places, fetch);
    for (int t = 0; t < 4; ++t) {
        if ((t / 2 && !two_rows) || (t % 2 && !two_columns) || whole(t)) continue;
        part(t, [](const float* copy, float* at, __mmask16 mask) {
            _mm512_mask_storeu_ps(at, mask, _mm512_load_ps(copy));
        });
    }
}

}  // namespace
