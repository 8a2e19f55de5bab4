// The kernels of elementwise_rows.hpp and elementwise_heads.hpp for AVX-512; compiled with its flags (CMakeLists.txt).
#define PWM_FAST_LANES 16
#include "elementwise_rows.hpp"
#include "elementwise_heads.hpp"

namespace pwm_fast {

const ElementwiseTable& elementwise_avx512() {
    static constexpr ElementwiseTable table = {
        layernorm_mish_forward,    layernorm_mish_backward,    mish_layernorm_forward, mish_layernorm_backward,
        layernorm_simnorm_forward, layernorm_simnorm_backward, expectation_forward,    expectation_backward,
        cross_entropy_forward,     cross_entropy_backward,     td_lambda,              sum_of_squares,
        adam,                      add,
    };
    return table;
}

}  // namespace pwm_fast
