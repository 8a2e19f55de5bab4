// The products of gemm_rows_kernel.hpp in vectors of AVX2, with FMA.
#define PWM_FAST_LANES 8
#include "gemm_rows_kernel.hpp"
#include "gemm_rows.hpp"

namespace pwm_fast {

const RowsTable& rows_avx2() {
    static constexpr RowsTable table = {multiply_rows, row_sum};
    return table;
}

}  // namespace pwm_fast
