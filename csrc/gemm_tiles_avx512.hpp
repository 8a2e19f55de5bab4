// The product's kernel for AVX-512, included by one source file per instruction set. Structure of Goto and van de Geijn
// (2008): blocks of A and panels of B are copied so that the innermost kernel reads both in sequence; it holds a tile of C,
// 14 rows by 32 columns, in 28 registers. Measured on Zen 4, one core of 115 GFLOP/s: 105 to 112 at 64 to 256 rows with
// operands in its cache, 95 to 102 from the third level (packing B^T takes 7%, packing A 3 to 6%), where torch's MKL and
// oneDNN had 80 to 95 in extraction because they copy a transposed B each time and add the bias in another pass.
// Of bfloat16, AVX512-BF16 reads B's pairs (gemm_bf16.hpp) where they lie and A copied as pairs; elsewhere floats are made
// of B's pairs when other products would copy B, and A is rounded.
#pragma once

#define PWM_FAST_LANES 16
#include "gemm.hpp"
#include "gemm_bf16.hpp"

#include <immintrin.h>

#include <algorithm>
#include <memory>

namespace pwm_fast {
namespace {

constexpr int64_t kPanel = 32;
constexpr int64_t kTileRows = 14;    // 28 accumulators, 2 columns of B and a broadcast: 31 of 32 registers
constexpr int64_t kTileStride = 16;  // rows of a packed tile of A are padded to one vector
constexpr int64_t kSmall = 3 << 17;       // floats of B that count as small, 1.5 MB
constexpr int64_t kSmallDepth = 1024;     // A's packed tile is then 64 KB at most
constexpr int64_t kBlockRows = 18 * kTileRows;  // for large B: A's block, 252 x 640, stays in the second-level cache
constexpr int64_t kBlockDepth = 640;
constexpr __mmask16 kAll = 0xffff;  // GCC 12 warns of its own header in the unmasked forms of some operations

__mmask16 lanes(int64_t count) { return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, kLanes)) - 1u); }

#ifdef __AVX512BF16__
constexpr int64_t kStep = 2;  // places along k that one multiplication takes

PWM_FAST_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#else
constexpr int64_t kStep = 1;

PWM_FAST_INLINE __m512 multiply_add(__m512 a, __m512 b, __m512 sum) { return _mm512_fmadd_ps(a, b, sum); }
#endif

// C's tile [kRows, 16 kVectors] += or = A's packed tile times B's panel; `last` masks the last vector of columns.
template <int kRows, int kVectors>
void tile(const float* a, const float* b, int64_t b_row, float* c, int64_t ldc, int64_t depth, __mmask16 last,
          const float* bias, bool accumulate) {
    __m512 sum[kRows][kVectors];
    const auto mask = [&](int j) { return j == kVectors - 1 ? last : static_cast<__mmask16>(0xffff); };
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
        const __m512 start = bias ? _mm512_maskz_loadu_ps(mask(j), bias + j * kLanes) : _mm512_setzero_ps();
#pragma GCC unroll 14
        for (int i = 0; i < kRows; ++i) {
            sum[i][j] = accumulate ? _mm512_maskz_loadu_ps(mask(j), c + i * ldc + j * kLanes) : start;
        }
    }
    for (int64_t k = 0; k < depth; ++k, a += kTileStride, b += b_row) {
        __m512 columns[kVectors];
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) columns[j] = _mm512_maskz_loadu_ps(mask(j), b + j * kLanes);
#pragma GCC unroll 14
        for (int i = 0; i < kRows; ++i) {
            const __m512 row = _mm512_set1_ps(a[i]);
#pragma GCC unroll 2
            for (int j = 0; j < kVectors; ++j) sum[i][j] = multiply_add(row, columns[j], sum[i][j]);
        }
    }
#pragma GCC unroll 14
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
        for (int j = 0; j < kVectors; ++j) _mm512_mask_storeu_ps(c + i * ldc + j * kLanes, mask(j), sum[i][j]);
    }
}

using Tile = void (*)(const float*, const float*, int64_t, float*, int64_t, int64_t, __mmask16, const float*, bool);

template <int kVectors>
Tile tile_of(int64_t rows) {
    static constexpr Tile kTiles[kTileRows] = {
        tile<1, kVectors>, tile<2, kVectors>,  tile<3, kVectors>,  tile<4, kVectors>,  tile<5, kVectors>,
        tile<6, kVectors>, tile<7, kVectors>,  tile<8, kVectors>,  tile<9, kVectors>,  tile<10, kVectors>,
        tile<11, kVectors>, tile<12, kVectors>, tile<13, kVectors>, tile<14, kVectors>};
    return kTiles[rows - 1];
}

// out[k][i] = in[i][k] for `rows` <= 16 rows and 16 columns; the rest of out's 16 columns becomes zero.
void transpose_square(const float* in, int64_t in_row, int64_t rows, float* out, int64_t out_row) {
    __m512 r[16], t[16];
    for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_loadu_ps(in + i * in_row) : _mm512_setzero_ps();
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_maskz_unpacklo_ps(kAll, r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_maskz_unpackhi_ps(kAll, r[2 * i], r[2 * i + 1]);
    }
    const auto pairs = [](auto unpack, __m512 x, __m512 y) {
        return _mm512_castpd_ps(unpack(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    };
    const auto low = [](__m512d x, __m512d y) { return _mm512_maskz_unpacklo_pd(0xff, x, y); };
    const auto high = [](__m512d x, __m512d y) { return _mm512_maskz_unpackhi_pd(0xff, x, y); };
    for (int i = 0; i < 16; i += 4) {
        r[i] = pairs(low, t[i], t[i + 2]);
        r[i + 1] = pairs(high, t[i], t[i + 2]);
        r[i + 2] = pairs(low, t[i + 1], t[i + 3]);
        r[i + 3] = pairs(high, t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_maskz_shuffle_f32x4(kAll, r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_maskz_shuffle_f32x4(kAll, r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_maskz_shuffle_f32x4(kAll, r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_maskz_shuffle_f32x4(kAll, r[i + 8], r[i + 12], 0xdd);
    }
    for (int i = 0; i < 8; ++i) {
        _mm512_storeu_ps(out + i * out_row, _mm512_maskz_shuffle_f32x4(kAll, t[i], t[i + 8], 0x88));
        _mm512_storeu_ps(out + (i + 8) * out_row, _mm512_maskz_shuffle_f32x4(kAll, t[i], t[i + 8], 0xdd));
    }
}

// out[k][i] = in(i, k) for `width` <= 16 places i and `depth` places k, with strides `across` in i and `along` in k.
void pack_strip(const float* in, int64_t across, int64_t along, int64_t width, int64_t depth, float* out,
                int64_t out_row) {
    int64_t k = 0;
    if (across == 1) {
        const __mmask16 mask = lanes(width);
        for (; k < depth; ++k) _mm512_storeu_ps(out + k * out_row, _mm512_maskz_loadu_ps(mask, in + k * along));
        return;
    }
    if (along == 1) {
        for (; k + 16 <= depth; k += 16) transpose_square(in + k, across, width, out + k * out_row, out_row);
    }
    for (; k < depth; ++k) {
        for (int64_t i = 0; i < kLanes; ++i) out[k * out_row + i] = i < width ? in[i * across + k * along] : 0.0f;
    }
}

void pack_panel(const Matrix& b, int64_t first_k, int64_t depth, int64_t first_column, int64_t n, float* out) {
    for (int64_t half = 0; half < kPanel; half += kLanes) {
        const int64_t column = first_column + half, width = std::clamp<int64_t>(n - column, 0, kLanes);
        pack_strip(b.data + first_k * b.row + std::min(column, n - 1) * b.column, b.column, b.row, width, depth,
                   out + half, kPanel);
    }
}

// Memory that a thread keeps between products; its content is never read before it is written.
class Scratch {
public:
    float* floats(int64_t count) {
        if (count > size_) {
            memory_.reset(new float[static_cast<size_t>(count + kLanes + kPanel)]);  // alignment, a last pair's empty half
            size_ = count;
        }
        const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
        return reinterpret_cast<float*>((address + 63) / 64 * 64);
    }

private:
    std::unique_ptr<float[]> memory_;
    int64_t size_ = 0;
};

// One range of k and of panels of a product, and where its panels of B are.
struct Range {
    const Product& p;
    int64_t k, depth;

    int64_t steps() const { return (depth + kStep - 1) / kStep; }

    // B's panels are what the innermost kernel reads.
    bool b_is_ready() const { return p.packed && (kStep == 2 || !p.bf16); }

    // A tile of A in `steps` rows; `depth` rows of `out` are written to.
    void pack_rows(int64_t row, int64_t rows, float* out) const {
        pack_strip(p.a.data + row * p.a.row + k * p.a.column, p.a.row, p.a.column, rows, depth, out, kTileStride);
        if (kStep == 2) {
            pair_rows<kTileStride>(out, depth, out);
        } else if (p.bf16) {
            round_to_bf16(out, depth * kTileStride);
        }
    }

    // Sums of packed rows, which lie in the first-level cache now. Only who works on the first panel writes them.
    void sum_rows(const float* packed, int64_t row, int64_t rows, int64_t first) const {
        if (!p.row_sums || first > 0) return;
        const __mmask16 mask = lanes(rows);
        __m512 sum = k > 0 ? _mm512_maskz_loadu_ps(mask, p.row_sums + row) : _mm512_setzero_ps();
        for (int64_t i = 0; i < depth; ++i) sum = _mm512_add_ps(sum, _mm512_loadu_ps(packed + i * kTileStride));
        _mm512_mask_storeu_ps(p.row_sums + row, mask, sum);
    }

    void pack_columns(int64_t panel, float* out) const {
        if (p.bf16) return widen_pairs<kPanel>(packed_columns(panel), pairs_of(depth), out);
        pack_panel(p.b, k, depth, panel * kPanel, p.n, out);
    }

    const float* packed_columns(int64_t panel) const {
        if (p.bf16) return p.b.data + (panel * pairs_of(p.k) + k / 2) * kPanel;
        return p.b.data + (panel * p.k + k) * kPanel;
    }

    void multiply(const float* a, const float* b, int64_t b_row, int64_t row, int64_t rows, int64_t panel) const {
        const int64_t column = panel * kPanel, width = std::min(p.n - column, kPanel);
        const bool wide = width > kLanes;
        const Tile run = wide ? tile_of<2>(rows) : tile_of<1>(rows);
        run(a, b, b_row, p.c + row * p.ldc + (p.c_panel ? panel * p.c_panel : column), p.ldc, steps(),
            lanes(wide ? width - kLanes : width), p.bias ? p.bias + column : nullptr, k > 0);
    }
};

// B fits the second-level cache: each tile of A's rows, packed into the first level, meets all of B. Row-major B is
// read where it lies.
void multiply_by_tiles(const Range& range, int64_t first, int64_t last, Scratch& for_a, Scratch& for_b) {
    const Product& p = range.p;
    const bool in_place = range.b_is_ready() || (!p.packed && p.b.column == 1);
    float* const a = for_a.floats(kTileStride * range.depth);
    float* const b = in_place ? nullptr : for_b.floats((last - first) * kPanel * range.depth);
    if (!in_place) {
        for (int64_t panel = first; panel < last; ++panel) {
            range.pack_columns(panel, b + (panel - first) * kPanel * range.depth);
        }
    }
    const int64_t tiles = (p.m + kTileRows - 1) / kTileRows;
    for (int64_t t = 0; t < tiles; ++t) {
        const int64_t row = p.m * t / tiles, rows = p.m * (t + 1) / tiles - row;  // tiles of nearly equal height
        range.pack_rows(row, rows, a);
        range.sum_rows(a, row, rows, first);
        for (int64_t panel = first; panel < last; ++panel) {
            if (range.b_is_ready()) {
                range.multiply(a, range.packed_columns(panel), kPanel, row, rows, panel);
            } else if (in_place) {
                range.multiply(a, p.b.data + range.k * p.b.row + panel * kPanel, p.b.row, row, rows, panel);
            } else {
                range.multiply(a, b + (panel - first) * kPanel * range.depth, kPanel, row, rows, panel);
            }
        }
    }
}

// B is large: each panel, packed, meets a block of A that stays in the second-level cache.
void multiply_by_panels(const Range& range, int64_t first, int64_t last, Scratch& for_a, Scratch& for_b) {
    const Product& p = range.p;
    const int64_t blocks = (p.m + kBlockRows - 1) / kBlockRows;
    for (int64_t block = 0; block < blocks; ++block) {
        const int64_t begin = p.m * block / blocks, height = p.m * (block + 1) / blocks - begin;
        const int64_t tiles = (height + kTileRows - 1) / kTileRows, tile_floats = kTileStride * range.steps();
        const auto edge = [&](int64_t t) { return height * t / tiles; };
        float* const a = for_a.floats(tiles * tile_floats + kTileStride * range.depth);
        for (int64_t t = 0; t < tiles; ++t) {
            range.pack_rows(begin + edge(t), edge(t + 1) - edge(t), a + t * tile_floats);
            range.sum_rows(a + t * tile_floats, begin + edge(t), edge(t + 1) - edge(t), first);
        }
        for (int64_t panel = first; panel < last; ++panel) {
            const bool ready = range.b_is_ready();
            const float* b = ready ? range.packed_columns(panel) : for_b.floats(kPanel * range.depth);
            if (!ready) range.pack_columns(panel, for_b.floats(kPanel * range.depth));
            for (int64_t t = 0; t < tiles; ++t) {
                range.multiply(a + t * tile_floats, b, kPanel, begin + edge(t), edge(t + 1) - edge(t), panel);
            }
        }
    }
}

// One column of C, a value network's output: a scalar product per row reads A once and copies nothing.
void multiply_column(const Product& p) {
    const float bias = p.bias ? *p.bias : 0.0f;
    for (int64_t i = 0; i < p.m; ++i) {
        const float* const row = p.a.data + i * p.a.row;
        __m512 sum = _mm512_setzero_ps();
        for (int64_t k = 0; k < p.k; k += kLanes) {
            const __mmask16 mask = lanes(p.k - k);
            sum = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, row + k), _mm512_maskz_loadu_ps(mask, p.b.data + k), sum);
        }
        p.c[i * p.ldc] = bias + _mm512_reduce_add_ps(sum);
    }
}

void multiply(const Product& p, int64_t first, int64_t last) {
    if (p.n == 1 && !p.packed && !p.row_sums && p.a.column == 1 && p.b.row == 1) return multiply_column(p);
    thread_local Scratch for_a, for_b;
    const bool small = p.k <= kSmallDepth && p.k * p.n <= kSmall;
    const int64_t longest = small ? kSmallDepth : kBlockDepth, parts = std::max<int64_t>((p.k + longest - 1) / longest, 1);
    const int64_t depth = ((p.k + parts - 1) / parts + kLanes - 1) / kLanes * kLanes;
    for (int64_t k = 0; k < p.k; k += depth) {
        const Range range{p, k, std::min(p.k - k, depth)};
        (small ? multiply_by_tiles : multiply_by_panels)(range, first, last, for_a, for_b);
    }
}

}  // namespace
}  // namespace pwm_fast
