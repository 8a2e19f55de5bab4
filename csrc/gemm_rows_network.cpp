// All layers of a finished policy on rows of observations in one call (kernels/row_network.py): products, and behind each
// the row kernel that normalises it, in place. For a single row of a small policy, calls from Python layer by layer took
// several times as long as the layers themselves.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "elementwise.hpp"
#include "gemm_rows.hpp"
#include "huge_pages.hpp"

namespace py = pybind11;

namespace pwm_fast {
namespace {

using RowForward = ElementwiseTable::RowForward ElementwiseTable::*;

// What follows a layer's product; null where nothing does.
RowForward named(const std::string& kernel) {
    if (kernel == "none") return nullptr;
    if (kernel == "layernorm_mish") return &ElementwiseTable::layernorm_mish_forward;
    if (kernel == "layernorm_simnorm") return &ElementwiseTable::layernorm_simnorm_forward;
    if (kernel == "mish_layernorm") return &ElementwiseTable::mish_layernorm_forward;
    throw std::invalid_argument("unknown row kernel '" + kernel + "'");
}

constexpr int64_t kBlockRows = 256;  // what lies between layers stays within 4 MB at 1792 columns, whatever the batch

class RowNetwork {
public:
    // kernel, inputs, outputs, floats between rows of the weight [outputs, inputs], and the addresses of weight, bias, gain
    // and shift [outputs]
    using Description = std::tuple<std::string, int64_t, int64_t, int64_t, Address, Address, Address, Address>;

    RowNetwork(const std::vector<Description>& layers, float eps) : eps_(eps) {
        for (const auto& [kernel, inputs, outputs, row, weight, bias, gain, shift] : layers) {
            layers_.push_back({named(kernel), inputs, outputs, row, at(weight), at(bias), at(gain), at(shift)});
            widest_ = std::max(widest_, outputs);
        }
    }

    // y [rows, outputs of the last layer] of x, the input of layer `first`, whose rows lie `x_row` floats apart.
    void forward(Address x, int64_t x_row, Address y, int64_t rows, size_t first, int threads) const {
        if (first >= layers_.size()) throw std::invalid_argument("there is no layer " + std::to_string(first));
        thread_local Floats memory;
        const int64_t blocks = (rows + kBlockRows - 1) / kBlockRows;  // of nearly equal heights
        for (int64_t block = 0; block < blocks; ++block) {
            const int64_t begin = rows * block / blocks, height = rows * (block + 1) / blocks - begin;
            float* here = memory.at_least(2 * height * (widest_ + 1));
            float* other = here + height * widest_;
            float* const statistics = other + height * widest_;  // nobody asks for them: they are backward's
            Matrix in{at(x) + begin * x_row, x_row, 1};
            for (size_t i = first; i < layers_.size(); ++i, std::swap(here, other)) {
                const Layer& l = layers_[i];
                float* const out = i + 1 < layers_.size() ? here : at(y) + begin * l.outputs;
                multiply_on_threads({height, l.outputs, l.inputs, in, {l.weight, 1, l.row}, false, out, l.outputs,
                                     l.bias, nullptr}, threads);
                if (l.kernel) {
                    forward_rows(l.kernel, out, l.gain, l.shift, out, statistics, statistics + height, height, l.outputs,
                                 eps_, threads);
                }
                in = {out, l.outputs, 1};
            }
        }
    }

    // The same from the first layer, for arrays [..., inputs] of any numbers: what streams through a core's caches leaves
    // nothing else there, so that tensors around one row's 33 MB of weights cost a seventh of its time.
    py::array_t<float> forward_array(const py::array_t<float, py::array::c_style | py::array::forcecast>& x,
                                     int threads) const {
        const Layer &first = layers_.at(0), &last = layers_.back();
        if (x.ndim() < 1 || x.shape(x.ndim() - 1) != first.inputs) {
            const auto found = py::str(x.attr("shape")).cast<std::string>();
            throw std::invalid_argument("arrays must have rows of " + std::to_string(first.inputs) + ", got shape " + found);
        }
        std::vector<py::ssize_t> shape(x.shape(), x.shape() + x.ndim());
        shape.back() = last.outputs;
        py::array_t<float> y(shape);
        const int64_t rows = x.size() / first.inputs;
        const auto in = reinterpret_cast<Address>(x.data()), out = reinterpret_cast<Address>(y.mutable_data());
        const py::gil_scoped_release others_may_run;
        forward(in, first.inputs, out, rows, 0, threads);
        return y;
    }

private:
    struct Layer {
        RowForward kernel;
        int64_t inputs, outputs, row;
        const float *weight, *bias, *gain, *shift;
    };

    static float* at(Address address) { return reinterpret_cast<float*>(address); }

    std::vector<Layer> layers_;
    int64_t widest_ = 0;
    float eps_;
};

float read_at(Address from, int64_t count) { return read_floats(reinterpret_cast<const float*>(from), count); }

void ask_for_huge_pages(Address start, size_t bytes) { advise_huge_pages(reinterpret_cast<void*>(start), bytes); }

}  // namespace
}  // namespace pwm_fast

void register_gemm_rows_network(py::module_& module) {
    using namespace pwm_fast;
    module.def("read_floats", &read_at, "What reading memory takes at least, for benchmarks: address, count.");
    module.def("advise_huge_pages", &ask_for_huge_pages, "Before memory is first written: address, bytes.");
    py::class_<RowNetwork>(module, "RowNetwork", "Layers of constant weights; kernels/row_network.py.")
        .def(py::init<const std::vector<RowNetwork::Description>&, float>())
        .def("forward", &RowNetwork::forward, py::call_guard<py::gil_scoped_release>())
        .def("forward_array", &RowNetwork::forward_array);
}
