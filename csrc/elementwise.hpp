// The CPU kernels of pwm_fast.kernels: row-wise normalisation with Mish or SimNorm, two-hot heads, returns, Adam.
#pragma once

#include <cstdint>

namespace pwm_fast {

using Address = std::uintptr_t;  // of a tensor's data

// Mish and LayerNorm of one group's rows [rows, columns]; see ElementwiseTable.
void mish_layernorm_forward(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd,
                            int64_t rows, int64_t columns, float eps, int threads);
void mish_layernorm_backward(const float* dy, const float* x, const float* mean, const float* rstd, const float* w,
                             float* dx, float* dw, float* db, int64_t rows, int64_t columns, int threads);

}  // namespace pwm_fast
