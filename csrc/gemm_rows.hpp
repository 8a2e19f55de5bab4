// Products of few rows, an actor's and an encoder's while a policy acts: every weight is used once or a few times, so the
// product takes as long as reading W, and a copy of W in another order would take several times as long.
#pragma once

#include <cstdint>

#include "gemm.hpp"

namespace pwm_fast {

// On one Zen 3 core scalar products take less time than packing W and multiplying tiles up to some 20 rows
// (bench/test_rows.py). A row's result does not depend on the rows beside it, as long as there are at most this many.
constexpr int64_t kFewRows = 16;

// Whether A's rows and W's lie in sequence (B = W^T), and are few. One column has a kernel of its own in multiply().
inline bool few_rows(const Product& p) {
    return p.m <= kFewRows && p.n > 1 && !p.packed && !p.a_packed && !p.row_sums && p.c_panel == 0 && p.a.column == 1 &&
           p.b.row == 1;
}

// Columns [first, last) of C where few_rows() holds, counted in panels of the selected instruction set's GemmTable.
// Every element is summed in the same order whatever the range and the number of rows.
void multiply_few_rows(const Product& product, int64_t first, int64_t last);

// The same with columns counted one by one, for one instruction set.
void multiply_few_rows_portable(const Product& product, int64_t first, int64_t last);
#ifdef PWM_FAST_X86
void multiply_few_rows_avx2(const Product& product, int64_t first, int64_t last);
void multiply_few_rows_avx512(const Product& product, int64_t first, int64_t last);
#endif

}  // namespace pwm_fast
