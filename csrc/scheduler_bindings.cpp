// RolloutScheduler for Python, whose arrays are its memory: nothing is copied, and they live as long as the workers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <chrono>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include "scheduler.hpp"

namespace py = pybind11;

namespace {

using pwm_fast::Answer;
using Arrays = std::map<std::string, py::array>;

// How long a consumer waits before it looks for Ctrl-C.
constexpr std::chrono::milliseconds kPatience{100};

template <typename T>
T* memory_of(const Arrays& arrays, const std::string& name, const std::vector<int64_t>& shape, bool writeable) {
    const auto found = arrays.find(name);
    if (found == arrays.end()) throw std::invalid_argument(name + " is missing");
    const py::array& array = found->second;
    bool fits = py::isinstance<py::array_t<T, py::array::c_style>>(array) && (array.writeable() || !writeable) &&
                array.ndim() == static_cast<py::ssize_t>(shape.size());
    for (size_t i = 0; fits && i < shape.size(); ++i) fits = array.shape(i) == shape[i];
    if (!fits) throw std::invalid_argument(name + " has the wrong shape, type or layout, or is read-only");
    return static_cast<T*>(const_cast<void*>(array.data()));
}

// A store's columns, and the files to watch with the bytes that they must have.
using Files = std::vector<std::pair<std::string, int64_t>>;
using Store = std::pair<Arrays, Files>;

pwm_fast::Source source_of(const Store& store) {
    const Arrays& columns = store.first;
    const py::array& obs = columns.at("obs");
    const py::array& action = columns.at("action");
    if (obs.ndim() != 2 || action.ndim() != 2) throw std::invalid_argument("obs and action must be [N, S], [N, A]");
    const int64_t N = obs.shape(0), S = obs.shape(1), A = action.shape(1);
    const int64_t episodes = columns.at("episode_start").size() - 1;
    const pwm_fast::Columns from{memory_of<float>(columns, "obs", {N, S}, false),
                                 memory_of<float>(columns, "action", {N, A}, false),
                                 memory_of<float>(columns, "reward", {N}, false),
                                 memory_of<uint8_t>(columns, "terminated", {N}, false),
                                 memory_of<int32_t>(columns, "task", {N}, false),
                                 N,
                                 S,
                                 A};
    std::vector<pwm_fast::StoreFiles::File> watched;
    for (const auto& [path, bytes] : store.second) watched.push_back({path, bytes});
    return {from, memory_of<int64_t>(columns, "episode_start", {episodes + 1}, false), episodes,
            pwm_fast::StoreFiles(std::move(watched))};
}

class BoundScheduler {
public:
    BoundScheduler(std::vector<Store> stores, const Arrays& ring, const pwm_fast::BatchShape& shape, int threads)
        : stores_(std::move(stores)), ring_(ring), shape_(shape) {
        std::vector<pwm_fast::Source> sources;
        for (const Store& store : stores_) sources.push_back(source_of(store));
        core_ = std::make_unique<pwm_fast::RolloutScheduler>(std::move(sources), shape_, slots(ring_), threads);
    }

    // The workers need no lock of Python's, so it can be kept while they end. A forked child has none of them, and
    // may find their mutex locked for ever: there the core is left as it is.
    ~BoundScheduler() {
        if (forked()) static_cast<void>(core_.release());
    }

    // (id, seed, step, end, draw, store) of each
    using Admitted = std::tuple<int64_t, uint64_t, int64_t, int64_t, std::shared_ptr<pwm_fast::Draw>, int64_t>;
    void admit(const std::vector<Admitted>& admitted) {
        std::vector<pwm_fast::Policy> policies;
        for (const auto& [id, seed, step, end, draw, store] : admitted) {
            if (draw == nullptr) throw std::invalid_argument("a policy needs a draw");
            policies.push_back({id, seed, step, end, draw, store});
        }
        without_lock([&] { core_->admit(policies); });
    }
    void retire(int64_t id) {
        without_lock([&] { core_->retire(id); });
    }
    void seek(int64_t step) {
        without_lock([&] { core_->seek(step); });
    }
    void resize(const Arrays& ring, int threads) {
        auto memory = slots(ring);
        without_lock([&] { core_->resize(std::move(memory), threads); });
        ring_ = ring;
    }
    void close() {
        if (!forked()) without_lock([&] { core_->close(); });
    }

    // Also called where Python collects garbage, so it keeps the lock and does not raise in a forked child.
    void release(int64_t slot) {
        if (!forked()) core_->release(slot);
    }

    py::list policies() {
        py::list result;
        require_owner();
        for (const pwm_fast::Policy& p : core_->policies()) result.append(py::make_tuple(p.id, p.seed, p.step, p.end));
        return result;
    }

    double waited() {
        require_owner();
        return std::chrono::duration<double>(core_->waited()).count();
    }

    int64_t ready() {
        require_owner();
        return core_->ready();
    }

    // A batch that is there is taken at once: to let go of Python's lock and get it back costs as much as to look.
    py::tuple acquire() {
        require_owner();
        for (pwm_fast::Acquired got = core_->acquire(std::chrono::nanoseconds{0});;
             without_lock([&] { got = core_->acquire(kPatience); })) {
            switch (got.answer) {
                case Answer::kNotYet:
                    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
                    continue;
                case Answer::kReady: {
                    py::tuple ids(got.rows.size()), steps(got.rows.size());
                    for (size_t p = 0; p < got.rows.size(); ++p) {
                        ids[p] = got.rows[p].id;
                        steps[p] = got.rows[p].step;
                    }
                    return py::make_tuple("ready", got.slot, ids, steps);
                }
                case Answer::kFault:
                    return py::make_tuple("fault", got.fault.source, got.fault.row, got.fault.reason);
                case Answer::kFinished: return py::make_tuple("finished");
                case Answer::kAllHeld: return py::make_tuple("held");
                case Answer::kClosed: return py::make_tuple("closed");
            }
        }
    }

private:
#if defined(_WIN32)
    bool forked() const { return false; }
#else
    bool forked() const { return owner_ != ::getpid(); }
    pid_t owner_ = ::getpid();
#endif

    void require_owner() const {
        if (forked()) throw std::runtime_error("a scheduler does not survive a fork; make it in the child process");
    }

    template <typename Work>
    void without_lock(const Work& work) {
        require_owner();
        py::gil_scoped_release release;
        work();
    }

    // ring: a column each, of all slots: obs [R, P, H+1, B, S], action [R, P, H, B, A], reward, terminated and, of
    // partial windows, valid [R, P, H, B], task [R, P, B].
    std::vector<pwm_fast::SlotMemory> slots(const Arrays& ring) const {
        if (ring.count("obs") == 0 || ring.at("obs").ndim() != 5)
            throw std::invalid_argument("the ring's obs must be [R, P, H+1, B, S]");
        const int64_t R = ring.at("obs").shape(0), P = shape_.capacity, H = shape_.horizon, B = shape_.batch;
        pwm_fast::SlotMemory at;
        at.columns.obs = memory_of<float>(ring, "obs", {R, P, H + 1, B, shape_.obs_dim}, true);
        if (H > 0) {
            at.columns.action = memory_of<float>(ring, "action", {R, P, H, B, shape_.action_dim}, true);
            at.columns.reward = memory_of<float>(ring, "reward", {R, P, H, B}, true);
            at.columns.terminated = memory_of<uint8_t>(ring, "terminated", {R, P, H, B}, true);
            at.columns.task = memory_of<int32_t>(ring, "task", {R, P, B}, true);
            if (shape_.partial)
                at.valid = reinterpret_cast<uint8_t*>(memory_of<bool>(ring, "valid", {R, P, H, B}, true));
        }
        std::vector<pwm_fast::SlotMemory> result;
        for (int64_t r = 0; r < R; ++r) {
            result.push_back(at);
            at.columns.obs += P * (H + 1) * B * shape_.obs_dim;
            if (H == 0) continue;
            at.columns.action += P * H * B * shape_.action_dim;
            at.columns.reward += P * H * B;
            at.columns.terminated += P * H * B;
            at.columns.task += P * B;
            if (shape_.partial) at.valid += P * H * B;
        }
        return result;
    }

    std::vector<Store> stores_;  // these two before core_, which is destroyed first
    Arrays ring_;
    pwm_fast::BatchShape shape_;
    std::unique_ptr<pwm_fast::RolloutScheduler> core_;
};

}  // namespace

void register_scheduler(py::module_& module) {
    py::class_<BoundScheduler>(module, "RolloutScheduler", "See pwm_fast/data/scheduler.py, which is its face.")
        .def(py::init([](std::vector<Store> stores, const Arrays& ring, std::pair<int64_t, int64_t> widths,
                         int64_t capacity, int64_t batch, int64_t horizon, bool partial, int threads) {
                 const pwm_fast::BatchShape shape{widths.first, widths.second, capacity, batch, horizon, partial};
                 return std::make_unique<BoundScheduler>(std::move(stores), ring, shape, threads);
             }),
             py::arg("stores"), py::arg("ring"), py::arg("widths"), py::arg("capacity"), py::arg("batch"),
             py::arg("horizon"), py::arg("partial"), py::arg("threads"))
        .def("admit", &BoundScheduler::admit, py::arg("policies"))
        .def("retire", &BoundScheduler::retire, py::arg("id"))
        .def("seek", &BoundScheduler::seek, py::arg("step"))
        .def("resize", &BoundScheduler::resize, py::arg("ring"), py::arg("threads"))
        .def("acquire", &BoundScheduler::acquire)
        .def("release", &BoundScheduler::release, py::arg("slot"))
        .def("policies", &BoundScheduler::policies)
        .def("waited", &BoundScheduler::waited)
        .def("ready", &BoundScheduler::ready)
        .def("close", &BoundScheduler::close);
}
