// Picks the instruction set of products of few rows.
#include "gemm_rows.hpp"

#include <algorithm>

#include "isa.hpp"

namespace pwm_fast {

void multiply_few_rows(const Product& product, int64_t first, int64_t last) {
    const int64_t panel = gemm_table().panel, begin = first * panel, end = std::min(last * panel, product.n);
#ifdef PWM_FAST_X86
    if (selected_isa() == Isa::avx512) return multiply_few_rows_avx512(product, begin, end);
    if (selected_isa() == Isa::avx2) return multiply_few_rows_avx2(product, begin, end);
#endif
    multiply_few_rows_portable(product, begin, end);
}

}  // namespace pwm_fast
