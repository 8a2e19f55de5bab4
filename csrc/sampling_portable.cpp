// The gather of sampling_gather.hpp in vectors that every target can lower (SSE2, NEON, ...).
#define PWM_FAST_LANES 4
#include "sampling_gather.hpp"

namespace pwm_fast {

bool gather_windows_portable(const Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                             int64_t b, int64_t B, const WindowBatch& to) {
    return ::gather_windows(from, rows, count, known, horizon, b, B, to);
}

void random_pairs_portable(uint64_t seed, uint32_t stream, uint64_t step, uint32_t index, int64_t count,
                           RandomPairs& pairs) {
    for (int64_t i = 0; i < count; ++i) {
        const RandomPair pair = random_pair(seed, stream, step, index + static_cast<uint32_t>(i));
        pairs.first[i] = pair.first;
        pairs.second[i] = pair.second;
    }
}

}  // namespace pwm_fast
