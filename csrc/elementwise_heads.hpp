// Two-hot heads: softmax expectation and soft cross-entropy over rows of bins (kernels/two_hot.py), forward and backward.
#pragma once

#include "elementwise_vector.hpp"

namespace {

// Bins counted from the middle of the grid, where the values are smallest and cancel least.
struct Grid {
    float middle, width, half;  // value(bin) = middle + width * (bin - half)

    PWM_FAST_INLINE Grid(int64_t bins, float vmin, float vmax)
        : middle(0.5f * (vmin + vmax)),
          width((vmax - vmin) / static_cast<float>(bins - 1)),
          half(0.5f * static_cast<float>(bins - 1)) {}

    PWM_FAST_INLINE Vec steps(int64_t column) const { return lane_numbers() + (static_cast<float>(column) - half); }
};

PWM_FAST_INLINE float row_maximum(const float* row, int64_t columns) {
    Vec top = splat(row[0]);
    for_columns(columns, [&](int64_t c, auto part) { top = larger(top, part.keep(part.load(row + c), top)); });
    return largest_lane(top);
}

struct SoftmaxSums {
    float top, total, moment;  // largest logit, sum of e^(l - top), sum of e^(l - top) (bin - half)
};

// Sums of one row; with `weights` the numerators are kept there.
PWM_FAST_INLINE SoftmaxSums softmax_sums(const float* logits, int64_t bins, const Grid& grid, float* weights) {
    const float top = row_maximum(logits, bins);
    Vec total{}, moment{};
    for_columns(bins, [&](int64_t c, auto part) {
        const Vec e = part.keep(exp_of_negative(part.load(logits + c) - top), Vec{});
        total += e;
        moment += e * grid.steps(c);
        if (weights) part.store(weights + c, e);
    });
    return {top, sum_lanes(total), sum_lanes(moment)};
}

void expectation_forward(const float* logits, float* value, int64_t rows, int64_t bins, float vmin, float vmax) {
    const Grid grid(bins, vmin, vmax);
    for (int64_t row = 0; row < rows; ++row, logits += bins) {
        const SoftmaxSums s = softmax_sums(logits, bins, grid, nullptr);
        value[row] = grid.middle + grid.width * (s.moment / s.total);
    }
}

void expectation_backward(const float* dvalue, const float* logits, float* dlogits, int64_t rows, int64_t bins,
                          float vmin, float vmax) {
    const Grid grid(bins, vmin, vmax);
    for (int64_t row = 0; row < rows; ++row, logits += bins, dlogits += bins) {
        const SoftmaxSums s = softmax_sums(logits, bins, grid, dlogits);
        const float mean_step = s.moment / s.total;
        const float scale = dvalue[row] * grid.width / s.total;
        for_columns(bins, [&](int64_t c, auto part) {
            part.store(dlogits + c, part.load(dlogits + c) * scale * (grid.steps(c) - mean_step));
        });
    }
}

struct TwoHot {
    int64_t lower;
    float above;  // weight of bin lower + 1
};

// A NaN target lands on bin 0 with weight NaN, so it shows in the loss and never in an address.
PWM_FAST_INLINE TwoHot two_hot(float target, int64_t bins, float vmin, float vmax) {
    const float clamped = target < vmin ? vmin : target > vmax ? vmax : target;
    const float place = (clamped - vmin) * (static_cast<float>(bins - 1) / (vmax - vmin));
    int64_t lower = place >= 0.0f ? static_cast<int64_t>(place) : 0;
    lower = lower < bins - 2 ? lower : bins - 2;
    return {lower, place - static_cast<float>(lower)};
}

void cross_entropy_forward(const float* logits, const float* target, float* loss, int64_t rows, int64_t bins, float vmin,
                           float vmax) {
    const Grid grid(bins, vmin, vmax);
    for (int64_t row = 0; row < rows; ++row, logits += bins) {
        const SoftmaxSums s = softmax_sums(logits, bins, grid, nullptr);
        const TwoHot t = two_hot(target[row], bins, vmin, vmax);
        const float below = logits[t.lower] - s.top;
        const float step = logits[t.lower + 1] - logits[t.lower];
        loss[row] = __builtin_logf(s.total) - (below + step * t.above);
    }
}

void cross_entropy_backward(const float* dloss, const float* logits, const float* target, float* dlogits, int64_t rows,
                            int64_t bins, float vmin, float vmax) {
    const Grid grid(bins, vmin, vmax);
    for (int64_t row = 0; row < rows; ++row, logits += bins, dlogits += bins) {
        const SoftmaxSums s = softmax_sums(logits, bins, grid, dlogits);
        const TwoHot t = two_hot(target[row], bins, vmin, vmax);
        const float scale = dloss[row] / s.total;
        for_columns(bins, [&](int64_t c, auto part) { part.store(dlogits + c, part.load(dlogits + c) * scale); });
        dlogits[t.lower] -= dloss[row] * (1.0f - t.above);
        dlogits[t.lower + 1] -= dloss[row] * t.above;
    }
}

}  // namespace
