// The CPU kernels of pwm_fast.kernels: row-wise normalisation with Mish or SimNorm, two-hot heads, returns, Adam.
#pragma once

#include <cstdint>
#include <optional>

#include "elementwise_table.hpp"

namespace pwm_fast {

using Address = std::uintptr_t;  // of a tensor's data

template <typename T = float>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// y = kernel(x) of one group's rows [rows, columns]; y may be x.
void forward_rows(ElementwiseTable::RowForward ElementwiseTable::*kernel, const float* x, const float* w, const float* b,
                  float* y, float* mean, float* rstd, int64_t rows, int64_t columns, float eps, int threads);

// One group's rows [rows, columns]; see ElementwiseTable. The backward passes of frozen layers give no weights' gradients,
// and dx may be dy.
void layernorm_mish_backward(const float* dy, const float* x, const float* mean, const float* rstd, const float* w,
                             const float* b, float* dx, int64_t rows, int64_t columns, int threads);
void layernorm_simnorm_backward(const float* dy, const float* y, const float* x, const float* mean, const float* rstd,
                                const float* w, float* dx, int64_t rows, int64_t columns, int threads);
void mish_layernorm_forward(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd,
                            int64_t rows, int64_t columns, float eps, int threads);
void mish_layernorm_backward(const float* dy, const float* x, const float* mean, const float* rstd, const float* w,
                             float* dx, float* dw, float* db, int64_t rows, int64_t columns, int threads);

// sums[c] = values [rows, columns] summed over rows, in their order.
void column_sums(const float* values, float* sums, int64_t rows, int64_t columns);

// The kernels of the selected instruction set.
const ElementwiseTable& elementwise_table();

// Starts a policy's clipped Adam step (kernels/clip_adam.py) from its gradient's sum of squares: writes the norm before
// clipping, counts the step and returns its constants; none where the policy is not active or the norm is not finite.
std::optional<AdamConstants> start_adam(double squares, double max_norm, double beta1, double beta2, double eps, float lr,
                                        bool active, int64_t& step, float& norm);

}  // namespace pwm_fast
