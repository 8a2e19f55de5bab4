// The products of gemm_rows_kernel.hpp in vectors of AVX-512.
#define PWM_FAST_LANES 16
#include "gemm_rows_kernel.hpp"
#include "gemm_rows.hpp"

namespace pwm_fast {

void multiply_few_rows_avx512(const Product& product, int64_t first, int64_t last) {
    multiply_rows(product, first, last);
}

}  // namespace pwm_fast
