// The product's kernel in vectors of PWM_FAST_LANES floats, for instruction sets with 16 vector registers. Structure of
// Goto and van de Geijn (2008): a block of A stays in the second-level cache and a panel of B in the first; the innermost
// kernel reads copies of both in sequence and holds a tile of C, 6 rows by 2 vectors, in 12 registers. Of bfloat16 it
// reads floats too, made once for all tiles of a panel: made in the innermost kernel they left 0.70 to 0.79 of the speed.
// Included by one source file per instruction set (see elementwise_vector.hpp).
#pragma once

#include <cstring>

#include "elementwise_vector.hpp"
#include "gemm.hpp"
#include "gemm_bf16.hpp"
#include "gemm_parts.hpp"

namespace {

constexpr int64_t kTileRows = 6;         // 12 accumulators, 2 columns of B and a broadcast: 15 of 16 registers
constexpr int64_t kPanel = 2 * kLanes;   // columns of B packed side by side
constexpr int64_t kLongest = 264;        // along k: B's panel and A's tile take 23 of 32 KB with AVX2
constexpr int64_t kBlockRows = 43 * 6;   // A's block then takes 272 of 512 KB
constexpr int64_t kLine = 16;            // floats of a cache line
constexpr int64_t kSlack = 16;           // floats that whole vectors may touch beyond the last packed ones

using Tiles = TilesOfRows<kTileRows>;

PWM_FAST_INLINE Vec multiply_add(float a, Vec b, Vec c) {
#if defined(__AVX2__)
    return _mm256_fmadd_ps(_mm256_set1_ps(a), b, c);
#else
    return a * b + c;
#endif
}

// C's tile [kRows, kVectors vectors] = or += A's packed tile times B's panel; `last` stores the last vector of columns.
template <int kRows, int kVectors, typename Last>
PWM_FAST_INLINE void tile(const float* a, const float* b, int64_t b_row, float* c, int64_t ldc, int64_t depth, Last last,
                          const float* bias, bool accumulate) {
    Vec sum[kRows][kVectors];
#pragma GCC unroll 6
    for (int i = 0; i < kRows; ++i) {
        __builtin_prefetch(c + i * ldc, 1);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sum[i][j] = Vec{};
    }
#pragma GCC unroll 4
    for (int64_t k = 0; k < depth; ++k, a += kTileRows, b += b_row) {
        Vec columns[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) columns[j] = Whole{}.load(b + j * kLanes);
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(a[i], columns[j], sum[i][j]);
        }
    }
    const auto finish = [&](int j, auto part) __attribute__((always_inline)) {
        const Vec start = bias ? part.load(bias + j * kLanes) : Vec{};
#pragma GCC unroll 6
        for (int i = 0; i < kRows; ++i) {
            float* const at = c + i * ldc + j * kLanes;
            part.store(at, sum[i][j] + (accumulate ? part.load(at) : start));
        }
    };
    if constexpr (kVectors == 2) finish(0, Whole{});
    finish(kVectors - 1, last);
}

using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t, int, const float*, bool);

// `width` counts the columns that are stored.
template <int kRows, int kVectors>
void run_tile(const float* a, const float* b, int64_t b_row, float* c, int64_t ldc, int64_t depth, int width,
              const float* bias, bool accumulate) {
    if (width == kVectors * kLanes) {
        tile<kRows, kVectors>(a, b, b_row, c, ldc, depth, Whole{}, bias, accumulate);
    } else {
        tile<kRows, kVectors>(a, b, b_row, c, ldc, depth, Part{width - (kVectors - 1) * kLanes}, bias, accumulate);
    }
}

template <int kVectors>
constexpr Tile kTiles[kTileRows] = {run_tile<1, kVectors>, run_tile<2, kVectors>, run_tile<3, kVectors>,
                                    run_tile<4, kVectors>, run_tile<5, kVectors>, run_tile<6, kVectors>};

#if defined(__AVX2__)
// out[k * out_row + i] = in[i * in_row + k] for 8 columns k and `rows` of at most kRows rows i, zero for rows beyond.
template <int kRows>
PWM_FAST_INLINE void transpose_square(const float* in, int64_t in_row, int64_t rows, float* out, int64_t out_row) {
    __m256 r[8], t[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
        r[i] = i < kRows && i < rows ? _mm256_loadu_ps(in + i * in_row) : _mm256_setzero_ps();
    }
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + i * out_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) _mm256_storeu_ps(out + (i + 4) * out_row, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
}
#endif

// out[k][i] = in(i, k) for `width` <= kWidth places i and `depth` places k, with strides `across` in i and `along` in k;
// zero for the places beyond `width`. k ascends, so that a vector's end beyond kWidth is mended by the next one.
template <int64_t kWidth>
void pack_strip(const float* in, int64_t across, int64_t along, int64_t width, int64_t depth, float* out) {
    int64_t k = 0;
    if (across == 1 && width == kWidth) {
        for (; k < depth; ++k) std::memcpy(out + k * kWidth, in + k * along, kWidth * sizeof(float));
        return;
    }
    if (across == 1) {
        for (; k < depth; ++k) {
            for (int64_t i = 0; i < kWidth; i += kLanes) {
                const Part part{static_cast<int>(least(most(width - i, 0), kLanes))};
                Whole{}.store(out + k * kWidth + i, part.load(in + k * along + i));
            }
        }
        return;
    }
#if defined(__AVX2__)
    if (along == 1) {
        for (; k + 8 <= depth; k += 8) {
            for (int64_t i = 0; i < kWidth; i += 8) {
                transpose_square<least(kWidth, 8)>(in + i * across + k, across, width - i, out + k * kWidth + i, kWidth);
            }
        }
    }
#endif
    for (; k < depth; ++k) {
        for (int64_t i = 0; i < kWidth; ++i) out[k * kWidth + i] = i < width ? in[i * across + k * along] : 0.0f;
    }
}

void pack_panel(const Matrix& b, int64_t first_k, int64_t depth, int64_t column, int64_t n, float* out) {
    pack_strip<kPanel>(b.data + first_k * b.row + column * b.column, b.column, b.row, least(n - column, kPanel), depth, out);
}

// row_sums[0 .. rows) = or += sums of a packed tile of A along k, in four chains that do not wait for one another.
void sum_rows(const float* packed, int64_t rows, int64_t depth, float* row_sums, bool accumulate) {
    constexpr int kVectors = (kTileRows + kLanes - 1) / kLanes;
    Vec sums[4][kVectors] = {};
    int64_t k = 0;
    const auto add = [&](int chain) {
        for (int j = 0; j < kVectors; ++j) sums[chain][j] += Whole{}.load(packed + (k + chain) * kTileRows + j * kLanes);
    };
    for (; k + 4 <= depth; k += 4) {
        for (int chain = 0; chain < 4; ++chain) add(chain);
    }
    for (; k < depth; ++k) add(0);
    for (int64_t i = 0; i < rows; ++i) {
        float total = accumulate ? row_sums[i] : 0.0f;
        for (int chain = 0; chain < 4; ++chain) total += sums[chain][i / kLanes][i % kLanes];
        row_sums[i] = total;
    }
}

// Asks for lines [begin, end), `step` floats apart, of what will be read soon and comes from beyond the second-level cache:
// a twentieth of the product otherwise.
PWM_FAST_INLINE void fetch(const float* from, int64_t step, int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) __builtin_prefetch(from + line * step, 0, 2);
}

// The order in which products go through A [m, k]: calls body(first row, rows, first k, depth, floats of A before). Pairs
// need a first k that is even.
template <typename Body>
PWM_FAST_INLINE void for_blocks(int64_t m, int64_t k, Body body) {
    const int64_t parts = pieces(k, kLongest), blocks = pieces(m, kBlockRows);
    const auto edge = [&](int64_t part) { return part < parts ? k * part / parts / 2 * 2 : k; };
    int64_t before = 0;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = edge(part), depth = edge(part + 1) - from;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t begin = m * block / blocks, height = m * (block + 1) / blocks - begin;
            body(begin, height, from, depth, before);
            before += pieces(height, kTileRows) * kTileRows * depth;
        }
    }
}

// A block of A in tiles of rows, rounded for products in bfloat16, and its rows' sums where they are wanted.
void pack_block(const Matrix& a, int64_t begin, int64_t height, int64_t k, int64_t depth, float* out, float* row_sums,
                bool bf16 = false) {
    const Tiles tiles(height);
    for (int64_t t = 0; t < tiles.count; ++t, out += kTileRows * depth) {
        const int64_t row = begin + tiles.edge(t), rows = tiles.height(t);
        pack_strip<kTileRows>(part_of(a, row, k).data, a.row, a.column, rows, depth, out);
        if (row_sums) sum_rows(out, rows, depth, row_sums + row, k > 0);
        if (bf16) round_to_bf16(out, kTileRows * depth);
    }
}

int64_t packed_rows_floats(int64_t m, int64_t k, bool) {
    int64_t count = kSlack;
    for_blocks(m, k, [&](int64_t, int64_t height, int64_t, int64_t depth, int64_t) {
        count += pieces(height, kTileRows) * kTileRows * depth;
    });
    return count;
}

void pack_rows(const Matrix& a, int64_t m, int64_t k, bool, float* out) {
    for_blocks(m, k, [&](int64_t begin, int64_t height, int64_t from, int64_t depth, int64_t before) {
        pack_block(a, begin, height, from, depth, out + before, nullptr);
    });
}

// Columns of C counted in panels [first, last), from rows [begin, begin + height) and `depth` places from k.
void multiply_block(const Product& p, int64_t first, int64_t last, int64_t begin, int64_t height, int64_t k,
                    int64_t depth, const float* a, Scratch& for_b) {
    const Tiles tiles(height);
    // Lines of B's next panel, shared out among the tiles. A transposed B's are neighbours along k: they come by themselves.
    const auto rows_of_b = [&](int64_t length) { return p.bf16 ? pairs_of(length) : length; };
    const int64_t step = p.packed ? kLine : p.b.row;
    const int64_t lines = p.packed ? rows_of_b(depth) * kPanel / kLine : p.b.column == 1 ? depth : 0;
    const int64_t share = pieces(lines, tiles.count);
    for (int64_t panel = first; panel < last; ++panel) {
        const int64_t column = panel * kPanel, width = least(p.n - column, kPanel);
        float* const c = p.c + (p.c_panel ? panel * p.c_panel : column);
        const float* b = p.b.data + (panel * rows_of_b(p.k) + rows_of_b(k)) * kPanel;
        const float* const next = p.packed ? b + kPanel * rows_of_b(p.k) : part_of(p.b, k, column + kPanel).data;
        int64_t b_row = kPanel;
        if (p.work && p.packed && begin == 0) p.work->before(b - p.b.data, depth * kPanel);
        if (p.bf16) {
            float* const wide = for_b.floats(2 * kPanel * pairs_of(depth));
            widen_pairs<kPanel>(b, pairs_of(depth), wide);
            b = wide;
        } else if (!p.packed && p.b.column == 1 && width == kPanel && tiles.count == 1) {  // a copy that is read once does not pay
            b = p.b.data + k * p.b.row + column;
            b_row = p.b.row;
        } else if (!p.packed) {
            float* const packed = for_b.floats(kPanel * depth);
            pack_panel(p.b, k, depth, column, p.n, packed);
            b = packed;
        }
        const Tile* const run = width > kLanes ? kTiles<2> : kTiles<1>;
        for (int64_t t = 0; t < tiles.count; ++t) {
            const int64_t from = t * share, to = least(from + share, lines);
            if (panel + 1 < last) fetch(next, step, from, to);
            if (panel + 1 < last && p.work && begin == 0) {
                for (const float* beside : p.work->beside) {
                    if (beside) fetch(beside + (next - p.b.data), step, from, to);
                }
            }
            run[tiles.height(t) - 1](a + t * kTileRows * depth, b, b_row, c + (begin + tiles.edge(t)) * p.ldc, p.ldc, depth,
                                     static_cast<int>(width), p.bias ? p.bias + column : nullptr, k > 0);
        }
        if (p.work && k + depth == p.k) p.work->after(panel, begin, height);
    }
}

void multiply(const Product& p, int64_t first, int64_t last) {
    if (is_column(p)) return multiply_column(p);
    thread_local Scratch for_a, for_b;
    for_blocks(p.m, p.k, [&](int64_t begin, int64_t height, int64_t k, int64_t depth, int64_t before) {
        if (p.a_packed) return multiply_block(p, first, last, begin, height, k, depth, p.a.data + before, for_b);
        float* const a = for_a.floats(pieces(height, kTileRows) * kTileRows * depth);
        float* const row_sums = first == 0 ? p.row_sums : nullptr;  // one task per row of C sums
        pack_block(p.a, begin, height, k, depth, a, row_sums, p.bf16);
        multiply_block(p, first, last, begin, height, k, depth, a, for_b);
    });
}

void pack(const Matrix& b, int64_t k, int64_t n, float* out) {
    for (int64_t column = 0; column < n; column += kPanel) pack_panel(b, 0, k, column, n, out + column * k);
}

void pack_bf16(const Matrix& b, int64_t k, int64_t n, float* out) {
    thread_local Scratch for_b;
    const auto floats = [&](int64_t column, float* panel) { pack_panel(b, 0, k, column, n, panel); };
    pack_pairs<kPanel>(k, n, for_b.floats(kPanel * k), out, floats);
}

float multiply_adds(int64_t rounds) {
    Vec sums[pwm_fast::kChains];
#pragma GCC unroll 12
    for (int j = 0; j < pwm_fast::kChains; ++j) sums[j] = splat(static_cast<float>(j));  // all different: none is spared
    const Vec step = splat(0.5f);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (int j = 0; j < pwm_fast::kChains; ++j) sums[j] = multiply_add(0.5f, sums[j], step);
    }
    Vec total{};
#pragma GCC unroll 12
    for (int j = 0; j < pwm_fast::kChains; ++j) total += sums[j];
    return sum_lanes(total);
}

}  // namespace
