// The gather of sampling_gather.hpp for AVX2; compiled with that flag (CMakeLists.txt).
#define PWM_FAST_LANES 8
#include "sampling_gather.hpp"

namespace pwm_fast {

bool gather_windows_avx2(const Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                         int64_t b, int64_t B, const WindowBatch& to) {
    return ::gather_windows(from, rows, count, known, horizon, b, B, to);
}

}  // namespace pwm_fast
