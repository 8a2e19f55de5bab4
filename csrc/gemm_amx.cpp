// The product for AMX: tiles of bfloat16 multiplied into float32 sums, sixteen times as many multiplications a cycle as
// AVX-512's. A float32 is the exact sum of three bfloat16, x = high + middle + low; six of the nine products of two such
// sums, those above 2^-24, make a float32 product at 2.6 times the speed of multiply-adds, and no less exact than theirs
// (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations"). Factors that may be rounded to bfloat16 take one product.
//
// Tiles hold 16 rows of 32 places along k, as 16 words of two bfloat16. Within such a step word j holds places j and
// j + 16 in A and in B: whole vectors become words, without a shuffle between their halves. Numbers below 1.2e-38 count as
// zero, and where a factor is infinite the result is NaN.
#define PWM_FAST_LANES 16
#include "gemm_parts.hpp"
#include "transpose_avx512.hpp"

#include <immintrin.h>

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

namespace pwm_fast {
namespace {

constexpr int64_t kRows = 16;          // of a tile
constexpr int64_t kDepth = 32;         // places along k of a tile
constexpr int64_t kTileFloats = 256;   // a tile in memory, 1 KB
constexpr int64_t kBlock = 2 * kRows;  // C is worked on in blocks of 2 by 2 tiles; B's panels are as wide
constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockFloats = 1 << 18;  // of a block of A: half of the second-level cache

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Parts of a factor that count; what pack() wrote has all three.
constexpr int64_t splits_of(const Product& p) { return p.bf16 ? 1 : p.tf32 ? 2 : 3; }
constexpr int64_t splits_of(bool tf32) { return tf32 ? 2 : 3; }

// ---- Floats to words of bfloat16 --------------------------------------------------------------------------------------

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
        for (int64_t k = 0; k < depth; ++k) std::memcpy(copy + k * column, in + k * along, static_cast<size_t>(places) * sizeof(float));
    } else if (along == 1 && row == kDepth) {
        for (int64_t i = 0; i < places; ++i) std::memcpy(copy + i * row, in + i * across, static_cast<size_t>(depth) * sizeof(float));
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
                pack_tile<kSplits>(from + (count ? strip * kRows * across : 0), across, along, count, std::min(depth - k, kDepth),
                                   rows_are_places, out + strip * kTileFloats, 2 * kTileFloats);
            }
        }
    }

    void pack(int64_t splits, float* out) const { splits == 1 ? pack<1>(out) : splits == 2 ? pack<2>(out) : pack<3>(out); }
};

// ---- Tiles of C -------------------------------------------------------------------------------------------------------

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

// C's four tiles += A's two strips times B's, whose steps lie `b_step` floats apart. Of six products or three the smallest
// come first, in an order that loads as few tiles again as there can be.
template <int kSplits>
void multiply_tiles(const float* a, const float* b, int64_t b_step, int64_t steps, bool two_rows, bool two_columns, const Place* c,
                    Fetch& fetch) {
    constexpr int kBytes = 4;
    const auto load = [](const Place& p) { return std::make_pair(p.from, p.from_row * kBytes); };
    asm volatile("" ::: "memory");  // tile loads do not tell the compiler that they read memory
#define PWM_FAST_TILE_IN(n) _tile_loadd(n, load(c[n]).first, load(c[n]).second)
#define PWM_FAST_TILE_OUT(n) _tile_stored(n, c[n].to, c[n].to_row * kBytes)
    PWM_FAST_TILE_IN(0);
    if (two_columns) PWM_FAST_TILE_IN(1);
    if (two_rows) PWM_FAST_TILE_IN(2);
    if (two_rows && two_columns) PWM_FAST_TILE_IN(3);
    alignas(64) static thread_local float nowhere[kTileFloats];
    const auto run = [&](auto rows, auto columns) __attribute__((always_inline)) {
        const auto load_a = [&](int s) __attribute__((always_inline)) {
            _tile_loadd(4, a + 2 * s * kTileFloats, 64);
            if constexpr (rows()) _tile_loadd(5, a + (2 * s + 1) * kTileFloats, 64);
        };
        const auto load_b = [&](int s) __attribute__((always_inline)) {
            _tile_loadd(6, b + 2 * s * kTileFloats, 64);
            if constexpr (columns()) _tile_loadd(7, b + (2 * s + 1) * kTileFloats, 64);
        };
        const auto products = [&]() __attribute__((always_inline)) {
            _tile_dpbf16ps(0, 4, 6);
            if constexpr (columns()) _tile_dpbf16ps(1, 4, 7);
            if constexpr (rows()) _tile_dpbf16ps(2, 5, 6);
            if constexpr (rows() && columns()) _tile_dpbf16ps(3, 5, 7);
        };
        for (int64_t k = 0; k < steps; ++k, a += 2 * kSplits * kTileFloats, b += b_step) {
            if (k % kStepsToStore<kSplits> == kStepsToStore<kSplits> - 1) _tile_stored(0, nowhere, 64);
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
    };
    const std::true_type two{};
    const std::false_type one{};
    two_rows ? (two_columns ? run(two, two) : run(two, one)) : (two_columns ? run(one, two) : run(one, one));
    PWM_FAST_TILE_OUT(0);
    if (two_columns) PWM_FAST_TILE_OUT(1);
    if (two_rows) PWM_FAST_TILE_OUT(2);
    if (two_rows && two_columns) PWM_FAST_TILE_OUT(3);
#undef PWM_FAST_TILE_IN
#undef PWM_FAST_TILE_OUT
}

// Up to 32 rows and columns of C += their blocks of A and B, or = with the bias. Tiles that reach beyond go over a copy.
template <int kSplits>
void multiply_block(const float* a, const float* b, int64_t b_step, int64_t steps, int64_t rows, int64_t columns, float* c, int64_t ldc,
                    const float* bias, bool accumulate, Fetch& fetch) {
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
        for (int64_t i = 0; i < std::min(rows - row, kRows); ++i) body(copies[t] + i * kRows, c + (row + i) * ldc + column, mask);
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
            part(t, [](float* copy, const float* at, __mmask16 mask) { _mm512_store_ps(copy, _mm512_maskz_loadu_ps(mask, at)); });
        }
    }
    multiply_tiles<kSplits>(a, b, b_step, steps, two_rows, two_columns, places, fetch);
    for (int t = 0; t < 4; ++t) {
        if ((t / 2 && !two_rows) || (t % 2 && !two_columns) || whole(t)) continue;
        part(t, [](const float* copy, float* at, __mmask16 mask) { _mm512_mask_storeu_ps(at, mask, _mm512_load_ps(copy)); });
    }
}

// ---- Products ---------------------------------------------------------------------------------------------------------

// The order in which products go through A [m, k]: calls body(first row, rows, first k, depth, floats of A before). A
// block of few rows takes more along k; how k is cut does not change a sum.
template <typename Body>
void for_blocks(int64_t m, int64_t k, int64_t splits, const Body& body) {
    const int64_t words = kDepth / 2 * splits, steps = ceil_div(k, kDepth);  // floats of a row in a step
    const int64_t tallest = std::max(kBlockRows, kBlockFloats / (steps * words) / kBlock * kBlock), blocks = ceil_div(m, tallest);
    const int64_t height = ceil_div(ceil_div(m, blocks), kBlock) * kBlock, parts = ceil_div(steps * height * words, kBlockFloats);
    const int64_t depth = ceil_div(steps, parts) * kDepth;
    int64_t before = 0;
    for (int64_t from = 0; from < k; from += depth) {
        const int64_t part = std::min(k - from, depth);
        for (int64_t row = 0; row < m; row += height) {
            const int64_t rows = std::min(m - row, height);
            body(row, rows, from, part, before);
            before += ceil_div(rows, kBlock) * kBlock * ceil_div(part, kDepth) * words;
        }
    }
}

// Floats of a pair of strips of `depth` places.
int64_t strips_floats(int64_t depth, int64_t splits) { return ceil_div(depth, kDepth) * 2 * splits * kTileFloats; }

void pack_block(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t depth, int64_t splits, float* out) {
    for (int64_t i = 0; i < rows; i += kBlock, out += strips_floats(depth, splits)) {
        const float* const from = a.data + (row + i) * a.row + k * a.column;
        Strips{from, a.row, a.column, kDepth * a.column, std::min(rows - i, kBlock), depth, true}.pack(splits, out);
    }
}

int64_t packed_rows_floats(int64_t m, int64_t k, bool tf32) {
    int64_t count = 0;
    for_blocks(m, k, splits_of(tf32), [&](int64_t, int64_t rows, int64_t, int64_t depth, int64_t) {
        count += ceil_div(rows, kBlock) * strips_floats(depth, splits_of(tf32));
    });
    return count;
}

void pack_rows(const Matrix& a, int64_t m, int64_t k, bool tf32, float* out) {
    for_blocks(m, k, splits_of(tf32), [&](int64_t row, int64_t rows, int64_t from, int64_t depth, int64_t before) {
        pack_block(a, row, rows, from, depth, splits_of(tf32), out + before);
    });
}

// A panel of B from k on, 32 columns as the places of strips.
Strips panel_of(const Product& p, int64_t panel, int64_t k, int64_t depth) {
    const int64_t column = panel * kBlock, width = std::min(p.n - column, kBlock);
    if (p.turned) {
        return {p.b.data + k * p.n + column * kBlock, kBlock, 1, kBlock * p.n, width, depth, false};
    }
    if (p.packed) {
        const float* const from = p.b.data + (panel * p.k + k) * kBlock;
        return {from, 1, kBlock, kDepth * kBlock, width, depth, false};
    }
    const float* const from = p.b.data + k * p.b.row + column * p.b.column;
    return {from, p.b.column, p.b.row, kDepth * p.b.row, width, depth, false};
}

void pack_columns(const Matrix& b, int64_t k, int64_t n, bool bf16, float* out) {
    Product p{1, n, k, {}, b, false, nullptr, 0, nullptr, nullptr};
    p.bf16 = bf16;
    for (int64_t panel = 0; panel * kBlock < n; ++panel, out += strips_floats(k, splits_of(p))) {
        panel_of(p, panel, 0, k).pack(splits_of(p), out);
    }
}

void pack(const Matrix& b, int64_t k, int64_t n, float* out) { pack_columns(b, k, n, false, out); }
void pack_bf16(const Matrix& b, int64_t k, int64_t n, float* out) { pack_columns(b, k, n, true, out); }

int64_t packed_floats(int64_t k, int64_t n, bool bf16) { return ceil_div(n, kBlock) * strips_floats(k, bf16 ? 1 : 3); }

void sum_rows(const Product& p) {
    if (p.a.row == 1) {
        for (int64_t i = 0; i < p.m; i += kLanes) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t k = 0; k < p.k; ++k) sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(lanes(p.m - i), p.a.data + i + k * p.a.column));
            _mm512_mask_storeu_ps(p.row_sums + i, lanes(p.m - i), sum);
        }
        return;
    }
    for (int64_t i = 0; i < p.m; ++i) {
        float sum = 0.0f;
        for (int64_t k = 0; k < p.k; ++k) sum += p.a.data[i * p.a.row + k * p.a.column];
        p.row_sums[i] = sum;
    }
}

// Small products of factors that nobody packed are done before their tiles would be made.
bool worth_tiles(const Product& p) {
    return p.bf16 || p.a_packed || p.turned || (p.packed && !p.plain_panels) || (p.m >= 16 && p.n >= 16 && p.k >= 16);
}

void multiply(const Product& p, int64_t first, int64_t last) {
    if (!worth_tiles(p)) return gemm_avx512().multiply(p, first, last);
    thread_local Scratch for_a, for_b;
    const TileShapes shapes;
    const int64_t splits = splits_of(p);
    const auto run = splits == 1 ? multiply_block<1> : splits == 2 ? multiply_block<2> : multiply_block<3>;
    const bool ready = p.packed && !p.plain_panels;
    const int64_t b_splits = ready && !p.bf16 ? 3 : splits, b_step = strips_floats(kDepth, b_splits);
    if (p.row_sums && first == 0) sum_rows(p);
    for_blocks(p.m, p.k, splits, [&](int64_t row, int64_t rows, int64_t k, int64_t depth, int64_t before) {
        const int64_t strips = strips_floats(depth, splits), steps = ceil_div(depth, kDepth);
        float* const packed = p.a_packed ? nullptr : for_a.floats(ceil_div(rows, kBlock) * strips);
        const float* const a = p.a_packed ? p.a.data + before : packed;
        if (packed) pack_block(p.a, row, rows, k, depth, splits, packed);
        float* const strip = ready ? nullptr : for_b.floats(strips);
        for (int64_t panel = first; panel < last; ++panel) {
            const int64_t column = panel * kBlock, width = std::min(p.n - column, kBlock);
            if (!ready) panel_of(p, panel, k, depth).pack(splits, strip);
            const float* const b = ready ? p.b.data + panel * strips_floats(p.k, b_splits) + strips_floats(k, b_splits) : strip;
            Fetch fetch;
            if (p.packed && !p.turned && panel + 1 < last) {
                fetch.from = ready ? b + strips_floats(p.k, b_splits) : p.b.data + ((panel + 1) * p.k + k) * kBlock;
                fetch.lines = ceil_div((ready ? steps * b_step : depth * kBlock) / kLanes, steps * ceil_div(rows, kBlock));
                if (fetch.lines > kMostLines) fetch.lines = 0;
            }
            float* const c = p.c + row * p.ldc + (p.c_panel ? panel * p.c_panel : column);
            for (int64_t i = 0; i < rows; i += kBlock) {
                run(a + i / kBlock * strips, b, b_step, steps, std::min(rows - i, kBlock), width, c + i * p.ldc, p.ldc,
                    p.bias ? p.bias + column : nullptr, k > 0, fetch);
            }
        }
    });
}

}  // namespace

const GemmTable& gemm_amx() {
    static const GemmTable table = [] {
        GemmTable t = gemm_avx512();
        t.panel_row = 3 * kBlock / 2;
        t.multiply = multiply, t.pack = pack, t.pack_bf16 = pack_bf16, t.packed_floats = packed_floats;
        t.pack_rows = pack_rows, t.packed_rows_floats = packed_rows_floats;
        return t;
    }();
    return table;
}

}  // namespace pwm_fast
