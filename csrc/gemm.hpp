// Float32 matrix products for the shapes of extraction: tens to hundreds of rows, hundreds to thousands of columns.
#pragma once

#include <cstdint>

namespace pwm_fast {

// A matrix anywhere in memory; strides in floats.
struct Matrix {
    const float* data;
    int64_t row, column;
};

// C [m, n] = A [m, k] B [k, n] + bias [n], C row-major with rows `ldc` apart. `bias` may be null.
struct Product {
    int64_t m, n, k;
    Matrix a, b;
    bool packed;  // b.data is what pack() wrote; its strides are ignored
    float* c;
    int64_t ldc;
    const float* bias;
    float* row_sums;  // [m], may be null: receives A's sums along k (bias gradients, when A holds transposed gradients)
};

// B is worked on in panels of this many columns.
constexpr int64_t kPanel = 32;

inline int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

#ifdef PWM_FAST_X86
// Columns [first, last) of C, counted in panels. Every element is summed in the same order whatever the range.
void multiply_avx512(const Product& product, int64_t first, int64_t last);

// B [k, n] as panels [panels(n)][k][kPanel], zeros beyond n.
void pack_avx512(const Matrix& b, int64_t k, int64_t n, float* out);
#endif

}  // namespace pwm_fast
