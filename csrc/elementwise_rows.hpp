// The kernels themselves, written once for every instruction set; see elementwise_table.hpp for what each receives.
// The formulas are those of kernels/*.py, where each op is defined. Outputs may overwrite the gradient they come from.
#pragma once

#include "elementwise_table.hpp"
#include "elementwise_vector.hpp"

namespace {

void layernorm_mish_forward(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd,
                            int64_t rows, int64_t columns, float eps) {
    for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
        const Statistics s = row_statistics(x, row_sum(x, columns), columns, eps);
        mean[row] = s.mean;
        rstd[row] = s.rstd;
        for_columns(columns, [&](int64_t c, auto part) {
            part.store(y + c, mish((part.load(x + c) - s.mean) * s.rstd * part.load(w + c) + part.load(b + c)));
        });
    }
}

// dx = rstd (g - mean(g) - n mean(g n)) with g the gradient at the normalised row n, given sum(g) and sum(g n).
struct NormGradient {
    float rstd, mean_g, mean_gn;

    PWM_FAST_INLINE NormGradient(float rstd, Vec sum_g, Vec sum_gn, int64_t columns)
        : rstd(rstd),
          mean_g(sum_lanes(sum_g) / static_cast<float>(columns)),
          mean_gn(sum_lanes(sum_gn) / static_cast<float>(columns)) {}

    PWM_FAST_INLINE Vec operator()(Vec g, Vec n) const { return ((g - mean_g) - n * mean_gn) * rstd; }
};

template <typename Lanes>
PWM_FAST_INLINE void add_to(float* sum, Vec value, Lanes part) {
    part.store(sum, part.load(sum) + value);
}

// The part shared by layernorm_mish and layernorm_simnorm: `gradient` gives du at the affine output u of column c.
template <bool kWeights, typename Gradient>
PWM_FAST_INLINE void layernorm_backward_row(const float* x, float mean, float rstd, const float* w, float* dx, float* dw,
                                            float* db, float* g, int64_t columns, Gradient gradient) {
    Vec sum_g{}, sum_gn{};
    for_columns(columns, [&](int64_t c, auto part) {
        const Vec n = part.keep((part.load(x + c) - mean) * rstd, Vec{});
        const Vec weight = part.load(w + c);
        const Vec du = gradient(c, n, weight, part);
        const Vec at_norm = du * weight;
        sum_g += at_norm;
        sum_gn += at_norm * n;
        part.store(g + c, at_norm);
        if constexpr (kWeights) {
            add_to(dw + c, du * n, part);
            add_to(db + c, du, part);
        }
    });
    const NormGradient at_input(rstd, sum_g, sum_gn, columns);
    for_columns(columns, [&](int64_t c, auto part) {
        part.store(dx + c, at_input(part.load(g + c), (part.load(x + c) - mean) * rstd));
    });
}

template <bool kWeights>
void layernorm_mish_backward_rows(const float* dy, const float* x, const float* mean, const float* rstd, const float* w,
                                  const float* b, float* dx, float* dw, float* db, float* scratch, int64_t rows,
                                  int64_t columns) {
    for (int64_t row = 0; row < rows; ++row, dy += columns, x += columns, dx += columns) {
        layernorm_backward_row<kWeights>(
            x, mean[row], rstd[row], w, dx, dw, db, scratch, columns, [&](int64_t c, Vec n, Vec weight, auto part) {
                return part.load(dy + c) * mish_slope(n * weight + part.load(b + c)).slope;
            });
    }
}

void layernorm_mish_backward(const float* dy, const float*, const float* x, const float* mean, const float* rstd,
                             const float* w, const float* b, float* dx, float* dw, float* db, float* scratch,
                             int64_t rows, int64_t columns) {
    (dw ? layernorm_mish_backward_rows<true> : layernorm_mish_backward_rows<false>)(dy, x, mean, rstd, w, b, dx, dw, db,
                                                                                     scratch, rows, columns);
}

void mish_layernorm_forward(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd,
                            int64_t rows, int64_t columns, float eps) {
    for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
        Vec sum{};
        for_columns(columns, [&](int64_t c, auto part) {
            const Vec value = mish(part.load(x + c));  // 0 in the lanes beyond the row
            sum += value;
            part.store(y + c, value);
        });
        const Statistics s = row_statistics(y, sum_lanes(sum), columns, eps);
        mean[row] = s.mean;
        rstd[row] = s.rstd;
        for_columns(columns, [&](int64_t c, auto part) {
            part.store(y + c, (part.load(y + c) - s.mean) * s.rstd * part.load(w + c) + part.load(b + c));
        });
    }
}

template <bool kWeights>
void mish_layernorm_backward_rows(const float* dy, const float* x, const float* mean, const float* rstd, const float* w,
                                  float* dx, float* dw, float* db, float* scratch, int64_t rows, int64_t columns) {
    float* const normalised = scratch;
    float* const slope = scratch + columns;
    for (int64_t row = 0; row < rows; ++row, dy += columns, x += columns, dx += columns) {
        Vec sum_g{}, sum_gn{};
        for_columns(columns, [&](int64_t c, auto part) {
            const MishSlope m = mish_slope(part.load(x + c));
            const Vec n = (m.mish - mean[row]) * rstd[row];
            const Vec dy_here = part.load(dy + c);
            const Vec g = dy_here * part.load(w + c);
            sum_g += g;
            sum_gn += g * n;
            part.store(normalised + c, n);
            part.store(slope + c, m.slope);
            if constexpr (kWeights) {
                add_to(dw + c, dy_here * n, part);
                add_to(db + c, dy_here, part);
            }
        });
        const NormGradient at_input(rstd[row], sum_g, sum_gn, columns);
        for_columns(columns, [&](int64_t c, auto part) {
            const Vec g = part.load(dy + c) * part.load(w + c);
            part.store(dx + c, at_input(g, part.load(normalised + c)) * part.load(slope + c));
        });
    }
}

void mish_layernorm_backward(const float* dy, const float*, const float* x, const float* mean, const float* rstd,
                             const float* w, const float*, float* dx, float* dw, float* db, float* scratch,
                             int64_t rows, int64_t columns) {
    (dw ? mish_layernorm_backward_rows<true> : mish_layernorm_backward_rows<false>)(dy, x, mean, rstd, w, dx, dw, db,
                                                                                     scratch, rows, columns);
}

constexpr auto kSum = [](Vec a, Vec b) { return a + b; };
constexpr auto kLargest = [](Vec a, Vec b) { return larger(a, b); };

void layernorm_simnorm_forward(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd,
                               int64_t rows, int64_t columns, float eps) {
    for (int64_t row = 0; row < rows; ++row, x += columns, y += columns) {
        const Statistics s = row_statistics(x, row_sum(x, columns), columns, eps);
        mean[row] = s.mean;
        rstd[row] = s.rstd;
        for_columns<kOctetStep>(columns, [&](int64_t c, auto part) {
            Vec u[kOctetVectors];
            for (int i = 0; i < kOctetVectors; ++i) {
                const int64_t at = c + i * kLanes;
                u[i] = (part.load(x + at) - s.mean) * s.rstd * part.load(w + at) + part.load(b + at);
            }
            const Vec top = over_octet(u, kLargest);
            for (Vec& value : u) value = exp_of_negative(value - top);
            const Vec scale = 1.0f / over_octet(u, kSum);
            for (int i = 0; i < kOctetVectors; ++i) part.store(y + c + i * kLanes, u[i] * scale);
        });
    }
}

template <bool kWeights>
void layernorm_simnorm_backward_rows(const float* dy, const float* y, const float* x, const float* mean,
                                     const float* rstd, const float* w, float* dx, float* dw, float* db, float* scratch,
                                     int64_t rows, int64_t columns) {
    float* const du = scratch + columns;
    for (int64_t row = 0; row < rows; ++row, dy += columns, y += columns, x += columns, dx += columns) {
        for_columns<kOctetStep>(columns, [&](int64_t c, auto part) {
            Vec weighted[kOctetVectors];
            for (int i = 0; i < kOctetVectors; ++i) {
                weighted[i] = part.load(dy + c + i * kLanes) * part.load(y + c + i * kLanes);
            }
            const Vec total = over_octet(weighted, kSum);
            for (int i = 0; i < kOctetVectors; ++i) {
                const int64_t at = c + i * kLanes;
                part.store(du + at, part.load(y + at) * (part.load(dy + at) - total));
            }
        });
        layernorm_backward_row<kWeights>(x, mean[row], rstd[row], w, dx, dw, db, scratch, columns,
                                         [&](int64_t c, Vec, Vec, auto part) { return part.load(du + c); });
    }
}

void layernorm_simnorm_backward(const float* dy, const float* y, const float* x, const float* mean, const float* rstd,
                                const float* w, const float*, float* dx, float* dw, float* db, float* scratch,
                                int64_t rows, int64_t columns) {
    (dw ? layernorm_simnorm_backward_rows<true> : layernorm_simnorm_backward_rows<false>)(
        dy, y, x, mean, rstd, w, dx, dw, db, scratch, rows, columns);
}

void td_lambda(const float* reward, const float* next_value, const float* continues, float* result, int64_t horizon,
               int64_t stride, int64_t columns, float gamma, float lambda) {
    for_columns(columns, [&](int64_t c, auto part) {
        Vec following = part.load(next_value + (horizon - 1) * stride + c);
        for (int64_t h = horizon - 1; h >= 0; --h) {
            const int64_t at = h * stride + c;
            const Vec value = part.load(next_value + at);
            Vec discounted = (value + (following - value) * lambda) * gamma;
            if (continues) discounted *= part.load(continues + at);
            following = part.load(reward + at) + discounted;
            part.store(result + at, following);
        }
    });
}

double sum_of_squares(const float* values, int64_t count) {
    Vec sums[4] = {};
    int64_t at = 0;
    for (; at + 4 * kLanes <= count; at += 4 * kLanes) {
        for (int i = 0; i < 4; ++i) {
            const Vec v = Whole{}.load(values + at + i * kLanes);
            sums[i] += v * v;
        }
    }
    for_columns(count - at, [&](int64_t c, auto part) {
        const Vec v = part.load(values + at + c);
        sums[0] += v * v;
    });
    double total = 0.0;
    for (const Vec& sum : sums) {
        for (int i = 0; i < kLanes; ++i) total += static_cast<double>(sum[i]);
    }
    return total;
}

PWM_FAST_INLINE Vec square_root(Vec value) {
#if defined(__AVX512F__)
    return _mm512_maskz_sqrt_ps(0xffff, value);  // the unmasked form makes GCC 12 warn of its own header
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(value);
#else
    for (int i = 0; i < kLanes; ++i) value[i] = __builtin_sqrtf(value[i]);
    return value;
#endif
}

void adam(float* param, const float* grad, float* m, float* v, int64_t count, const pwm_fast::AdamConstants& k) {
    for_columns(count, [&](int64_t c, auto part) {
        const Vec g = part.load(grad + c) * k.scale;
        const Vec old_m = part.load(m + c);
        const Vec new_m = old_m + (g - old_m) * k.rest1;
        const Vec new_v = part.load(v + c) * k.beta2 + g * g * k.rest2;
        part.store(m + c, new_m);
        part.store(v + c, new_v);
        part.store(param + c, part.load(param + c) - new_m * k.rate / (square_root(new_v) * k.correction2 + k.eps));
    });
}

void add(float* sum, const float* values, int64_t count) {
    for_columns(count, [&](int64_t c, auto part) { add_to(sum + c, part.load(values + c), part); });
}

}  // namespace
