// What the products' kernels have in common: parts of matrices, rows in tiles, memory for copies. In vectors of
// PWM_FAST_LANES floats; included by one source file per instruction set (see elementwise_vector.hpp).
#pragma once

#include <cstdlib>

#include "elementwise_vector.hpp"
#include "gemm.hpp"

namespace {

using pwm_fast::Matrix;
using pwm_fast::Product;

PWM_FAST_INLINE constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
PWM_FAST_INLINE constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
PWM_FAST_INLINE constexpr int64_t pieces(int64_t length, int64_t longest) { return most((length + longest - 1) / longest, 1); }

PWM_FAST_INLINE Matrix part_of(const Matrix& whole, int64_t row, int64_t column) {
    return {whole.data + row * whole.row + column * whole.column, whole.row, whole.column};
}

// A block's rows in tiles of nearly equal heights. One division: two in each tile took a fortieth of a product.
template <int64_t kTallest>
struct TilesOfRows {
    int64_t count, low, taller;

    PWM_FAST_INLINE explicit TilesOfRows(int64_t height)
        : count(pieces(height, kTallest)), low(height / count), taller(height - low * count) {}

    PWM_FAST_INLINE int64_t edge(int64_t t) const { return t * low + least(t, taller); }
    PWM_FAST_INLINE int64_t height(int64_t t) const { return low + (t < taller); }
};

// Memory that a thread keeps between products; its content is never read before it is written.
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { std::free(memory_); }

    float* floats(int64_t count) {
        constexpr int64_t kRoom = 48;  // for alignment, and for vectors that reach beyond the last float
        if (count > size_) {
            std::free(memory_);
            memory_ = std::malloc(static_cast<size_t>(count + kRoom) * sizeof(float));
            if (memory_ == nullptr) std::abort();  // a few hundred KB: nothing can go on without them
            size_ = count;
        }
        return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory_) + 63) / 64 * 64);
    }

private:
    void* memory_ = nullptr;
    int64_t size_ = 0;
};

// A value network's output: one column of factors that lie together and that nobody copied.
PWM_FAST_INLINE bool is_column(const Product& p) {
    return p.n == 1 && !p.packed && !p.a_packed && !p.row_sums && !p.work && p.a.column == 1 && p.b.row == 1;
}

// A scalar product per row reads A once and copies nothing.
void multiply_column(const Product& p) {
    const float bias = p.bias ? *p.bias : 0.0f;
    for (int64_t i = 0; i < p.m; ++i) {
        const float* const row = p.a.data + i * p.a.row;
        Vec sums[4] = {};
        int64_t k = 0;
        for (; k + 4 * kLanes <= p.k; k += 4 * kLanes) {
            for (int j = 0; j < 4; ++j) {
                sums[j] += Whole{}.load(row + k + j * kLanes) * Whole{}.load(p.b.data + k + j * kLanes);
            }
        }
        for_columns(p.k - k, [&](int64_t c, auto part) { sums[0] += part.load(row + k + c) * part.load(p.b.data + k + c); });
        p.c[i * p.ldc] = bias + sum_lanes((sums[0] + sums[1]) + (sums[2] + sums[3]));
    }
}

}  // namespace
