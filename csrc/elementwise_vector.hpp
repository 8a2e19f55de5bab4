// Vectors of PWM_FAST_LANES floats in the compilers' own vector syntax (GCC, Clang): loads, row tails, exp, reductions.
// Included by one source file per instruction set, each compiled for it. Everything has internal linkage and no standard
// library template is instantiated, so the linker cannot put AVX code into portable callers.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#define PWM_FAST_INLINE inline __attribute__((always_inline))

constexpr int kLanes = PWM_FAST_LANES;

typedef float Vec __attribute__((vector_size(4 * PWM_FAST_LANES)));
typedef int32_t IntVec __attribute__((vector_size(4 * PWM_FAST_LANES)));
typedef uint32_t BitVec __attribute__((vector_size(4 * PWM_FAST_LANES)));
typedef float LooseVec __attribute__((vector_size(4 * PWM_FAST_LANES), aligned(4), may_alias));

PWM_FAST_INLINE Vec splat(float value) { return Vec{} + value; }

PWM_FAST_INLINE Vec lane_numbers() {
    Vec lanes{};
    for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(i);
    return lanes;
}

PWM_FAST_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }  // b where a is NaN
PWM_FAST_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }   // b where a is NaN

#if !defined(__AVX512F__) && defined(__AVX2__)
PWM_FAST_INLINE __m256i first_lanes(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
#endif

// A whole vector of a row.
struct Whole {
    PWM_FAST_INLINE Vec load(const float* from) const { return *reinterpret_cast<const LooseVec*>(from); }
    PWM_FAST_INLINE void store(float* to, Vec value) const { *reinterpret_cast<LooseVec*>(to) = value; }
    PWM_FAST_INLINE Vec keep(Vec value, Vec) const { return value; }
};

// The last `count` < kLanes columns of a row: the other lanes load as zero and are not stored.
struct Part {
    int count;

    PWM_FAST_INLINE Vec load(const float* from) const {
#if defined(__AVX512F__)
        return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), from);
#elif defined(__AVX2__)
        return _mm256_maskload_ps(from, first_lanes(count));
#else
        Vec value{};
        for (int i = 0; i < kLanes; ++i) {
            if (i < count) value[i] = from[i];
        }
        return value;
#endif
    }

    PWM_FAST_INLINE void store(float* to, Vec value) const {
#if defined(__AVX512F__)
        _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1), value);
#elif defined(__AVX2__)
        _mm256_maskstore_ps(to, first_lanes(count), value);
#else
        for (int i = 0; i < kLanes; ++i) {
            if (i < count) to[i] = value[i];
        }
#endif
    }

    // `value` in the columns of the row, `other` in the lanes beyond.
    PWM_FAST_INLINE Vec keep(Vec value, Vec other) const {
        return lane_numbers() < static_cast<float>(count) ? value : other;
    }
};

// Calls body(column, Whole or Part) along a row.
template <int kStep = kLanes, typename Body>
PWM_FAST_INLINE void for_columns(int64_t columns, Body body) {
    int64_t column = 0;
    for (; column + kStep <= columns; column += kStep) body(column, Whole{});
    if (column < columns) body(column, Part{static_cast<int>(columns - column)});
}

// The vector with lanes i and i ^ kDistance exchanged.
template <int kDistance>
PWM_FAST_INLINE Vec exchange(Vec v) {
#if defined(__clang__) && PWM_FAST_LANES == 16
    return __builtin_shufflevector(v, v, 0 ^ kDistance, 1 ^ kDistance, 2 ^ kDistance, 3 ^ kDistance, 4 ^ kDistance,
                                   5 ^ kDistance, 6 ^ kDistance, 7 ^ kDistance, 8 ^ kDistance, 9 ^ kDistance,
                                   10 ^ kDistance, 11 ^ kDistance, 12 ^ kDistance, 13 ^ kDistance, 14 ^ kDistance,
                                   15 ^ kDistance);
#elif defined(__clang__) && PWM_FAST_LANES == 8
    return __builtin_shufflevector(v, v, 0 ^ kDistance, 1 ^ kDistance, 2 ^ kDistance, 3 ^ kDistance, 4 ^ kDistance,
                                   5 ^ kDistance, 6 ^ kDistance, 7 ^ kDistance);
#elif defined(__clang__)
    return __builtin_shufflevector(v, v, 0 ^ kDistance, 1 ^ kDistance, 2 ^ kDistance, 3 ^ kDistance);
#else
    IntVec order{};
    for (int i = 0; i < kLanes; ++i) order[i] = i ^ kDistance;
    return __builtin_shuffle(v, order);
#endif
}

// Eight neighbouring columns (a SimNorm group) lie in one vector or in two: reduced over the group, in every lane of it.
constexpr int kOctetVectors = kLanes >= 8 ? 1 : 8 / kLanes;
constexpr int kOctetStep = kOctetVectors * kLanes;

template <typename Combine>
PWM_FAST_INLINE Vec over_octet(const Vec (&values)[kOctetVectors], Combine combine) {
    Vec v = values[0];
    for (int i = 1; i < kOctetVectors; ++i) v = combine(v, values[i]);
    v = combine(v, exchange<1>(v));
    v = combine(v, exchange<2>(v));
    if constexpr (kLanes >= 8) v = combine(v, exchange<(kLanes >= 8 ? 4 : 1)>(v));
    return v;
}

PWM_FAST_INLINE float sum_lanes(Vec v) {
    if constexpr (kLanes >= 16) v += exchange<(kLanes >= 16 ? 8 : 1)>(v);
    if constexpr (kLanes >= 8) v += exchange<(kLanes >= 8 ? 4 : 1)>(v);
    v += exchange<2>(v);
    v += exchange<1>(v);
    return v[0];
}

PWM_FAST_INLINE float largest_lane(Vec value) {
    float largest = value[0];
    for (int i = 1; i < kLanes; ++i) largest = value[i] > largest ? value[i] : largest;
    return largest;
}

// exp(x) for x in [-87, 88], relative error 2e-7: 2^k p(r), r = x - k ln 2, p the minimax polynomial of degree 5 with
// p(0) = p'(0) = 1. Adding 1.5 * 2^23 rounds to an integer k and leaves it in the low bits.
PWM_FAST_INLINE Vec exp_in_range(Vec x) {
    const Vec rounder = splat(12582912.0f);
    const Vec shifted = x * 1.44269504f + rounder;
    const Vec k = shifted - rounder;
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    const Vec r = x - k * 0.693147182f;
#else
    const Vec r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
#endif
    const Vec square = r * r;  // two short chains instead of a long one
    const Vec q = (r * 0.00831252057f + 0.0418901555f) * square + (r * 0.166671142f + 0.499992311f);
    const Vec p = q * square + (r + 1.0f);
    return reinterpret_cast<Vec>(reinterpret_cast<BitVec>(p) + (reinterpret_cast<BitVec>(shifted) << 23));
}

// exp(x) for x <= 0, flushed to 1.6e-38 below -87.
PWM_FAST_INLINE Vec exp_of_negative(Vec x) { return exp_in_range(larger(splat(-87.0f), x)); }

// exp(x) as Mish needs it: beyond 20, tanh(softplus(x)) is 1 in float32.
PWM_FAST_INLINE Vec exp_for_mish(Vec x) { return exp_in_range(smaller(splat(20.0f), larger(splat(-87.0f), x))); }

struct MishSlope {
    Vec mish, slope;
};

// x n / (n + 2) with n = e (e + 2), e = exp(x).
PWM_FAST_INLINE Vec mish(Vec x) {
    const Vec e = exp_for_mish(x);
    const Vec n = e * e + 2.0f * e;
    return x * (n / (n + 2.0f));
}

PWM_FAST_INLINE MishSlope mish_slope(Vec x) {
    const Vec e = exp_for_mish(x);
    const Vec n = e * e + 2.0f * e;
    const Vec r = 1.0f / (n + 2.0f);
    const Vec gate = n * r;
    return {x * gate, gate + x * ((4.0f * r) * (r * (e * e + e)))};
}

struct Statistics {
    float mean, rstd;
};

PWM_FAST_INLINE float row_sum(const float* row, int64_t columns) {
    Vec sums[4] = {};
    int64_t column = 0;
    for (; column + 4 * kLanes <= columns; column += 4 * kLanes) {
        for (int i = 0; i < 4; ++i) sums[i] += Whole{}.load(row + column + i * kLanes);
    }
    for_columns(columns - column, [&](int64_t c, auto part) { sums[0] += part.load(row + column + c); });
    return sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The second moment is taken about the mean, in another pass over a row that lies in L1, so that nothing cancels.
PWM_FAST_INLINE Statistics row_statistics(const float* row, float sum, int64_t columns, float eps) {
    const float mean = sum / static_cast<float>(columns);
    Vec squares[4] = {};
    int64_t column = 0;
    for (; column + 4 * kLanes <= columns; column += 4 * kLanes) {
        for (int i = 0; i < 4; ++i) {
            const Vec centred = Whole{}.load(row + column + i * kLanes) - mean;
            squares[i] += centred * centred;
        }
    }
    for_columns(columns - column, [&](int64_t c, auto part) {
        const Vec centred = part.keep(part.load(row + column + c) - mean, Vec{});
        squares[0] += centred * centred;
    });
    const float variance = sum_lanes((squares[0] + squares[1]) + (squares[2] + squares[3])) / static_cast<float>(columns);
    return {mean, 1.0f / __builtin_sqrtf(variance + eps)};
}

}  // namespace
