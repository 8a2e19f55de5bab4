// The kernels of elementwise_rows.hpp and elementwise_heads.hpp in vectors that every target can lower (SSE2, NEON, ...).
#define PWM_FAST_LANES 4
#include "elementwise_rows.hpp"
#include "elementwise_heads.hpp"

namespace pwm_fast {

const ElementwiseTable& elementwise_portable() {
    static constexpr ElementwiseTable table = {
        layernorm_mish_forward,    layernorm_mish_backward,    mish_layernorm_forward, mish_layernorm_backward,
        layernorm_simnorm_forward, layernorm_simnorm_backward, expectation_forward,    expectation_backward,
        cross_entropy_forward,     cross_entropy_backward,     td_lambda,              sum_of_squares,
        adam,                      add,
    };
    return table;
}

}  // namespace pwm_fast
