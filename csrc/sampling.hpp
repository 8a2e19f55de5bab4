// Drawing and gathering of episode windows, shared by the sampler's bindings and the scheduler's workers.
// pwm_fast/data/sampling.py is the definition: the same rows for the same (seed, stream, step), bit for bit.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__SSE2__) || defined(_M_X64)
#include <emmintrin.h>
#endif

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

// Where B windows of H transitions go, time first: obs [H+1, B, S], action [H, B, A], reward and terminated [H, B],
// task [B]. Start states are windows with H = 0; only their `obs` is written.
struct WindowBatch {
    float* obs = nullptr;
    float* action = nullptr;
    float* reward = nullptr;
    uint8_t* terminated = nullptr;
    int32_t* task = nullptr;
};

// Copies floats and notices what is infinite or NaN: their exponents are all ones. One pass, because the rows come from
// memory; SSE2, which every x86-64 has, because compilers keep the sum of a loop this short out of registers.
class FiniteCopy {
public:
    void operator()(float* to, const float* from, int64_t count) {
        int64_t i = 0;
#if defined(__SSE2__) || defined(_M_X64)
        for (; i + 4 <= count; i += 4) four(to + i, from + i);
        if (i < count && count >= 4) {
            four(to + count - 4, from + count - 4);  // some of them twice, which is quicker than one by one
            return;
        }
#endif
        for (; i < count; ++i) {
            uint32_t bits;
            std::memcpy(&bits, from + i, sizeof bits);
            seen_ |= (bits & 0x7F800000u) + 0x00800000u;
            std::memcpy(to + i, &bits, sizeof bits);
        }
    }

    bool finite() const {
#if defined(__SSE2__) || defined(_M_X64)
        if (_mm_movemask_ps(_mm_castsi128_ps(four_seen_)) != 0) return false;
#endif
        return (seen_ >> 31) == 0;
    }

private:
#if defined(__SSE2__) || defined(_M_X64)
    void four(float* to, const float* from) {
        const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to), bits);
        const __m128i exponent = _mm_and_si128(bits, _mm_set1_epi32(0x7F800000));
        four_seen_ = _mm_or_si128(four_seen_, _mm_add_epi32(exponent, _mm_set1_epi32(0x00800000)));
    }
    __m128i four_seen_ = _mm_setzero_si128();
#endif
    uint32_t seen_ = 0;  // the sign bit of a sum says that an exponent was all ones
};

inline void prefetch(const void* address, int64_t bytes) {
#if defined(__GNUC__)
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(address) + i);
#else
    static_cast<void>(address);
    static_cast<void>(bytes);
#endif
}

// Windows b to b + count of B, from their first rows on; false if they hold a value that is not finite.
//
// Random rows of a large store are in no cache, and a core that waits for each in turn reaches a third of the speed of
// a copy. So a few windows go side by side, row by row, while the same rows of the next few are on their way
// (bench/test_scheduler.py).
inline bool gather_windows(const Columns& from, const int64_t* rows, int64_t count, int64_t horizon, int64_t b,
                           int64_t B, const WindowBatch& to) {
    constexpr int64_t kSideBySide = 4;
    const int64_t S = from.obs_dim, A = from.action_dim;
    FiniteCopy copy;
    for (int64_t begin = 0; begin < count; begin += kSideBySide) {
        const int64_t end = std::min(begin + kSideBySide, count), next = std::min(end + kSideBySide, count);
        for (int64_t h = 0; h <= horizon; ++h) {
            for (int64_t i = end; i < next; ++i) {
                prefetch(from.obs + (rows[i] + h) * S, S * 4);
                if (h == horizon) continue;
                prefetch(from.action + (rows[i] + h) * A, A * 4);
                if (h > 0) continue;
                prefetch(from.reward + rows[i], 1);
                prefetch(from.terminated + rows[i], 1);
                prefetch(from.task + rows[i], 1);
            }
            for (int64_t i = begin; i < end; ++i) copy(to.obs + (h * B + b + i) * S, from.obs + (rows[i] + h) * S, S);
            if (h == horizon) break;
            for (int64_t i = begin; i < end; ++i) {
                const int64_t at = h * B + b + i, row = rows[i] + h;
                copy(to.action + at * A, from.action + row * A, A);
                copy(to.reward + at, from.reward + row, 1);
                to.terminated[at] = from.terminated[row];
            }
        }
        for (int64_t i = begin; i < end && horizon > 0; ++i) to.task[b + i] = from.task[rows[i]];
    }
    return copy.finite();
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
