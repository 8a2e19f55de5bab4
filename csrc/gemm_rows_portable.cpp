// The products of gemm_rows_kernel.hpp in vectors that every target can lower (SSE2, NEON, ...).
#define PWM_FAST_LANES 4
#include "gemm_rows_kernel.hpp"
#include "gemm_rows.hpp"

namespace pwm_fast {

void multiply_few_rows_portable(const Product& product, int64_t first, int64_t last) {
    multiply_rows(product, first, last);
}

}  // namespace pwm_fast
