// Gathering of episode windows, shared by the sampler's bindings and the scheduler's workers.
// pwm_fast/data/sampling.py is the definition.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "isa.hpp"
#include "sampling_draw.hpp"

namespace pwm_fast {

constexpr uint32_t kWindowStream = 0, kStartStream = 1;

// The columns of an episode store of `rows` rows; `obs` [N, S] and `action` [N, A], the others [N].
struct Columns {
    const float* obs = nullptr;
    const float* action = nullptr;
    const float* reward = nullptr;
    const uint8_t* terminated = nullptr;
    const int32_t* task = nullptr;
    int64_t rows = 0, obs_dim = 0, action_dim = 0;
};

// Where B windows of H transitions go, time first: obs [H+1, B, obs_dim], action [H, B, action_dim], reward and
// terminated [H, B], task [B]. Rows that are wider than the store's end in zeros, narrower ones lack its last entries.
// Start states are windows with H = 0; only their `obs` is written.
struct WindowBatch {
    float* obs = nullptr;
    float* action = nullptr;
    float* reward = nullptr;
    uint8_t* terminated = nullptr;
    int32_t* task = nullptr;
    int64_t obs_dim = 0, action_dim = 0;
};

// Windows b to b + count of B, from their first rows on; false if they hold a value that is not finite. Of `rows`,
// `known` >= count are the first ones of windows that will be gathered next.
using Gather = bool (*)(const Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                        int64_t b, int64_t B, const WindowBatch& to);

// random_pair of the indices from `index` on, `count` <= RandomPairs::kMost of them; what follows in `pairs` may change.
using Random = void (*)(uint64_t seed, uint32_t stream, uint64_t step, uint32_t index, int64_t count,
                        RandomPairs& pairs);

bool gather_windows_portable(const Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                             int64_t b, int64_t B, const WindowBatch& to);
void random_pairs_portable(uint64_t seed, uint32_t stream, uint64_t step, uint32_t index, int64_t count,
                           RandomPairs& pairs);
#ifdef PWM_FAST_X86
bool gather_windows_avx2(const Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                         int64_t b, int64_t B, const WindowBatch& to);
void random_pairs_avx2(uint64_t seed, uint32_t stream, uint64_t step, uint32_t index, int64_t count,
                       RandomPairs& pairs);
bool gather_windows_avx512(const Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                           int64_t b, int64_t B, const WindowBatch& to);
void random_pairs_avx512(uint64_t seed, uint32_t stream, uint64_t step, uint32_t index, int64_t count,
                         RandomPairs& pairs);
#endif

// These throw as selected_isa() does.
inline Gather selected_gather() {
#ifdef PWM_FAST_X86
    if (selected_isa() >= Isa::avx512) return gather_windows_avx512;
    if (selected_isa() >= Isa::avx2) return gather_windows_avx2;
#endif
    return gather_windows_portable;
}
inline Random selected_random() {
#ifdef PWM_FAST_X86
    if (selected_isa() >= Isa::avx512) return random_pairs_avx512;
    if (selected_isa() >= Isa::avx2) return random_pairs_avx2;
#endif
    return random_pairs_portable;
}

// Asks for the lines of a window's short columns, each of which costs a wait and little room. What is longer comes
// while other windows are gathered.
inline void prefetch_numbers(const Columns& from, int64_t row, int64_t horizon) {
    if (horizon == 0) return;
    for (int64_t h = 0; h < horizon; h += 16) __builtin_prefetch(from.reward + row + h);
    __builtin_prefetch(from.reward + row + horizon - 1);
    __builtin_prefetch(from.terminated + row);
    __builtin_prefetch(from.task + row);
}

// The smallest of `rows` whose window holds a value that is not finite; -1 if there is none.
inline int64_t first_not_finite(const Columns& from, const int64_t* rows, int64_t count, int64_t horizon) {
    const auto finite = [](const float* values, int64_t n) {
        return std::all_of(values, values + n, [](float value) { return std::isfinite(value); });
    };
    int64_t smallest = -1;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = rows[i];
        if (smallest >= 0 && row >= smallest) continue;
        if (!finite(from.obs + row * from.obs_dim, (horizon + 1) * from.obs_dim) ||
            !finite(from.action + row * from.action_dim, horizon * from.action_dim) ||
            !finite(from.reward + row, horizon))
            smallest = row;
    }
    return smallest;
}

}  // namespace pwm_fast
