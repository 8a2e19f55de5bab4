// All layers of a population's networks (pwm_fast/models/population_mlp.py) in one call: (Linear -> Mish -> LayerNorm) x
// hidden, Linear. One network after the other, so that what a layer wrote is still in the second-level cache for the
// next, and no time goes into calls between layers (a tenth of an extraction step at 5M when each is Python's).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "elementwise.hpp"
#include "elementwise_threads.hpp"
#include "gemm.hpp"

namespace py = pybind11;

namespace pwm_fast {
namespace {

// One layer's widths and the places of its parameters in a network's row, in floats; gain and shift of hidden layers.
struct Layer {
    int64_t inputs, outputs, weight, bias, gain, shift;
};

// The first layer's input x is shared: network g reads member g / share, whose rows lie `x_row` floats apart.
class Mlp {
public:
    // `size` floats lie between the rows of neighbouring networks.
    Mlp(std::vector<std::vector<int64_t>> layers, int64_t groups, int64_t size, float eps)
        : groups_(groups), size_(size), eps_(eps) {
        for (const auto& l : layers) layers_.push_back({l.at(0), l.at(1), l.at(2), l.at(3), l.at(4), l.at(5)});
        if (layers_.empty()) throw std::invalid_argument("a network needs at least one layer, got none");
    }

    // y [G, rows, outputs]; per hidden layer pre, y, mean and rstd.
    void forward(Address parameters, Address x, int64_t x_row, int64_t x_member, int64_t share,
                 const std::vector<Address>& places, Address y, int64_t rows, int threads) const {
        expect(places.size(), 4);
        over_groups(rows, threads, [&](int64_t g, int inner) {
            const float* const p = at(parameters) + g * size_;
            Matrix in{at(x) + g / share * x_member, x_row, 1};
            for (size_t i = 0; i < layers_.size(); ++i) {
                const Layer& l = layers_[i];
                const bool hidden = i + 1 < layers_.size();
                const auto place = [&](size_t which, int64_t width) { return at(places[4 * i + which]) + g * rows * width; };
                float* const pre = hidden ? place(0, l.outputs) : at(y) + g * rows * l.outputs;
                multiply_on_threads({rows, l.outputs, l.inputs, in, {p + l.weight, 1, l.inputs}, false, pre, l.outputs, p + l.bias,
                          nullptr}, inner);
                if (!hidden) return;
                mish_layernorm_forward(pre, p + l.gain, p + l.shift, place(1, l.outputs), place(2, 1), place(3, 1), rows,
                                       l.outputs, eps_, inner);
                in = {place(1, l.outputs), l.outputs, 1};
            }
        });
    }

    // Overwrites the gradients of all parameters with those of sum(dy * y). Per hidden layer pre, y, mean, rstd and a
    // place for the gradient at y, which is overwritten.
    void backward(Address parameters, Address gradients, Address dy, Address x, int64_t x_row, int64_t x_member,
                  int64_t share, const std::vector<Address>& places, int64_t rows, int threads) const {
        expect(places.size(), 5);
        over_groups(rows, threads, [&](int64_t g, int inner) {
            const float* const p = at(parameters) + g * size_;
            float* const d = at(gradients) + g * size_;
            const float* dout = at(dy) + g * rows * layers_.back().outputs;
            for (size_t i = layers_.size(); i-- > 0;) {
                const Layer& l = layers_[i];
                const auto place = [&](size_t layer, size_t which, int64_t width) {
                    return at(places[5 * layer + which]) + g * rows * width;
                };
                if (i + 1 < layers_.size()) {
                    float* const here = place(i, 4, l.outputs);
                    mish_layernorm_backward(here, place(i, 0, l.outputs), place(i, 2, 1), place(i, 3, 1), p + l.gain, here,
                                            d + l.gain, d + l.shift, rows, l.outputs, inner);
                    dout = here;
                }
                const Matrix in = i ? Matrix{place(i - 1, 1, l.inputs), l.inputs, 1}
                                    : Matrix{at(x) + g / share * x_member, x_row, 1};
                multiply_on_threads({l.outputs, l.inputs, rows, {dout, 1, l.outputs}, in, false, d + l.weight, l.inputs, nullptr,
                          d + l.bias}, inner);
                if (i) {
                    multiply_on_threads({rows, l.inputs, l.outputs, {dout, l.outputs, 1}, {p + l.weight, l.inputs, 1}, false,
                              place(i - 1, 4, l.inputs), l.inputs, nullptr, nullptr}, inner);
                }
            }
        });
    }

private:
    static float* at(Address address) { return reinterpret_cast<float*>(address); }

    void expect(size_t count, size_t per_layer) const {
        if (count != per_layer * (layers_.size() - 1)) throw std::invalid_argument("one place per kept array is needed");
    }

    // Many networks are shared out among the threads, few are worked on by all of them one after the other.
    template <typename Work>
    void over_groups(int64_t rows, int threads, const Work& work) const {
        if (rows < 1) return;
        if (threads > 1 && groups_ >= 2 * threads) {
            WorkerPool::instance().run(groups_, threads, [&](int64_t g, int) { work(g, 1); });
        } else {
            for (int64_t g = 0; g < groups_; ++g) work(g, threads);
        }
    }

    std::vector<Layer> layers_;
    int64_t groups_, size_;
    float eps_;
};

}  // namespace
}  // namespace pwm_fast

void register_gemm_mlp(py::module_& module) {
    using namespace pwm_fast;
    py::class_<Mlp>(module, "Mlp", "Networks whose parameters are rows of one array; kernels/mlp.py.")
        .def(py::init<std::vector<std::vector<int64_t>>, int64_t, int64_t, float>())
        .def("forward", &Mlp::forward, py::call_guard<py::gil_scoped_release>())
        .def("backward", &Mlp::backward, py::call_guard<py::gil_scoped_release>());
}
