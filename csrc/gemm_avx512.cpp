// The product of gemm_tiles_avx512.hpp for AVX-512; compiled with those flags (CMakeLists.txt).
#include "gemm_tiles_avx512.hpp"

namespace pwm_fast {
namespace {

void pack(const Matrix& b, int64_t k, int64_t n, float* out) {
    for (int64_t panel = 0; panel * kPanel < n; ++panel) {
        pack_panel(b, 0, k, panel * kPanel, n, out + panel * kPanel * k);
    }
}

void pack_bf16(const Matrix& b, int64_t k, int64_t n, float* out) {
    thread_local Scratch for_b;
    const auto floats = [&](int64_t column, float* panel) { pack_panel(b, 0, k, column, n, panel); };
    pack_pairs<kPanel>(k, n, for_b.floats(kPanel * k), out, floats);
}

int64_t packed_rows_floats(int64_t m, int64_t k, bool) {
    int64_t count = 0;
    for_blocks(m, k, [&](const Block& block) { count += pieces(block.height, kTileRows) * kTileStride * block.depth; });
    return count;
}

void pack_rows(const Matrix& a, int64_t m, int64_t k, bool, float* out) {
    for_blocks(m, k, [&](const Block& block) { pack_block(a, block, out + block.before, nullptr); });
}

float multiply_adds(int64_t rounds) {
    __m512 sums[kChains];
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) sums[j] = _mm512_set1_ps(static_cast<float>(j));  // all different: none is spared
    const __m512 half = _mm512_set1_ps(0.5f);
    for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
        for (int j = 0; j < kChains; ++j) sums[j] = _mm512_fmadd_ps(half, sums[j], half);
    }
    __m512 total = _mm512_setzero_ps();
#pragma GCC unroll 12
    for (int j = 0; j < kChains; ++j) total = _mm512_add_ps(total, sums[j]);
    return sum_lanes(total);
}

}  // namespace

const GemmTable& gemm_avx512() {
    static constexpr GemmTable table = {
        kPanel,    kPanel,             multiply, pack,          pack_bf16, panels_floats<kPanel>,
        pack_rows, packed_rows_floats, kLanes,   multiply_adds,
    };
    return table;
}

}  // namespace pwm_fast
