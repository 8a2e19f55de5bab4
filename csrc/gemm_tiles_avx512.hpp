// The product's kernel for AVX-512, included by one source file per instruction set. Structure of Goto and van de Geijn
// (2008), as in gemm_tiles.hpp: a block of A stays in the second-level cache and a panel of B in the first; the
// innermost kernel reads copies of both in sequence and holds a tile of C, 14 rows by 32 columns, in 28 registers.
// Measured on an Intel core of 230 to 250 GFLOP/s with 48 KB and 2 MB of caches: a tile alone runs at 97 to 99% of
// that, products of 64 rows on packed weights at 73 to 90% (bench/test_native.py).
// Of bfloat16, AVX512-BF16 reads B's pairs (gemm_bf16.hpp) where they lie and A copied as pairs; elsewhere floats are made
// of B's pairs once for all tiles of a panel, and A is rounded.
#pragma once

#define PWM_FAST_LANES 16
#include "gemm.hpp"
#include "gemm_bf16.hpp"
#include "gemm_parts.hpp"
#include "transpose_avx512.hpp"

#include <immintrin.h>

#include <algorithm>

namespace pwm_fast {
namespace {

constexpr int64_t kPanel = 32;
constexpr int64_t kTileRows = 14;    // 28 accumulators, 2 columns of B and a broadcast: 31 of 32 registers
constexpr int64_t kTileStride = 16;  // rows of a packed tile of A are padded to one vector
constexpr int64_t kLongest = 320;               // along k: B's panel then takes 40 KB; of 256 to 384 none is better
constexpr int64_t kBlockRows = 37 * kTileRows;  // A's block then takes 760 KB of 1 or 2 MB
constexpr int64_t kLine = 16;                   // floats of a cache line
constexpr int64_t kFloat = sizeof(float);
constexpr int64_t kAhead = 24 * kTileStride;    // in floats: A's tiles come from the second level, this early

using Tiles = TilesOfRows<kTileRows>;

#ifdef __AVX512BF16__
constexpr int64_t kStep = 2;  // places along k that one multiplication takes

PWM_FAST_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
constexpr int64_t kStep = 1;

PWM_FAST_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
#endif

// Memory that a tile asks for while it multiplies, one place in each step: what comes from beyond the second-level
// cache is spread over many steps so. Asked for at once, it holds up the tile's own loads: a tenth of a product.
struct Ahead {
    const float* from;
    int64_t bytes;  // from one step to the next
};

// C's tile [kRows, 16 kVectors] = or += A's packed tile times B's panel; `last` masks the last vector of columns. The
// loop is kept short: unrolled by 4 it outgrows the decoders' cache and loses a tenth.
template <int kRows, int kVectors>
void tile(const float* a, const float* b, int64_t b_row, float* c, int64_t ldc, int64_t steps, __mmask16 last,
          const float* bias, bool accumulate, Ahead ahead) {
    __m512 sum[kRows][kVectors];
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
        __builtin_prefetch(c + i * ldc, 1);
        __builtin_prefetch(c + i * ldc + (kVectors - 1) * kLanes, 1);
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) sum[i][j] = _mm512_setzero_ps();
    }
    const char* next = reinterpret_cast<const char*>(ahead.from);
    const float* const end = a + steps * kTileStride;
    for (; a != end; a += kTileStride, b += b_row, next += ahead.bytes) {
        __builtin_prefetch(next, 0, 2);
        __builtin_prefetch(a + kAhead, 0, 3);
        __m512 columns[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) columns[j] = _mm512_loadu_ps(b + j * kLanes);
#pragma GCC unroll 14
        for (int i = 0; i < kRows; ++i) {
            const __m512 row = _mm512_set1_ps(a[i]);
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(row, columns[j], sum[i][j]);
        }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
        const __mmask16 mask = j == kVectors - 1 ? last : kAll;
        const __m512 start = bias ? _mm512_maskz_loadu_ps(mask, bias + j * kLanes) : _mm512_setzero_ps();
#pragma GCC unroll 14
        for (int i = 0; i < kRows; ++i) {
            float* const at = c + i * ldc + j * kLanes;
            const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, at) : start;
            _mm512_mask_storeu_ps(at, mask, _mm512_add_ps(sum[i][j], before));
        }
    }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t, __mmask16, const float*, bool,
                      Ahead);

template <int kVectors>
constexpr Tile kTiles[kTileRows] = {
    tile<1, kVectors>, tile<2, kVectors>,  tile<3, kVectors>,  tile<4, kVectors>,  tile<5, kVectors>,
    tile<6, kVectors>, tile<7, kVectors>,  tile<8, kVectors>,  tile<9, kVectors>,  tile<10, kVectors>,
    tile<11, kVectors>, tile<12, kVectors>, tile<13, kVectors>, tile<14, kVectors>};

// out[k][i] = in(i, k) for `width` <= 16 places i and `depth` places k, with strides `across` in i and `along` in k;
// zero for the places beyond `width`.
void pack_strip(const float* in, int64_t across, int64_t along, int64_t width, int64_t depth, float* out,
                int64_t out_row) {
    int64_t k = 0;
    if (across == 1) {
        const __mmask16 mask = lanes(width);
        for (; k < depth; ++k) _mm512_storeu_ps(out + k * out_row, _mm512_maskz_loadu_ps(mask, in + k * along));
        return;
    }
    if (along == 1 && width > 0) {
        k = depth / 4 * 4;
        kTransposes[width - 1](in, across, k, out, out_row);
    }
    for (; k < depth; ++k) {
        for (int64_t i = 0; i < kLanes; ++i) out[k * out_row + i] = i < width ? in[i * across + k * along] : 0.0f;
    }
}

void pack_panel(const Matrix& b, int64_t first_k, int64_t depth, int64_t first_column, int64_t n, float* out) {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
        const int64_t column = first_column + half, width = std::clamp<int64_t>(n - column, 0, kLanes);
        const float* const in = part_of(b, first_k, std::min(column, n - 1)).data;
        pack_strip(in, b.column, b.row, width, depth, out + half, kPanel);
    }
}

// The order in which products go through A [m, k]: calls body(block). Transposes and pairs like a first k that is a
// multiple of a vector.
struct Block {
    int64_t begin, height, k, depth;
    int64_t before;  // floats of A packed before
    int64_t next_k;  // of the block after this one; A's end after the last
};

template <typename Body>
PWM_FAST_INLINE void for_blocks(int64_t m, int64_t k, Body body) {
    const int64_t parts = pieces(k, kLongest), blocks = pieces(m, kBlockRows);
    const auto edge = [&](int64_t part) { return part < parts ? k * part / parts / kLanes * kLanes : k; };
    int64_t before = 0;
    for (int64_t part = 0; part < parts; ++part) {
        const int64_t from = edge(part), depth = edge(part + 1) - from;
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t begin = m * block / blocks, height = m * (block + 1) / blocks - begin;
            body(Block{begin, height, from, depth, before, block + 1 < blocks ? from : from + depth});
            before += pieces(height, kTileRows) * kTileStride * depth;
        }
    }
}

// row_sums[0 .. rows) = or += sums of a packed tile of A along k, in four chains that do not wait for one another.
void sum_rows(const float* packed, int64_t rows, int64_t depth, float* row_sums, bool accumulate) {
    __m512 sums[4] = {};
    int64_t k = 0;
    const auto add = [&](int chain) {
        sums[chain] = _mm512_add_ps(sums[chain], _mm512_loadu_ps(packed + (k + chain) * kTileStride));
    };
    for (; k + 4 <= depth; k += 4) {
        for (int chain = 0; chain < 4; ++chain) add(chain);
    }
    for (; k < depth; ++k) add(0);
    const __mmask16 mask = lanes(rows);
    const __m512 before = accumulate ? _mm512_maskz_loadu_ps(mask, row_sums) : _mm512_setzero_ps();
    const __m512 total = _mm512_add_ps(_mm512_add_ps(sums[0], sums[1]), _mm512_add_ps(sums[2], sums[3]));
    _mm512_mask_storeu_ps(row_sums, mask, _mm512_add_ps(before, total));
}

// A block of A in tiles of rows, rounded for products in bfloat16, and its rows' sums where they are wanted.
void pack_block(const Matrix& a, const Block& block, float* out, float* row_sums, bool bf16 = false) {
    const Tiles tiles(block.height);
    for (int64_t t = 0; t < tiles.count; ++t) {
        const int64_t row = block.begin + tiles.edge(t), rows = tiles.height(t);
        pack_strip(part_of(a, row, block.k).data, a.row, a.column, rows, block.depth, out, kTileStride);
        if (row_sums) sum_rows(out, rows, block.depth, row_sums + row, block.k > 0);
        if (bf16 && kStep == 2) {
            pair_rows<kTileStride>(out, block.depth, out);
        } else if (bf16) {
            round_to_bf16(out, block.depth * kTileStride);
        }
        out += kTileStride * (bf16 && kStep == 2 ? pairs_of(block.depth) : block.depth);
    }
}

// One block of a product's A, and where its panels of B are.
struct BlockProduct {
    const Product& p;
    const Block& block;

    int64_t rows_of_b(int64_t length) const { return p.bf16 ? pairs_of(length) : length; }
    const float* packed(int64_t panel, int64_t k) const {
        return p.b.data + (panel * rows_of_b(p.k) + rows_of_b(k)) * kPanel;
    }

    // What tile t of `tiles` asks for of the panel that comes next: a share of a packed one, or row by row one of a
    // row-major one's two lines. A transposed B's are neighbours along k and come by themselves.
    Ahead ahead(int64_t panel, int64_t k, int64_t t, int64_t tiles, int64_t steps) const {
        if (k < p.k && p.packed) {
            const int64_t floats = rows_of_b(block.depth) * kPanel, bytes = pieces(floats * kFloat, tiles * steps);
            return {packed(panel, k) + t * bytes * steps / kFloat, bytes};
        }
        if (k < p.k && p.b.column == 1 && t * kLine < kPanel) {
            return {part_of(p.b, k, panel * kPanel + t * kLine).data, p.b.row * kFloat};
        }
        return {p.b.data, 0};
    }

    // Columns of C counted in panels [first, last), from the block's rows of A.
    void multiply(int64_t first, int64_t last, const float* a, Scratch& for_b) const {
        const Tiles tiles(block.height);
        const int64_t k = block.k, depth = block.depth, steps = p.bf16 && kStep == 2 ? pairs_of(depth) : depth;
        for (int64_t panel = first; panel < last; ++panel) {
            const int64_t column = panel * kPanel, width = std::min(p.n - column, kPanel);
            float* const c = p.c + (p.c_panel ? panel * p.c_panel : column);
            const float* b = packed(panel, k);
            int64_t b_row = kPanel;
            if (p.work && p.packed && block.begin == 0) p.work->before(b - p.b.data, depth * kPanel);
            if (p.bf16 && kStep == 1) {
                float* const wide = for_b.floats(2 * kPanel * pairs_of(depth));
                widen_pairs<kPanel>(b, pairs_of(depth), wide);
                b = wide;
            } else if (!p.packed && p.b.column == 1 && width == kPanel && tiles.count == 1) {
                // A copy that is read once does not pay.
                b = part_of(p.b, k, column).data;
                b_row = p.b.row;
            } else if (!p.packed) {
                float* const copy = for_b.floats(kPanel * depth);
                pack_panel(p.b, k, depth, column, p.n, copy);
                b = copy;
            }
            const bool wide = width > kLanes, ends = panel + 1 == last;
            const Tile* const run = wide ? kTiles<2> : kTiles<1>;
            const __mmask16 mask = lanes(wide ? width - kLanes : width);
            for (int64_t t = 0; t < tiles.count; ++t) {
                const Ahead next = ahead(ends ? first : panel + 1, ends ? block.next_k : k, t, tiles.count, steps);
                float* const rows = c + (block.begin + tiles.edge(t)) * p.ldc;
                run[tiles.height(t) - 1](a + t * kTileStride * steps, b, b_row, rows, p.ldc, steps, mask,
                                         p.bias ? p.bias + column : nullptr, k > 0, next);
            }
            if (p.work && k + depth == p.k) p.work->after(panel, block.begin, block.height);
        }
    }
};

void multiply(const Product& p, int64_t first, int64_t last) {
    if (is_column(p)) return multiply_column(p);
    thread_local Scratch for_a, for_b;
    for_blocks(p.m, p.k, [&](const Block& block) {
        const BlockProduct product{p, block};
        if (p.a_packed) return product.multiply(first, last, p.a.data + block.before, for_b);
        float* const a = for_a.floats(pieces(block.height, kTileRows) * kTileStride * block.depth);
        pack_block(p.a, block, a, first == 0 ? p.row_sums : nullptr, p.bf16);  // one task per row of C sums
        product.multiply(first, last, a, for_b);
    });
}

}  // namespace
}  // namespace pwm_fast
