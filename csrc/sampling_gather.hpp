// Copies windows out of the columns. Included by one source file per instruction set, each compiled for it; everything
// has internal linkage and no standard library template is instantiated, so that no AVX code gets into portable callers.
#pragma once

#include <cstdint>

#include "sampling.hpp"

namespace {

#define PWM_FAST_INLINE inline __attribute__((always_inline))

constexpr int64_t kLanes = PWM_FAST_LANES;
constexpr uint32_t kExponent = 0x7F800000u, kLowestOfIt = 0x00800000u;

typedef uint32_t Wide __attribute__((vector_size(4 * PWM_FAST_LANES)));
typedef uint32_t Narrow __attribute__((vector_size(16)));

// Copies floats and notices what is infinite or NaN: their exponents are all ones, and then the sign bit of the sum
// below is set. One pass, because the rows come from memory.
class FiniteCopy {
public:
    PWM_FAST_INLINE void operator()(float* to, const float* from, int64_t count) {
        if (count >= kLanes) return in_vectors(to, from, count, wide_);
        if (count >= 4) return in_vectors(to, from, count, narrow_);
        for (int64_t i = 0; i < count; ++i) {
            uint32_t bits;
            __builtin_memcpy(&bits, from + i, sizeof bits);
            single_ |= (bits & kExponent) + kLowestOfIt;
            __builtin_memcpy(to + i, &bits, sizeof bits);
        }
    }

    bool finite() const {
        uint32_t seen = single_;
        for (int i = 0; i < kLanes; ++i) seen |= wide_[i];
        for (int i = 0; i < 4; ++i) seen |= narrow_[i];
        return (seen >> 31) == 0;
    }

private:
    template <typename Vector>
    PWM_FAST_INLINE static void in_vectors(float* to, const float* from, int64_t count, Vector& seen) {
        constexpr int64_t N = sizeof(Vector) / sizeof(float);
        for (int64_t i = 0;; i += N) {
            if (i + N > count) i = count - N;  // some of them twice, which is quicker than one by one
            Vector bits;
            __builtin_memcpy(&bits, from + i, sizeof bits);
            __builtin_memcpy(to + i, &bits, sizeof bits);
            seen |= (bits & kExponent) + kLowestOfIt;
            if (i + N == count) return;
        }
    }

    Wide wide_{};
    Narrow narrow_{};
    uint32_t single_ = 0;
};

// How many windows go side by side. Random rows of a large store are in no cache, and a core that waits for each in
// turn reaches a third of the speed of a copy: while a row is copied, the same row of the window so far behind it is on
// its way. With more of them the processor's own prefetching loses track (bench/test_scheduler.py).
constexpr int64_t kSideBySide = 8;

// How far behind the start states go that are on their way: each is a row of its own, of few lines.
constexpr int64_t kRowsAhead = 16;

// One column of `length` rows of each window, `width` numbers each, to [length, B, to_width].
PWM_FAST_INLINE void gather_column(const float* from, int64_t width, int64_t length, const int64_t* rows, int64_t count,
                                   int64_t known, int64_t B, float* to, int64_t to_width, FiniteCopy& copy) {
    const int64_t kept = width < to_width ? width : to_width, ahead = length > 1 ? kSideBySide : kRowsAhead;
    for (int64_t begin = 0; begin < count; begin += kSideBySide) {
        const int64_t end = begin + kSideBySide < count ? begin + kSideBySide : count;
        for (int64_t h = 0; h < length; ++h) {
            for (int64_t i = begin; i < end; ++i) {
                if (i + ahead < known) {
                    const float* const later = from + (rows[i + ahead] + h) * width;
                    for (int64_t j = 0; j < width; j += 16) __builtin_prefetch(later + j);
                }
                copy(to + (h * B + i) * to_width, from + (rows[i] + h) * width, kept);
            }
        }
    }
    if (kept == width && kept == to_width) return;
    for (int64_t h = 0; h < length; ++h) {
        for (int64_t i = 0; i < count; ++i) {
            float *const end = to + (h * B + i + 1) * to_width, unused;
            for (float* pad = end - (to_width - kept); pad < end; ++pad) *pad = 0.0f;
            for (int64_t j = kept; j < width; ++j) copy(&unused, from + (rows[i] + h) * width + j, 1);  // may be NaN
        }
    }
}

// The columns of one number a row. Eight windows' numbers are put together first: single stores, each to a line of its
// own, would take as long as a fifth of the observations.
PWM_FAST_INLINE void gather_numbers(const pwm_fast::Columns& from, const int64_t* rows, int64_t count, int64_t horizon,
                                    int64_t b, int64_t B, const pwm_fast::WindowBatch& to, FiniteCopy& copy) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        for (int64_t h = 0; h < horizon; ++h) {
            float rewards[8];
            uint8_t ends[8];
            for (int64_t w = 0; w < 8; ++w) rewards[w] = from.reward[rows[i + w] + h];
            for (int64_t w = 0; w < 8; ++w) ends[w] = from.terminated[rows[i + w] + h];
            copy(to.reward + h * B + b + i, rewards, 8);
            __builtin_memcpy(to.terminated + h * B + b + i, ends, 8);
        }
    }
    for (; i < count; ++i) {
        for (int64_t h = 0; h < horizon; ++h) {
            copy(to.reward + h * B + b + i, from.reward + rows[i] + h, 1);
            to.terminated[h * B + b + i] = from.terminated[rows[i] + h];
        }
    }
    for (i = 0; i < count; ++i) to.task[b + i] = from.task[rows[i]];
}

bool gather_windows(const pwm_fast::Columns& from, const int64_t* rows, int64_t count, int64_t known, int64_t horizon,
                    int64_t b, int64_t B, const pwm_fast::WindowBatch& to) {
    FiniteCopy copy;
    const int64_t S = from.obs_dim, A = from.action_dim;
    gather_column(from.obs, S, horizon + 1, rows, count, known, B, to.obs + b * to.obs_dim, to.obs_dim, copy);
    if (horizon > 0) {
        gather_column(from.action, A, horizon, rows, count, known, B, to.action + b * to.action_dim, to.action_dim,
                      copy);
        gather_numbers(from, rows, count, horizon, b, B, to, copy);
    }
    return copy.finite();
}

}  // namespace
