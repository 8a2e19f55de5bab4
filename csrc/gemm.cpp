// Grouped matrix products before Python: splits groups and columns over threads. Arrays come as addresses
// (tensor.data_ptr()) and strides in floats; kernels/gemm.py checks them. The GIL is released while one runs.
#include "gemm.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "elementwise.hpp"
#include "elementwise_threads.hpp"
#include "gemm_rows.hpp"
#include "huge_pages.hpp"
#include "isa.hpp"

namespace py = pybind11;

namespace pwm_fast {

const GemmTable& gemm_table() {
#ifdef PWM_FAST_X86
#ifdef PWM_FAST_AMX
    if (selected_isa() == Isa::amx) return gemm_amx();
#endif
#ifdef PWM_FAST_AVX512BF16
    if (selected_isa() == Isa::avx512bf16) return gemm_avx512bf16();
#endif
    if (selected_isa() == Isa::avx512) return gemm_avx512();
    if (selected_isa() == Isa::avx2) return gemm_avx2();
#endif
    return gemm_portable();
}

const GemmTable& plain_panels_table() {
#ifdef PWM_FAST_AMX
    if (selected_isa() == Isa::amx) return gemm_avx512();
#endif
    return gemm_table();
}

namespace {

// The portable kernel is a fallback for those who ask for it: torch's libraries know more machines.
bool fastest() { return selected_isa() != Isa::portable || isa_is_forced(); }

using Operand = std::tuple<Address, int64_t, int64_t, int64_t, int64_t>;  // address, strides row column member, share
using Output = std::tuple<Address, int64_t, int64_t>;                     // address, strides row group
using Vector = std::tuple<Address, int64_t>;                              // address or 0, stride group

float* at(Address address, int64_t offset) {
    return address ? reinterpret_cast<float*>(address) + offset : nullptr;
}

// Each member of an operand serves `share` neighbouring groups.
Matrix member(const Operand& operand, int64_t group) {
    const auto& [address, row, column, stride, share] = operand;
    return {at(address, group / share * stride), row, column};
}

constexpr double kWorkPerThread = 4e6;  // multiplications, some 70 us: less is done sooner than a thread wakes up

int useful_threads(double multiplications, int threads) {
    return static_cast<int>(std::clamp(multiplications / kWorkPerThread, 1.0, std::max<double>(threads, 1)));
}

// Products of one shape, product_of(group), over groups and panels of columns. Every task packs its rows of A again, so
// there are no more tasks than threads within a group.
template <typename ProductOf>
void multiply_groups(int64_t groups, int64_t m, int64_t n, int64_t k, int threads, const ProductOf& product_of) {
    if (m < 1 || n < 1) return;
    const GemmTable& kernels = gemm_table();
    const int used = useful_threads(static_cast<double>(groups * m) * static_cast<double>(n * k), threads);
    const int64_t panels = (n + kernels.panel - 1) / kernels.panel, parts = std::min<int64_t>(used, panels);
    WorkerPool::instance().run(groups * parts, used, [&](int64_t task, int) {
        const int64_t part = task % parts;
        const Product product = product_of(task / parts);
        const auto multiply = few_rows(product) ? multiply_few_rows : kernels.multiply;
        multiply(product, panels * part / parts, panels * (part + 1) / parts);
    });
}

// C_g = A_g B_g + bias_g for products of one shape; row_sums_g = A_g summed along k. `packed` is 0, or the floats of a
// panel's row that B was packed for; with `bf16`, B is packed in bfloat16 and A is rounded to it.
void gemm(const Operand& a, const Operand& b, int64_t packed, const Output& c, const Vector& bias, const Vector& row_sums,
          int64_t groups, int64_t m, int64_t n, int64_t k, bool bf16, int threads) {
    if (packed != 0 && packed != gemm_table().panel_row) {
        throw std::invalid_argument("B was packed in panels of " + std::to_string(packed) + " floats a row, " +
                                    name_of(selected_isa()) + " reads " + std::to_string(gemm_table().panel_row) +
                                    ": pack it again after set_isa");
    }
    multiply_groups(groups, m, n, k, threads, [&](int64_t group) {
        const auto [c_address, c_row, c_group] = c;
        const auto vector = [&](const Vector& v) { return at(std::get<0>(v), group * std::get<1>(v)); };
        Product product{m, n, k, member(a, group), member(b, group), packed != 0, at(c_address, group * c_group), c_row,
                        vector(bias), vector(row_sums)};
        product.bf16 = bf16;
        return product;
    });
}

void gemm_pack(Address b, int64_t b_row, int64_t b_column, int64_t k, int64_t n, bool bf16, Address out) {
    advise_huge_pages(at(out, 0), static_cast<size_t>(gemm_table().packed_floats(k, n, bf16)) * sizeof(float));
    const GemmTable& kernels = gemm_table();
    (bf16 ? kernels.pack_bf16 : kernels.pack)({at(b, 0), b_row, b_column}, k, n, at(out, 0));
}

// Floating-point operations done, and their result.
std::tuple<double, float> gemm_peak(int64_t rounds) {
    const float sum = gemm_table().multiply_adds(rounds);
    return {2.0 * static_cast<double>(rounds * kChains * gemm_table().lanes), sum};
}

}  // namespace

void multiply_on_threads(const Product& product, int threads) {
    multiply_groups(1, product.m, product.n, product.k, threads, [&](int64_t) { return product; });
}

}  // namespace pwm_fast

void register_gemm_mlp(py::module_& module);
void register_gemm_rows_network(py::module_& module);

void register_gemm(py::module_& module) {
    using namespace pwm_fast;
    module.def("has_gemm", &fastest, "Whether gemm is the automatic choice: AVX2 or better, or a forced instruction set.");
    module.def("gemm", &gemm, py::call_guard<py::gil_scoped_release>());
    register_gemm_mlp(module);
    register_gemm_rows_network(module);
    module.def("gemm_pack", &gemm_pack, py::call_guard<py::gil_scoped_release>());
    module.def("gemm_peak", &gemm_peak, "Multiply-adds in registers, for benchmarks: operations done, their sum.");
    module.def("gemm_panel_row", [] { return gemm_table().panel_row; }, "Floats of a panel's row, as gemm_pack writes it.");
    module.def(
        "gemm_packed_floats", [](int64_t k, int64_t n, bool bf16) { return gemm_table().packed_floats(k, n, bf16); },
        "Size of what gemm_pack writes for B [k, n]; a pair of bfloat16 is as large as a float.");
}
