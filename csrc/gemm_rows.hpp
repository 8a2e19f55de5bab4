// Products of few rows, an actor's and an encoder's while a policy acts: every weight is used once or a few times, so the
// product takes as long as reading W, and a copy of W in another order would take several times as long.
#pragma once

#include <cstdint>

#include "gemm.hpp"

namespace pwm_fast {

// Up to here scalar products take half to all of the time of packing W and multiplying tiles (bench/test_rows.py), and
// a row's result does not depend on the rows beside it: an action is the same alone and in a batch of episodes.
constexpr int64_t kFewRows = 16;

// Whether A's rows and W's lie in sequence (B = W^T), and are few. One column has a kernel of its own in multiply().
inline bool few_rows(const Product& p) {
    return p.m <= kFewRows && p.n > 1 && !p.packed && !p.a_packed && !p.row_sums && p.c_panel == 0 && p.a.column == 1 &&
           p.b.row == 1;
}

// Columns [first, last) of C where few_rows() holds, counted in panels of the selected instruction set's GemmTable.
// Every element is summed in the same order whatever the range and the number of rows.
void multiply_few_rows(const Product& product, int64_t first, int64_t last);

// What reading memory takes at least, for benchmarks: a plain loop over `count` floats; their sum.
float read_floats(const float* from, int64_t count);

// One instruction set's: columns of C counted one by one.
struct RowsTable {
    void (*multiply)(const Product& product, int64_t first, int64_t last);
    float (*read)(const float* from, int64_t count);
};

const RowsTable& rows_portable();
#ifdef PWM_FAST_X86
const RowsTable& rows_avx2();
const RowsTable& rows_avx512();
#endif

}  // namespace pwm_fast
