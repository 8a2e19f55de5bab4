// sampling_gather.hpp and sampling_random.hpp for AVX2; compiled with its flags (CMakeLists.txt).
#define PWM_FAST_LANES 8
#include "sampling_gather.hpp"
#include "sampling_random.hpp"

namespace pwm_fast {

bool gather_windows_avx2(const Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                         int64_t b, int64_t B, const WindowBatch& to) {
    return ::gather_windows(from, rows, count, known, horizon, b, B, to);
}

void random_pairs_avx2(uint64_t seed, uint32_t stream, uint64_t step, uint32_t index, int64_t count,
                       RandomPairs& pairs) {
    ::random_pairs(seed, stream, step, index, count, pairs);
}

}  // namespace pwm_fast
