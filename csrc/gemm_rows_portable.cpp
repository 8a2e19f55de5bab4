// The products of gemm_rows_kernel.hpp in vectors that every target can lower (SSE2, NEON, ...).
#define PWM_FAST_LANES 4
#include "gemm_rows_kernel.hpp"
#include "gemm_rows.hpp"

namespace pwm_fast {

const RowsTable& rows_portable() {
    static constexpr RowsTable table = {multiply_rows, row_sum};
    return table;
}

}  // namespace pwm_fast
