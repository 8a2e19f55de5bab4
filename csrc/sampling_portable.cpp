// The gather of sampling_gather.hpp in vectors that every target can lower (SSE2, NEON, ...).
#define PWM_FAST_LANES 4
#include "sampling_gather.hpp"

namespace pwm_fast {

bool gather_windows_portable(const Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                             int64_t b, int64_t B, const WindowBatch& to) {
    return ::gather_windows(from, rows, count, known, horizon, b, B, to);
}

}  // namespace pwm_fast
