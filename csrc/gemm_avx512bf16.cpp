// The product of gemm_tiles_avx512.hpp for AVX512-BF16, where factors are bfloat16: two multiplications in one instruction,
// which takes numbers below 1.2e-38 for zero. All other products are those of AVX-512.
#include "gemm_tiles_avx512.hpp"

namespace pwm_fast {
namespace {

void multiply_any(const Product& p, int64_t first, int64_t last) {
    (p.bf16 ? multiply : gemm_avx512().multiply)(p, first, last);
}

}  // namespace

const GemmTable& gemm_avx512bf16() {
    static const GemmTable table = [] {
        GemmTable same = gemm_avx512();
        same.multiply = multiply_any;
        return same;
    }();
    return table;
}

}  // namespace pwm_fast
