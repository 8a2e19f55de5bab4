// Picks the instruction set of products of few rows.
#include "gemm_rows.hpp"

#include <algorithm>

#include "isa.hpp"

namespace pwm_fast {
namespace {

const RowsTable& table() {
#ifdef PWM_FAST_X86
    if (selected_isa() >= Isa::avx512) return rows_avx512();
    if (selected_isa() == Isa::avx2) return rows_avx2();
#endif
    return rows_portable();
}

}  // namespace

void multiply_few_rows(const Product& product, int64_t first, int64_t last) {
    const int64_t panel = gemm_table().panel;
    table().multiply(product, first * panel, std::min(last * panel, product.n));
}

float read_floats(const float* from, int64_t count) { return table().read(from, count); }

}  // namespace pwm_fast
