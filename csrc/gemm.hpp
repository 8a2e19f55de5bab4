// Float32 matrix products for the shapes of extraction: tens to hundreds of rows, hundreds to thousands of columns. Factors
// may be rounded to bfloat16; sums never are.
#pragma once

#include <cstdint>

namespace pwm_fast {

// A matrix anywhere in memory; strides in floats.
struct Matrix {
    const float* data;
    int64_t row, column;
};

// What a product does beside multiplying, panel by panel while these are in the caches, on the thread that multiplies.
class PanelWork {
public:
    virtual ~PanelWork() = default;

    // Floats [from, from + floats) of packed B (AMX: of `plain_panels`) are about to be read for the first time, and may be
    // changed.
    virtual void before(int64_t /*from*/, int64_t /*floats*/) const {}

    // Rows [row, row + rows) of C's panel are written; C lies in panels.
    virtual void after(int64_t /*panel*/, int64_t /*row*/, int64_t /*rows*/) const {}

    const float* beside[3] = {};  // arrays like B's that before() reads: asked for ahead, as B is
};

// C [m, n] = A [m, k] B [k, n] + bias [n], C row-major with rows `ldc` apart. `bias` may be null.
struct Product {
    int64_t m, n, k;
    Matrix a, b;
    bool packed;  // b.data is what the same table's pack() wrote; its strides are ignored
    float* c;
    int64_t ldc;
    const float* bias;
    float* row_sums;  // [m], may be null: receives A's sums along k (bias gradients, when A holds transposed gradients)
    bool a_packed = false;  // a.data is what the same table's pack_rows() wrote; its strides are ignored
    int64_t c_panel = 0;    // where not 0, C is written in panels this far apart, as plain_panels_table() packs B
    bool bf16 = false;      // B is what pack_bf16() wrote, A is rounded too; not with A packed before nor with row sums
    bool tf32 = false;      // 16 bits of each factor's mantissa are enough: AMX saves half of the work (TF32 has 11)
    bool plain_panels = false;  // B, packed, is what plain_panels_table()'s pack() wrote
    bool turned = false;        // the same of B^T, which only AMX reads
    const PanelWork* work = nullptr;
};

constexpr int kChains = 12;  // enough to hide the latency of two multiply-adds a cycle

// One instruction set's kernels; gemm.cpp picks the table and splits the work over groups and threads.
struct GemmTable {
    int64_t panel;      // B is worked on in panels of this many columns
    int64_t panel_row;  // floats of each of their rows when packed: tables of equal ones read what the other packed

    // Columns [first, last) of C, counted in panels. Every element is summed in the same order whatever the range.
    void (*multiply)(const Product& product, int64_t first, int64_t last);

    // B [k, n] as panels [ceil(n / panel)][k][panel], zeros beyond n; AMX has an order of its own.
    void (*pack)(const Matrix& b, int64_t k, int64_t n, float* out);

    // The same in pairs of bfloat16 (gemm_bf16.hpp), each a float's size: panels [ceil(n / panel)][ceil(k / 2)][panel].
    void (*pack_bf16)(const Matrix& b, int64_t k, int64_t n, float* out);

    // Floats that pack() or pack_bf16() writes.
    int64_t (*packed_floats)(int64_t k, int64_t n, bool bf16);

    // A [m, k] in the order in which multiply() copies it otherwise: for factors of many products of one precision.
    void (*pack_rows)(const Matrix& a, int64_t m, int64_t k, bool tf32, float* out);
    int64_t (*packed_rows_floats)(int64_t m, int64_t k, bool tf32);

    // Sums that need no memory, kChains of `lanes` floats at once: what the core can do at most.
    int64_t lanes;
    float (*multiply_adds)(int64_t rounds);
};

// Whether float32 products take `tf32`, as torch.backends.cuda.matmul.allow_tf32 has it for a GPU: for all threads.
bool tf32_allowed();

// The product with the selected instruction set, in `tf32` as it was given where A is packed, else as it is allowed;
// elements do not depend on the number of threads.
void multiply_on_threads(const Product& product, int threads);

// The table of the selected instruction set.
const GemmTable& gemm_table();

// The same, or where its pack() writes no plain floats, one whose panels it reads as `plain_panels`.
const GemmTable& plain_panels_table();

const GemmTable& gemm_portable();
#ifdef PWM_FAST_X86
const GemmTable& gemm_avx2();
const GemmTable& gemm_avx512();
const GemmTable& gemm_avx512bf16();
const GemmTable& gemm_amx();
#endif

}  // namespace pwm_fast
