// Splits the row kernels over groups, chunks of rows and threads, and puts them before Python. Arrays come as addresses
// (tensor.data_ptr()), float32 and contiguous; pwm_fast/kernels checks that. The GIL is released while a kernel runs.
//
// Results do not depend on the number of threads: chunks depend on the shape alone, and sums over chunks (weight
// gradients, norms) are added up in order.
#include "elementwise.hpp"

#include <pybind11/pybind11.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "elementwise_table.hpp"
#include "elementwise_threads.hpp"
#include "isa.hpp"

namespace py = pybind11;

namespace pwm_fast {

const ElementwiseTable& elementwise_table() {
#ifdef PWM_FAST_X86
    if (selected_isa() >= Isa::avx512) return elementwise_avx512();
    if (selected_isa() == Isa::avx2) return elementwise_avx2();
#endif
    return elementwise_portable();
}

namespace {

const ElementwiseTable& table() { return elementwise_table(); }

Address address(const float* data) { return reinterpret_cast<Address>(data); }

const float* in(Address address) { return reinterpret_cast<const float*>(address); }
float* out(Address address) { return reinterpret_cast<float*>(address); }

constexpr int64_t kWorkPerThread = 1 << 15;  // elements, some 20 us: less is done sooner than a thread wakes up

int useful_threads(int64_t elements, int threads) {
    return static_cast<int>(std::clamp<int64_t>(elements / kWorkPerThread, 1, std::max(threads, 1)));
}

// Rows [begin, end) of each group as one task.
struct RowTasks {
    int64_t groups, rows, columns, rows_per_chunk, chunks;

    RowTasks(int64_t groups, int64_t rows, int64_t columns, int64_t rows_per_chunk)
        : groups(groups),
          rows(rows),
          columns(columns),
          rows_per_chunk(std::max<int64_t>(rows_per_chunk, 1)),
          chunks((rows + this->rows_per_chunk - 1) / this->rows_per_chunk) {}

    // Calls work(group, chunk, first row counted over all groups, number of rows, slot).
    template <typename Work>
    void run(int threads, const Work& work) const {
        WorkerPool::instance().run(groups * chunks, threads, [&](int64_t task, int slot) {
            const int64_t group = task / chunks, chunk = task % chunks, begin = chunk * rows_per_chunk;
            work(group, chunk, group * rows + begin, std::min(rows - begin, rows_per_chunk), slot);
        });
    }
};

constexpr int64_t kElementsPerChunk = 1 << 14;

void run_rows(ElementwiseTable::RowForward ElementwiseTable::*which, Address x, Address w, Address b, Address y,
              Address mean, Address rstd, int64_t groups, int64_t rows, int64_t columns, float eps, int threads) {
    const RowTasks tasks(groups, rows, columns, kElementsPerChunk / std::max<int64_t>(columns, 1));
    const auto kernel = table().*which;
    tasks.run(useful_threads(groups * rows * columns, threads),
              [&](int64_t group, int64_t, int64_t row, int64_t count, int) {
                  kernel(in(x) + row * columns, in(w) + group * columns, in(b) + group * columns,
                         out(y) + row * columns, out(mean) + row, out(rstd) + row, count, columns, eps);
              });
}

template <ElementwiseTable::RowForward ElementwiseTable::*kKernel>
void row_forward(Address x, Address w, Address b, Address y, Address mean, Address rstd, int64_t groups, int64_t rows,
                 int64_t columns, float eps, int threads) {
    run_rows(kKernel, x, w, b, y, mean, rstd, groups, rows, columns, eps, threads);
}

// dw and db are 0 where no weight gradients are wanted. Otherwise every chunk of rows sums its own, and the chunks are
// then added in order; 16 chunks of at least 16 rows keep that extra work below a tenth.
template <ElementwiseTable::RowBackward ElementwiseTable::*kKernel>
void row_backward(Address dy, Address y, Address x, Address mean, Address rstd, Address w, Address b, Address dx,
                  Address dw, Address db, int64_t groups, int64_t rows, int64_t columns, int threads) {
    const bool weights = dw != 0;
    const int64_t rows_per_chunk =
        weights ? std::max<int64_t>((rows + 15) / 16, 16) : kElementsPerChunk / std::max<int64_t>(columns, 1);
    const RowTasks tasks(groups, rows, columns, rows_per_chunk);
    const int used = useful_threads(groups * rows * columns, threads);
    std::vector<float> scratch(static_cast<size_t>(used * 2 * columns));
    std::vector<float> sums(weights ? static_cast<size_t>(groups * tasks.chunks * 2 * columns) : 0);
    const auto kernel = table().*kKernel;
    tasks.run(used, [&](int64_t group, int64_t chunk, int64_t row, int64_t count, int slot) {
        const int64_t at = row * columns, of_group = group * columns;
        float* sum = weights ? sums.data() + (group * tasks.chunks + chunk) * 2 * columns : nullptr;
        kernel(in(dy) + at, y ? in(y) + at : nullptr, in(x) + at, in(mean) + row, in(rstd) + row, in(w) + of_group,
               b ? in(b) + of_group : nullptr, out(dx) + at, sum, weights ? sum + columns : nullptr,
               scratch.data() + slot * 2 * columns, count, columns);
    });
    if (!weights) return;
    for (int64_t group = 0; group < groups; ++group) {
        float* const dw_group = out(dw) + group * columns;
        float* const db_group = out(db) + group * columns;
        std::fill_n(dw_group, columns, 0.0f);
        std::fill_n(db_group, columns, 0.0f);
        for (int64_t chunk = 0; chunk < tasks.chunks; ++chunk) {
            const float* sum = sums.data() + (group * tasks.chunks + chunk) * 2 * columns;
            table().add(dw_group, sum, columns);
            table().add(db_group, sum + columns, columns);
        }
    }
}

void layernorm_mish_backward_groups(Address dy, Address x, Address mean, Address rstd, Address w, Address b, Address dx,
                                    Address dw, Address db, int64_t groups, int64_t rows, int64_t columns, int threads) {
    row_backward<&ElementwiseTable::layernorm_mish_backward>(dy, 0, x, mean, rstd, w, b, dx, dw, db, groups, rows,
                                                             columns, threads);
}

void mish_layernorm_backward_groups(Address dy, Address x, Address mean, Address rstd, Address w, Address dx, Address dw,
                                    Address db, int64_t groups, int64_t rows, int64_t columns, int threads) {
    row_backward<&ElementwiseTable::mish_layernorm_backward>(dy, 0, x, mean, rstd, w, 0, dx, dw, db, groups, rows,
                                                             columns, threads);
}

void layernorm_simnorm_backward_groups(Address dy, Address y, Address x, Address mean, Address rstd, Address w,
                                       Address dx, Address dw, Address db, int64_t groups, int64_t rows,
                                       int64_t columns, int threads) {
    row_backward<&ElementwiseTable::layernorm_simnorm_backward>(dy, y, x, mean, rstd, w, 0, dx, dw, db, groups, rows,
                                                                columns, threads);
}

// Calls work(first row, number of rows) over rows of `bins` logits.
template <typename Work>
void over_rows(int64_t rows, int64_t bins, int threads, const Work& work) {
    table();  // where it raises, it does so on this thread
    const RowTasks tasks(1, rows, bins, kElementsPerChunk / std::max<int64_t>(bins, 1));
    tasks.run(useful_threads(rows * bins, threads),
              [&](int64_t, int64_t, int64_t row, int64_t count, int) { work(row, count); });
}

void two_hot_expectation_forward(Address logits, Address value, int64_t rows, int64_t bins, float vmin, float vmax,
                                 int threads) {
    over_rows(rows, bins, threads, [&](int64_t row, int64_t count) {
        table().expectation_forward(in(logits) + row * bins, out(value) + row, count, bins, vmin, vmax);
    });
}

void two_hot_expectation_backward(Address dvalue, Address logits, Address dlogits, int64_t rows, int64_t bins,
                                  float vmin, float vmax, int threads) {
    over_rows(rows, bins, threads, [&](int64_t row, int64_t count) {
        table().expectation_backward(in(dvalue) + row, in(logits) + row * bins, out(dlogits) + row * bins, count, bins,
                                     vmin, vmax);
    });
}

void two_hot_cross_entropy_forward(Address logits, Address target, Address loss, int64_t rows, int64_t bins, float vmin,
                                   float vmax, int threads) {
    over_rows(rows, bins, threads, [&](int64_t row, int64_t count) {
        table().cross_entropy_forward(in(logits) + row * bins, in(target) + row, out(loss) + row, count, bins, vmin,
                                      vmax);
    });
}

void two_hot_cross_entropy_backward(Address dloss, Address logits, Address target, Address dlogits, int64_t rows,
                                    int64_t bins, float vmin, float vmax, int threads) {
    over_rows(rows, bins, threads, [&](int64_t row, int64_t count) {
        table().cross_entropy_backward(in(dloss) + row, in(logits) + row * bins, in(target) + row,
                                       out(dlogits) + row * bins, count, bins, vmin, vmax);
    });
}

void td_lambda(Address reward, Address next_value, Address continues, Address result, int64_t horizon, int64_t columns,
               double gamma, double lambda) {
    table().td_lambda(in(reward), in(next_value), continues ? in(continues) : nullptr, out(result), horizon, columns,
                      columns, static_cast<float>(gamma), static_cast<float>(lambda));
}

}  // namespace

void forward_rows(ElementwiseTable::RowForward ElementwiseTable::*kernel, const float* x, const float* w, const float* b,
                  float* y, float* mean, float* rstd, int64_t rows, int64_t columns, float eps, int threads) {
    run_rows(kernel, address(x), address(w), address(b), address(y), address(mean), address(rstd), 1, rows, columns, eps,
             threads);
}

void layernorm_mish_backward(const float* dy, const float* x, const float* mean, const float* rstd, const float* w,
                             const float* b, float* dx, int64_t rows, int64_t columns, int threads) {
    layernorm_mish_backward_groups(address(dy), address(x), address(mean), address(rstd), address(w), address(b),
                                   address(dx), 0, 0, 1, rows, columns, threads);
}

void layernorm_simnorm_backward(const float* dy, const float* y, const float* x, const float* mean, const float* rstd,
                                const float* w, float* dx, int64_t rows, int64_t columns, int threads) {
    layernorm_simnorm_backward_groups(address(dy), address(y), address(x), address(mean), address(rstd), address(w),
                                      address(dx), 0, 0, 1, rows, columns, threads);
}

void mish_layernorm_forward(const float* x, const float* w, const float* b, float* y, float* mean, float* rstd,
                            int64_t rows, int64_t columns, float eps, int threads) {
    forward_rows(&ElementwiseTable::mish_layernorm_forward, x, w, b, y, mean, rstd, rows, columns, eps, threads);
}

void mish_layernorm_backward(const float* dy, const float* x, const float* mean, const float* rstd, const float* w,
                             float* dx, float* dw, float* db, int64_t rows, int64_t columns, int threads) {
    mish_layernorm_backward_groups(address(dy), address(x), address(mean), address(rstd), address(w), address(dx),
                                   address(dw), address(db), 1, rows, columns, threads);
}

void column_sums(const float* values, float* sums, int64_t rows, int64_t columns) {
    std::fill_n(sums, columns, 0.0f);
    for (int64_t row = 0; row < rows; ++row) table().add(sums, values + row * columns, columns);
}

std::optional<AdamConstants> start_adam(double squares, double max_norm, double beta1, double beta2, double eps, float lr,
                                        bool active, int64_t& step, float& norm) {
    const double length = std::sqrt(squares);
    norm = static_cast<float>(length);
    if (!active || !std::isfinite(norm)) return std::nullopt;
    const double t = static_cast<double>(++step);
    return AdamConstants{static_cast<float>(std::min(1.0, max_norm / (length + 1e-6))),
                         static_cast<float>(beta1),
                         static_cast<float>(beta2),
                         static_cast<float>(1.0 - beta1),
                         static_cast<float>(1.0 - beta2),
                         static_cast<float>(lr / (1.0 - std::pow(beta1, t))),
                         static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t))),
                         static_cast<float>(eps)};
}

namespace {

// One clipped Adam step per policy on rows of `count` parameters (kernels/clip_adam.py): lr float32, step int64 and active
// bool [policies]; `norm` [policies] receives the gradients' norms before clipping. Norms first, then one pass that scales,
// averages and updates.
void clip_adam(Address param, Address grad, Address m, Address v, Address lr, Address step, Address active, Address norm,
               int64_t policies, int64_t count, double max_norm, double beta1, double beta2, double eps, int threads) {
    const int64_t chunks = (count + kElementsPerChunk - 1) / kElementsPerChunk;
    const int used = useful_threads(policies * count, threads);
    const ElementwiseTable& kernels = table();
    std::vector<double> squares(static_cast<size_t>(policies * chunks));
    WorkerPool& pool = WorkerPool::instance();
    const auto size_of = [&](int64_t chunk) { return std::min(count - chunk * kElementsPerChunk, kElementsPerChunk); };
    pool.run(policies * chunks, used, [&](int64_t task, int) {
        const int64_t policy = task / chunks, chunk = task % chunks;
        squares[task] =
            kernels.sum_of_squares(in(grad) + policy * count + chunk * kElementsPerChunk, size_of(chunk));
    });

    std::vector<std::optional<AdamConstants>> constants;
    for (int64_t policy = 0; policy < policies; ++policy) {
        double total = 0.0;
        for (int64_t chunk = 0; chunk < chunks; ++chunk) total += squares[policy * chunks + chunk];
        constants.push_back(start_adam(total, max_norm, beta1, beta2, eps, in(lr)[policy], at<const bool>(active)[policy],
                                       at<int64_t>(step)[policy], out(norm)[policy]));
    }
    pool.run(policies * chunks, used, [&](int64_t task, int) {
        const int64_t policy = task / chunks, chunk = task % chunks;
        if (!constants[policy]) return;
        const int64_t at = policy * count + chunk * kElementsPerChunk;
        kernels.adam(out(param) + at, in(grad) + at, out(m) + at, out(v) + at, size_of(chunk), *constants[policy]);
    });
}

}  // namespace
}  // namespace pwm_fast

void register_elementwise(py::module_& module) {
    using namespace pwm_fast;
    const auto define = [&](const char* name, auto function) {
        module.def(name, function, py::call_guard<py::gil_scoped_release>());
    };
    define("layernorm_mish_forward", &row_forward<&ElementwiseTable::layernorm_mish_forward>);
    define("layernorm_mish_backward", &layernorm_mish_backward_groups);
    define("mish_layernorm_forward", &row_forward<&ElementwiseTable::mish_layernorm_forward>);
    define("mish_layernorm_backward", &mish_layernorm_backward_groups);
    define("layernorm_simnorm_forward", &row_forward<&ElementwiseTable::layernorm_simnorm_forward>);
    define("layernorm_simnorm_backward", &layernorm_simnorm_backward_groups);
    define("two_hot_expectation_forward", &two_hot_expectation_forward);
    define("two_hot_expectation_backward", &two_hot_expectation_backward);
    define("two_hot_cross_entropy_forward", &two_hot_cross_entropy_forward);
    define("two_hot_cross_entropy_backward", &two_hot_cross_entropy_backward);
    define("td_lambda", &td_lambda);
    define("clip_adam", &clip_adam);
    module.def("isa", [] { return name_of(selected_isa()); }, "The instruction set that the native kernels use.");
    module.def("available_isas", [] {
        py::list names;
        for (const Isa isa : available_isas()) names.append(name_of(isa));
        return names;
    }, "What this machine can run, best first.");
    module.def("set_isa", &set_isa, py::arg("name"),
               "Forces an instruction set, for tests; raises ValueError where this machine lacks it.");
}
