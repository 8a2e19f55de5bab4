// The product of gemm_tiles.hpp for AVX2 and FMA; compiled with those flags (CMakeLists.txt).
#define PWM_FAST_LANES 8
#include "gemm_tiles.hpp"

namespace pwm_fast {

const GemmTable& gemm_avx2() {
    static constexpr GemmTable table = {kPanel,    kPanel,    multiply,           pack,   pack_bf16,
                                        panels_floats<kPanel>, pack_rows, packed_rows_floats, kLanes, multiply_adds};
    return table;
}

}  // namespace pwm_fast
