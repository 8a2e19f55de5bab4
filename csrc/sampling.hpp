// Drawing and gathering of episode windows, shared by the sampler's bindings and the scheduler's workers.
// pwm_fast/data/sampling.py is the definition: the same rows for the same (seed, stream, step), bit for bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "philox.hpp"

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

// Where B windows of H transitions go, time first: obs [H+1, B, S], action [H, B, A], reward and terminated [H, B],
// task [B]. Start states are windows with H = 0; only their `obs` is written.
struct WindowBatch {
    float* obs = nullptr;
    float* action = nullptr;
    float* reward = nullptr;
    uint8_t* terminated = nullptr;
    int32_t* task = nullptr;
};

struct DrawnRow {
    int64_t row;
    int64_t episode;  // its place among the chosen episodes
};

// Uniform over all windows of the chosen episodes. offsets [E+1]: number of windows before each episode;
// first_row [E]: the row that episode starts at.
inline DrawnRow drawn_row(uint64_t bits, const int64_t* offsets, const int64_t* first_row, int64_t episodes) {
    const auto drawn = static_cast<int64_t>(scale_to(bits, static_cast<uint64_t>(offsets[episodes])));
    const int64_t episode = std::upper_bound(offsets, offsets + episodes + 1, drawn) - offsets - 1;
    return {first_row[episode] + drawn - offsets[episode], episode};
}

// Copies; the result's sign bit is set if a value is infinite or NaN, whose exponent is all ones. One pass, because
// the rows come from memory; integers, because compilers vectorise that reduction.
inline uint32_t copy_checked(float* __restrict to, const float* __restrict from, int64_t count) {
    uint32_t seen = 0;
    for (int64_t i = 0; i < count; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, sizeof bits);
        seen |= (bits & 0x7F800000u) + 0x00800000u;
        std::memcpy(to + i, &bits, sizeof bits);
    }
    return seen;
}

// Window b of B, from its first row on; false if it holds a value that is not finite.
inline bool gather_window(const Columns& from, int64_t row, int64_t horizon, int64_t b, int64_t B,
                          const WindowBatch& to) {
    const int64_t S = from.obs_dim, A = from.action_dim;
    uint32_t seen = 0;
    for (int64_t h = 0; h <= horizon; ++h) seen |= copy_checked(to.obs + (h * B + b) * S, from.obs + (row + h) * S, S);
    if (horizon == 0) return (seen >> 31) == 0;
    for (int64_t h = 0; h < horizon; ++h) {
        const int64_t at = h * B + b;
        seen |= copy_checked(to.action + at * A, from.action + (row + h) * A, A);
        seen |= copy_checked(to.reward + at, from.reward + row + h, 1);
        to.terminated[at] = from.terminated[row + h];
    }
    to.task[b] = from.task[row];
    return (seen >> 31) == 0;
}

}  // namespace pwm_fast
