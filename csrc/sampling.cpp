// Draws uniform window starts and gathers episode windows from the memory-mapped columns, without the GIL.
// pwm_fast/data/sampling.py is the definition: the same rows for the same (seed, stream, step), bit for bit.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "sampling.hpp"

namespace py = pybind11;

namespace {

template <typename T>
using Column = py::array_t<T, py::array::c_style>;

// Splits [0, count) over `threads` threads; `work(begin, end)` must not throw. Threads are made per call: a pool would
// not survive a fork, and at ~20 us a thread they are only used for batches that take milliseconds.
template <typename Work>
void parallel_for(int64_t count, int threads, int64_t bytes, const Work& work) {
    constexpr int64_t kBytesPerThread = 1 << 18;
    const int64_t useful = std::max<int64_t>(1, bytes / kBytesPerThread);
    const int64_t parts = std::min<int64_t>({static_cast<int64_t>(threads), useful, std::max<int64_t>(1, count)});
    if (parts <= 1) {
        work(int64_t{0}, count);
        return;
    }
    std::vector<std::thread> workers;
    workers.reserve(parts - 1);
    int64_t started = 1;
    try {
        for (; started < parts; ++started) {
            workers.emplace_back([&work, started, count, parts] {
                work(count * started / parts, count * (started + 1) / parts);
            });
        }
    } catch (const std::system_error&) {  // no more threads to be had: the caller does what is left
    }
    work(int64_t{0}, count / parts);
    if (started < parts) work(count * started / parts, count);
    for (auto& worker : workers) worker.join();
}

void lower_to(std::atomic<int64_t>& smallest, int64_t value) {
    int64_t seen = smallest.load();
    while (value < seen && !smallest.compare_exchange_weak(seen, value)) {
    }
}

constexpr int64_t kNone = std::numeric_limits<int64_t>::max();

void require(bool condition, const char* message) {
    if (!condition) throw std::invalid_argument(message);
}

template <typename T>
const T* checked(const Column<T>& array, std::vector<int64_t> shape, const char* name) {
    bool same = array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (size_t i = 0; same && i < shape.size(); ++i) same = array.shape(i) == shape[i];
    if (!same) throw std::invalid_argument(std::string(name) + " has the wrong shape");
    return array.data();
}

template <typename T>
std::vector<T> listed(const Column<T>& array) {
    require(array.ndim() == 1, "the parts of a draw must have one dimension");
    return {array.data(), array.data() + array.size()};
}

std::shared_ptr<pwm_fast::Draw> make_draw(const Column<int64_t>& offsets, const Column<int64_t>& first_row,
                                          const Column<int64_t>& group, const Column<uint64_t>& threshold) {
    return std::make_shared<pwm_fast::Draw>(listed(offsets), listed(first_row), listed(group), listed(threshold));
}

// rows[i] = first row of the window drawn for index i.
void draw_rows(uint64_t seed, uint32_t stream, uint64_t step, const pwm_fast::Draw& draw, Column<int64_t>& rows) {
    require(rows.ndim() == 1, "rows must be [B]");
    int64_t* out = rows.mutable_data();
    const int64_t count = rows.size();
    const pwm_fast::Random random = pwm_fast::selected_random();
    py::gil_scoped_release release;
    pwm_fast::RandomPairs pairs;
    for (int64_t begin = 0; begin < count; begin += pairs.kMost) {
        const int64_t some = std::min(pairs.kMost, count - begin);
        random(seed, stream, step, static_cast<uint32_t>(begin), some, pairs);
        for (int64_t i = 0; i < some; ++i) out[begin + i] = draw(pairs[i]).row;
    }
}

// Windows begin to end of B.
bool gather(const pwm_fast::Columns& from, const int64_t* rows, int64_t begin, int64_t end, int64_t horizon, int64_t B,
            const pwm_fast::WindowBatch& to) {
    constexpr int64_t kAtOnce = 256;
    const pwm_fast::Gather some = pwm_fast::selected_gather();
    bool finite = true;
    for (int64_t stop; begin < end; begin = stop) {
        stop = std::min(begin + kAtOnce, end);
        for (int64_t i = begin; i < stop; ++i) pwm_fast::prefetch_numbers(from, rows[i], horizon);
        finite = some(from, rows + begin, stop - begin, end - begin, horizon, begin, B, to) && finite;
    }
    return finite;
}

// out_obs [H+1, B, S], out_action [H, B, A], out_reward [H, B], out_terminated [H, B], out_task [B].
// Returns the first row that holds a value that is not finite, or -1.
int64_t gather_windows(const Column<float>& obs, const Column<float>& action, const Column<float>& reward,
                       const Column<uint8_t>& terminated, const Column<int32_t>& task, const Column<int64_t>& rows,
                       int64_t horizon, int threads, Column<float>& out_obs, Column<float>& out_action,
                       Column<float>& out_reward, Column<uint8_t>& out_terminated, Column<int32_t>& out_task) {
    require(obs.ndim() == 2 && action.ndim() == 2, "obs and action must be [N, S] and [N, A]");
    require(horizon >= 1, "horizon must be >= 1");
    require(rows.ndim() == 1, "rows must be [B]");
    const int64_t num_rows = obs.shape(0), S = obs.shape(1), A = action.shape(1), B = rows.size(), H = horizon;
    const pwm_fast::Columns from{obs.data(),
                                 checked(action, {num_rows, A}, "action"),
                                 checked(reward, {num_rows}, "reward"),
                                 checked(terminated, {num_rows}, "terminated"),
                                 checked(task, {num_rows}, "task"),
                                 num_rows,
                                 S,
                                 A};
    checked(out_obs, {H + 1, B, S}, "out obs");
    checked(out_action, {H, B, A}, "out action");
    checked(out_reward, {H, B}, "out reward");
    checked(out_terminated, {H, B}, "out terminated");
    checked(out_task, {B}, "out task");
    const pwm_fast::WindowBatch to{out_obs.mutable_data(), out_action.mutable_data(), out_reward.mutable_data(),
                                   out_terminated.mutable_data(), out_task.mutable_data(), S, A};
    const int64_t* first = rows.data();
    require(std::all_of(first, first + B, [&](int64_t row) { return row >= 0 && row < num_rows - H; }),
            "a window lies outside the store");

    py::gil_scoped_release release;
    std::atomic<int64_t> bad_row{kNone};
    parallel_for(B, threads, B * (H + 1) * (S + A) * 4, [&](int64_t begin, int64_t end) {
        if (!gather(from, first, begin, end, H, B, to))
            lower_to(bad_row, pwm_fast::first_not_finite(from, first + begin, end - begin, H));
    });
    return bad_row.load() == kNone ? -1 : bad_row.load();
}

// out [B, S] = obs[rows]. Returns the first row that holds a value that is not finite, or -1.
int64_t gather_rows(const Column<float>& obs, const Column<int64_t>& rows, int threads, Column<float>& out) {
    require(obs.ndim() == 2 && rows.ndim() == 1, "obs must be [N, S] and rows [B]");
    const int64_t num_rows = obs.shape(0), S = obs.shape(1), B = rows.size();
    checked(out, {B, S}, "out");
    pwm_fast::Columns from;
    from.obs = obs.data();
    from.obs_dim = S;
    pwm_fast::WindowBatch to;
    to.obs = out.mutable_data();
    to.obs_dim = S;
    const int64_t* first = rows.data();
    require(std::all_of(first, first + B, [&](int64_t row) { return row >= 0 && row < num_rows; }),
            "a row lies outside the store");

    py::gil_scoped_release release;
    std::atomic<int64_t> bad_row{kNone};
    parallel_for(B, threads, B * S * 4, [&](int64_t begin, int64_t end) {
        if (!gather(from, first, begin, end, 0, B, to))
            lower_to(bad_row, pwm_fast::first_not_finite(from, first + begin, end - begin, 0));
    });
    return bad_row.load() == kNone ? -1 : bad_row.load();
}

}  // namespace

void register_sampling(py::module_& module) {
    py::class_<pwm_fast::Draw, std::shared_ptr<pwm_fast::Draw>>(module, "Draw", "See pwm_fast/data/drawing.py.")
        .def(py::init(&make_draw), py::arg("offsets").noconvert(), py::arg("first_row").noconvert(),
             py::arg("group").noconvert(), py::arg("threshold").noconvert());
    module.def("draw_rows", &draw_rows, py::arg("seed"), py::arg("stream"), py::arg("step"), py::arg("draw"),
               py::arg("rows").noconvert(),
               "Fills rows [B] with drawn window starts (Philox4x32-10, counter = (index, stream, step)).");
    module.def("gather_windows", &gather_windows, py::arg("obs").noconvert(), py::arg("action").noconvert(),
               py::arg("reward").noconvert(), py::arg("terminated").noconvert(), py::arg("task").noconvert(),
               py::arg("rows").noconvert(), py::arg("horizon"), py::arg("threads"), py::arg("out_obs").noconvert(),
               py::arg("out_action").noconvert(), py::arg("out_reward").noconvert(),
               py::arg("out_terminated").noconvert(), py::arg("out_task").noconvert(),
               "Copies windows of `horizon` transitions, time first. Returns the first row with NaN or inf, or -1.");
    module.def("gather_rows", &gather_rows, py::arg("obs").noconvert(), py::arg("rows").noconvert(),
               py::arg("threads"), py::arg("out").noconvert(),
               "out [B, S] = obs[rows]. Returns the first row with NaN or inf, or -1.");
}
