// One instruction set's kernels as a table of functions. Each works on rows of one group, or on one span of parameters;
// elementwise.cpp picks the table and splits the work over groups and threads.
#pragma once

#include <cstdint>

namespace pwm_fast {

struct AdamConstants {
    float scale;         // of the gradient: min(1, max_norm / (norm + 1e-6))
    float beta1, beta2, rest1, rest2;  // rest = 1 - beta, rounded once from double
    float rate;          // lr / (1 - beta1^step)
    float correction2;   // 1 / sqrt(1 - beta2^step)
    float eps;
};

// Row-major rows [rows, columns]; w and b [columns]; mean and rstd [rows]. dw and db [columns] are added to and may both
// be null; scratch holds 2 * columns floats.
struct ElementwiseTable {
    using RowForward = void (*)(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd,
                                int64_t rows, int64_t columns, float eps);
    using RowBackward = void (*)(const float* dy, const float* y, const float* x, const float* mean, const float* rstd,
                                 const float* w, const float* b, float* dx, float* dw, float* db, float* scratch,
                                 int64_t rows, int64_t columns);

    RowForward layernorm_mish_forward;
    RowBackward layernorm_mish_backward;  // ignores y
    RowForward mish_layernorm_forward;
    RowBackward mish_layernorm_backward;  // ignores y and b
    RowForward layernorm_simnorm_forward;    // columns % 8 == 0
    RowBackward layernorm_simnorm_backward;  // ignores b

    void (*expectation_forward)(const float* logits, float* value, int64_t rows, int64_t bins, float vmin, float vmax);
    void (*expectation_backward)(const float* dvalue, const float* logits, float* dlogits, int64_t rows, int64_t bins,
                                 float vmin, float vmax);
    void (*cross_entropy_forward)(const float* logits, const float* target, float* loss, int64_t rows, int64_t bins,
                                  float vmin, float vmax);
    void (*cross_entropy_backward)(const float* dloss, const float* logits, const float* target, float* dlogits,
                                   int64_t rows, int64_t bins, float vmin, float vmax);

    // [horizon, stride] arrays, the columns [0, columns) of them; continues may be null.
    void (*td_lambda)(const float* reward, const float* next_value, const float* continues, float* result,
                      int64_t horizon, int64_t stride, int64_t columns, float gamma, float lambda);

    double (*sum_of_squares)(const float* values, int64_t count);
    void (*adam)(float* param, const float* grad, float* m, float* v, int64_t count, const AdamConstants& constants);
    void (*add)(float* sum, const float* values, int64_t count);
};

const ElementwiseTable& elementwise_portable();
#ifdef PWM_FAST_X86
const ElementwiseTable& elementwise_avx2();
const ElementwiseTable& elementwise_avx512();
#endif

}  // namespace pwm_fast
