// The product of gemm_tiles.hpp in vectors that every target can lower (SSE2, NEON, ...).
#define PWM_FAST_LANES 4
#include "gemm_tiles.hpp"

namespace pwm_fast {

const GemmTable& gemm_portable() {
    static constexpr GemmTable table = {kPanel,    kPanel,    multiply,           pack,   pack_bf16,
                                        panels_floats<kPanel>, pack_rows, packed_rows_floats, kLanes, multiply_adds};
    return table;
}

}  // namespace pwm_fast
