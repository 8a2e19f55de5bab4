// The product for AMX: tiles of bfloat16 multiplied into float32 sums, sixteen times as many multiplications a cycle as
// AVX-512's. A float32 is the exact sum of three bfloat16, x = high + middle + low; six of the nine products of two such
// sums, those above 2^-24, make a float32 product at up to 2.6 times the speed of multiply-adds, and as exact as theirs
// (Henry, Tang and Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision
// computations"). Factors of which 16 bits of mantissa are enough take three, those that may be rounded to bfloat16 one.
// Numbers below 1.2e-38 count as zero, and where a factor is infinite the result is NaN.
#define PWM_FAST_LANES 16
#include "gemm_amx_tiles.hpp"

#include <algorithm>

namespace pwm_fast {
namespace {

constexpr int64_t kBlockRows = 256;
constexpr int64_t kBlockFloats = 1 << 18;  // of a block of A: half of the second-level cache

// Parts of a factor that count; what pack() wrote has all three.
constexpr int64_t splits_of(const Product& p) { return p.bf16 ? 1 : p.tf32 ? 2 : 3; }
constexpr int64_t splits_of(bool tf32) { return tf32 ? 2 : 3; }

// The order in which products go through A [m, k]: calls body(first row, rows, first k, depth, floats of A before). A
// block of few rows takes more along k; how k is cut does not change a sum.
template <typename Body>
void for_blocks(int64_t m, int64_t k, int64_t splits, const Body& body) {
    const int64_t words = kDepth / 2 * splits, steps = ceil_div(k, kDepth);  // floats of a row in a step
    const int64_t tallest = std::max(kBlockRows, kBlockFloats / (steps * words) / kBlock * kBlock);
    const int64_t height = ceil_div(ceil_div(m, ceil_div(m, tallest)), kBlock) * kBlock;
    const int64_t parts = ceil_div(steps * height * words, kBlockFloats);
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

void pack_block(const Matrix& a, int64_t row, int64_t rows, int64_t k, int64_t depth, int64_t splits, float* out) {
    for (int64_t i = 0; i < rows; i += kBlock, out += strips_floats(depth, splits)) {
        const float* const from = a.data + (row + i) * a.row + k * a.column;
        Strips{from, a.row, a.column, kDepth * a.column, std::min(rows - i, kBlock), depth, true}.pack(splits, out);
    }
}

int64_t packed_rows_floats(int64_t m, int64_t k, bool tf32) {
    return ceil_div(m, kBlock) * strips_floats(k, splits_of(tf32));  // blocks end where strips and steps do
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
            const __mmask16 mask = lanes(p.m - i);
            for (int64_t k = 0; k < p.k; ++k) {
                sum = _mm512_add_ps(sum, _mm512_maskz_loadu_ps(mask, p.a.data + i + k * p.a.column));
            }
            _mm512_mask_storeu_ps(p.row_sums + i, mask, sum);
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
            if (p.work && p.plain_panels && !p.turned && row == 0) {
                p.work->before((panel * p.k + k) * kBlock, depth * kBlock);
            }
            if (!ready) panel_of(p, panel, k, depth).pack(splits, strip);
            const float* const b =
                ready ? p.b.data + panel * strips_floats(p.k, b_splits) + strips_floats(k, b_splits) : strip;
            Fetch fetch;
            if (p.packed && !p.turned && panel + 1 < last) {
                fetch.from = ready ? b + strips_floats(p.k, b_splits) : p.b.data + ((panel + 1) * p.k + k) * kBlock;
                const int64_t lines = (ready ? steps * b_step : depth * kBlock) / kLanes;
                fetch.lines = ceil_div(lines, steps * ceil_div(rows, kBlock));
                if (fetch.lines > kMostLines) fetch.lines = 0;
            }
            float* const c = p.c + row * p.ldc + (p.c_panel ? panel * p.c_panel : column);
            for (int64_t i = 0; i < rows; i += kBlock) {
                run(a + i / kBlock * strips, b, b_step, steps, std::min(rows - i, kBlock), width, c + i * p.ldc, p.ldc,
                    p.bias ? p.bias + column : nullptr, k > 0, fetch);
            }
            if (p.work && k + depth >= p.k) p.work->after(panel, row, rows);
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
