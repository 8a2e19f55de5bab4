// All minibatch steps of a population's critics in one call: forward, squared error, backward, clipping, Adam. The
// definition is critic_epoch in kernels/critic_epoch.py; the Python side is kernels/native_critic_epoch.py.
//
// What layer-by-layer calls did again for every minibatch is done once per call: weights, moments and gradients stay in the
// products' order (critic_panels.hpp), and so do the states, forwards and transposed, as long as epochs take the rows in
// one order. Policies are shared out among the threads, or else critics, or else products. Sums are taken in one order.
//
// Parameters, gradients and moments are megabytes: a pass over them would wait for memory while nothing multiplies. So a
// minibatch's Adam step waits for the next minibatch, whose forward products take it for each panel of weights before they
// read that, and ask for the next one meanwhile; and gradients' squares are summed while these are in the cache.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <mutex>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "critic_panels.hpp"
#include "elementwise.hpp"
#include "elementwise_threads.hpp"
#include "gemm.hpp"
#include "huge_pages.hpp"

namespace py = pybind11;

namespace pwm_fast {
namespace {

// States [rows, width] of one minibatch as the two products of the first layer read them.
struct States {
    int64_t rows;
    const float *packed, *packed_transpose, *targets;

    Matrix forward() const { return {packed, 0, 0}; }
    Matrix transposed() const { return {packed_transpose, 0, 0}; }
};

struct HiddenBuffers {
    Floats pre, y, mean, rstd, gradient;
};

// One critic's numbers, in the order of CriticPanels.
struct CriticState {
    float *parameters, *gradients, *m, *v;

    void adam_step(const AdamConstants& constants, int64_t from, int64_t count) const {
        elementwise_table().adam(parameters + from, gradients + from, m + from, v + from, count, constants);
    }
};

// Adam's step of a hidden layer's weights, panel by panel as the forward product comes to them.
class AdamOnPanels final : public PanelWork {
public:
    AdamOnPanels(const CriticState& state, int64_t weight, const AdamConstants& constants)
        : state_(state), weight_(weight), constants_(constants) {
        beside[0] = state.gradients + weight, beside[1] = state.m + weight, beside[2] = state.v + weight;
    }

    void before(int64_t from, int64_t floats) const override { state_.adam_step(constants_, weight_ + from, floats); }

private:
    const CriticState& state_;
    const int64_t weight_;
    const AdamConstants& constants_;
};

// Squares of a hidden layer's gradients, in panels of `width` columns and `inputs` rows.
class GradientSquares final : public PanelWork {
public:
    GradientSquares(const float* gradients, int64_t inputs, int64_t width, std::vector<double>& sums)
        : gradients_(gradients), inputs_(inputs), width_(width), sums_(sums) {}

    void after(int64_t panel, int64_t row, int64_t rows) const override {
        sums_[static_cast<size_t>(panel)] +=
            elementwise_table().sum_of_squares(gradients_ + (panel * inputs_ + row) * width_, rows * width_);
    }

private:
    const float* gradients_;
    const int64_t inputs_, width_;
    std::vector<double>& sums_;  // of each panel: threads have panels of their own
};

// What one critic's gradients need.
struct Workspace {
    Floats value, error, panels, weight;
    std::vector<double> squares;
    std::vector<std::unique_ptr<HiddenBuffers>> hidden;
};

// What one policy's training needs; kept from call to call.
struct Memory {
    Floats numbers, states, packed, packed_transpose, targets;  // numbers: parameters, gradients, m and v
    std::vector<std::unique_ptr<Workspace>> workspaces;  // one for each thread that has a critic of its own
};

struct Arrays {
    float *flat, *m, *v;
    const float *x, *targets;
    int64_t x_row, x_policy;
    const int64_t* orders;  // [policies, epochs, rows]
    const float* lr;
    int64_t* steps;
    bool* active;
    float *loss, *norm;
};

class CriticEpoch {
public:
    // `size` floats lie between the parameters of neighbouring networks; every policy has `critics` neighbours.
    CriticEpoch(std::vector<std::vector<int64_t>> layers, int64_t policies, int64_t critics, int64_t size, int64_t rows,
                int64_t epochs, int64_t minibatches, double max_norm, double beta1, double beta2, double eps,
                float norm_eps)
        : policies_(policies), critics_(critics), size_(size), rows_(rows), epochs_(epochs), minibatches_(minibatches),
          max_norm_(max_norm), beta1_(beta1), beta2_(beta2), eps_(eps), norm_eps_(norm_eps) {
        for (const auto& l : layers) layers_.push_back({l.at(0), l.at(1), l.at(2), l.at(3), l.at(4), l.at(5)});
        if (layers_.size() < 2 || layers_.back().outputs != 1) {
            throw std::invalid_argument("critics need a hidden layer at least and one output");
        }
    }

    void run(Address flat, Address m, Address v, Address x, int64_t x_row, int64_t x_policy, Address targets,
             Address orders, Address lr, Address steps, Address active, Address loss, Address norm, int threads) {
        const std::lock_guard<std::mutex> only_one(busy_);
        const auto* order = at<const int64_t>(orders);
        const auto [first, last] = std::minmax_element(order, order + policies_ * epochs_ * rows_);
        if (*first < 0 || *last >= rows_) {
            throw std::invalid_argument("order must name rows 0 to " + std::to_string(rows_ - 1) + ", got " +
                                        std::to_string(*first) + " to " + std::to_string(*last));
        }
        const Arrays arrays{at(flat), at(m), at(v), at(x), at(targets), x_row, x_policy, at<int64_t>(orders), at(lr),
                            at<int64_t>(steps), at<bool>(active), at(loss), at(norm)};
        const CriticPanels panels(layers_, plain_panels_table());
        const bool shared_out = threads > 1 && policies_ >= 2 * threads;
        while (memories_.size() < static_cast<size_t>(shared_out ? threads : 1)) {
            memories_.push_back(std::make_unique<Memory>());
        }
        if (shared_out) {
            WorkerPool::instance().run(policies_, threads, [&](int64_t policy, int slot) {
                Trainer(*this, panels, *memories_[static_cast<size_t>(slot)], 1).train(arrays, policy);
            });
        } else {
            for (int64_t policy = 0; policy < policies_; ++policy) {
                Trainer(*this, panels, *memories_[0], threads).train(arrays, policy);
            }
        }
    }

private:
    // One critic's gradients on a minibatch.
    class CriticGradient {
    public:
        CriticGradient(const CriticEpoch& plan, const CriticPanels& panels, Workspace& memory, int threads, bool tf32)
            : plan_(plan), panels_(panels), memory_(memory), table_(gemm_table()), plain_(plain_panels_table()),
              threads_(threads), tf32_(tf32) {}

        struct Squares {
            double errors, gradients;
        };

        // Takes one critic's Adam step where one waits, and overwrites its gradients with those of the mean squared
        // error over critics and rows; the sums of both squares.
        Squares differentiate(const States& states, const CriticState& state, const std::optional<AdamConstants>& waiting) {
            const size_t depth = plan_.layers_.size() - 1;
            const int64_t rows = states.rows;
            const float* const parameters = state.parameters;
            if (waiting) {
                for (size_t i = 0; i <= depth; ++i) state.adam_step(*waiting, panels_.vectors(i), panels_.vectors_floats(i));
            }
            for (size_t i = 0; i < depth; ++i) {
                const CriticLayer& l = plan_.layers_[i];
                const CriticPanels::Places& p = panels_[i];
                HiddenBuffers& b = *memory_.hidden[i];
                float* const pre = b.pre.at_least(rows * l.outputs);
                float* const y = b.y.at_least(rows * l.outputs);
                Product product{rows, l.outputs, l.inputs, i ? kept(i - 1) : states.forward(), {parameters + p.weight, 0, 0},
                                true, pre, l.outputs, parameters + p.bias, nullptr};
                product.a_packed = i == 0;
                product.plain_panels = true, product.tf32 = tf32_;  // as the states were packed
                std::optional<AdamOnPanels> adam;
                if (waiting) product.work = &adam.emplace(state, p.weight, *waiting);
                multiply_on_threads(product, threads_);
                mish_layernorm_forward(pre, parameters + p.gain, parameters + p.shift, y, b.mean.at_least(rows),
                                       b.rstd.at_least(rows), rows, l.outputs, plan_.norm_eps_, threads_);
            }
            Squares squares{value_gradients(states, parameters, state.gradients), 0.0};
            for (size_t i = depth; i-- > 0;) squares.gradients += hidden_gradients(i, states, parameters, state.gradients);
            for (size_t i = 0; i <= depth; ++i) {
                const float* const vectors = state.gradients + panels_.vectors(i);
                squares.gradients += elementwise_table().sum_of_squares(vectors, panels_.vectors_floats(i));
            }
            return squares;
        }

    private:
        // Output [rows, outputs] of a hidden layer.
        Matrix kept(size_t layer) const {
            return {memory_.hidden[layer]->y.at_least(0), plan_.layers_[layer].outputs, 1};
        }

        // Values, their errors, the last layer's gradients and that at its input; the sum of squared errors.
        double value_gradients(const States& states, const float* parameters, float* gradients) {
            const size_t last = plan_.layers_.size() - 1;
            const CriticPanels::Places& p = panels_[last];
            const int64_t rows = states.rows, inputs = plan_.layers_[last].inputs;
            const float* const weight = parameters + p.weight;
            const Matrix y = kept(last - 1);
            float* const value = memory_.value.at_least(rows);
            multiply_on_threads({rows, 1, inputs, y, {weight, 1, 1}, false, value, 1, parameters + p.bias, nullptr}, threads_);
            float* const error = memory_.error.at_least(rows);
            const float scale = 2.0f / static_cast<float>(plan_.critics_ * rows);
            double squares = 0.0;
            for (int64_t i = 0; i < rows; ++i) {
                const float difference = value[i] - states.targets[i];
                squares += static_cast<double>(difference) * static_cast<double>(difference);
                error[i] = difference * scale;
            }
            multiply_on_threads({1, inputs, rows, {error, rows, 1}, y, false, gradients + p.weight, inputs, nullptr,
                                 gradients + p.bias}, threads_);
            float* const below = memory_.hidden[last - 1]->gradient.at_least(rows * inputs);
            for (int64_t i = 0; i < rows; ++i) {
                for (int64_t j = 0; j < inputs; ++j) below[i * inputs + j] = error[i] * weight[j];
            }
            return squares;
        }

        // From the gradient at a hidden layer's output: its parameters' gradients, and that at the output below; the
        // squares of the weights' gradients.
        double hidden_gradients(size_t i, const States& states, const float* parameters, float* gradients) {
            const CriticLayer& l = plan_.layers_[i];
            const CriticPanels::Places& p = panels_[i];
            HiddenBuffers& b = *memory_.hidden[i];
            const int64_t rows = states.rows, width = plain_.panel;
            float* const d = b.gradient.at_least(0);
            mish_layernorm_backward(d, b.pre.at_least(0), b.mean.at_least(0), b.rstd.at_least(0), parameters + p.gain, d,
                                    gradients + p.gain, gradients + p.shift, rows, l.outputs, threads_);
            column_sums(d, gradients + p.bias, rows, l.outputs);
            const Matrix in = i ? Matrix{kept(i - 1).data, 1, l.inputs} : states.transposed();
            Product product{l.inputs, l.outputs, rows, in, {d, l.outputs, 1}, false, gradients + p.weight, width, nullptr, nullptr};
            product.a_packed = i == 0;
            if (&table_ == &plain_) {
                float* const panels = memory_.panels.at_least(panels_.panels(l.outputs) * width * rows);
                table_.pack(product.b, rows, l.outputs, panels);
                product.b.data = panels, product.packed = true;
            }
            product.c_panel = panels_.panel_floats(l), product.tf32 = tf32_;
            memory_.squares.assign(static_cast<size_t>(panels_.panels(l.outputs)), 0.0);
            const GradientSquares work(product.c, l.inputs, width, memory_.squares);
            product.work = &work;
            multiply_on_threads(product, threads_);
            const double squares = std::accumulate(memory_.squares.begin(), memory_.squares.end(), 0.0);
            if (i == 0) return squares;
            float* const below = memory_.hidden[i - 1]->gradient.at_least(rows * l.inputs);
            Product down{rows, l.inputs, l.outputs, {d, l.outputs, 1}, {parameters + p.weight, 0, 0}, true, below, l.inputs,
                         nullptr, nullptr};
            down.plain_panels = true, down.turned = &table_ != &plain_;
            if (!down.turned) {
                float* const weight = memory_.weight.at_least(panels_.panels(l.inputs) * width * l.outputs);
                panels_.transpose(parameters + p.weight, l, weight);
                down.b.data = weight;
            }
            multiply_on_threads(down, threads_);
            return squares;
        }

        const CriticEpoch& plan_;
        const CriticPanels& panels_;
        Workspace& memory_;
        const GemmTable& table_;
        const GemmTable& plain_;  // whose panels hold parameters and gradients
        const int threads_;
        const bool tf32_;
    };

    // One policy's critics through all epochs.
    class Trainer {
    public:
        Trainer(const CriticEpoch& plan, const CriticPanels& panels, Memory& memory, int threads)
            : plan_(plan), panels_(panels), memory_(memory), table_(gemm_table()), threads_(threads) {
            while (memory_.workspaces.size() < static_cast<size_t>(std::min<int64_t>(threads, plan.critics_))) {
                memory_.workspaces.push_back(std::make_unique<Workspace>());
                auto& hidden = memory_.workspaces.back()->hidden;
                while (hidden.size() < plan.layers_.size()) hidden.push_back(std::make_unique<HiddenBuffers>());
            }
        }

        void train(const Arrays& a, int64_t policy) {
            const int64_t row = policy * plan_.critics_ * plan_.size_, count = plan_.critics_ * panels_.size();
            // Arrays that Adam reads side by side do not begin at one place of a page: 2% of an update on Zen 3.
            const int64_t apart = (count + 1023) / 1024 * 1024 + 17 * 16;
            float* const parameters = memory_.numbers.at_least(4 * apart);
            float* const gradients = parameters + apart;
            float* const m = gradients + apart;
            float* const v = m + apart;
            for (int64_t k = 0; k < plan_.critics_; ++k) {
                const int64_t from = row + k * plan_.size_, to = k * panels_.size();
                panels_.load(a.flat + from, parameters + to);
                panels_.load(a.m + from, m + to);
                panels_.load(a.v + from, v + to);
            }
            std::fill_n(gradients, count, 0.0f);  // padding, which another instruction set may have used
            std::vector<CriticState> critics;
            for (int64_t k = 0; k < plan_.critics_; ++k) {
                const int64_t at = k * panels_.size();
                critics.push_back({parameters + at, gradients + at, m + at, v + at});
            }
            std::optional<AdamConstants> waiting;
            std::vector<States> minibatches;
            double total = 0.0;
            for (int64_t epoch = 0; epoch < plan_.epochs_; ++epoch) {
                const int64_t* const order = a.orders + (policy * plan_.epochs_ + epoch) * plan_.rows_;
                if (epoch == 0 || !std::equal(order, order + plan_.rows_, order - plan_.rows_)) {
                    minibatches = gather(a.x + policy * a.x_policy, a.x_row, a.targets + policy * plan_.rows_, order);
                }
                for (const States& states : minibatches) {
                    const auto squares = differentiate_all(states, critics, waiting);
                    total += squares.errors / static_cast<double>(plan_.critics_ * states.rows);
                    waiting = start_adam(squares.gradients, plan_.max_norm_, plan_.beta1_, plan_.beta2_, plan_.eps_,
                                         a.lr[policy], a.active[policy], a.steps[policy], a.norm[policy]);
                    a.active[policy] = waiting.has_value();
                }
            }
            if (waiting) {
                WorkerPool::instance().run(plan_.critics_, threads_, [&](int64_t k, int) {
                    critics[static_cast<size_t>(k)].adam_step(*waiting, 0, panels_.size());
                });
            }
            a.loss[policy] = static_cast<float>(total / static_cast<double>(plan_.epochs_ * plan_.minibatches_));
            for (int64_t k = 0; k < plan_.critics_; ++k) {
                const int64_t to = row + k * plan_.size_, from = k * panels_.size();
                panels_.store(parameters + from, a.flat + to);
                panels_.store(m + from, a.m + to);
                panels_.store(v + from, a.v + to);
            }
        }

    private:
        // The rows of every minibatch, as torch.tensor_split has them: the first ones take what is left over.
        std::vector<States> gather(const float* x, int64_t x_row, const float* targets, const int64_t* order) {
            const int64_t width = plan_.layers_[0].inputs, rows = plan_.rows_, parts = plan_.minibatches_;
            float* const states = memory_.states.at_least(rows * width);
            float* const chosen = memory_.targets.at_least(rows);
            for (int64_t i = 0; i < rows; ++i) {
                std::copy_n(x + order[i] * x_row, width, states + i * width);
                chosen[i] = targets[order[i]];
            }
            const int64_t longest = rows / parts + 1;
            const int64_t floats = table_.packed_rows_floats(longest, width, tf32_);
            const int64_t floats_transposed = table_.packed_rows_floats(width, longest, tf32_);
            float* const packed = memory_.packed.at_least(parts * floats);
            float* const packed_transpose = memory_.packed_transpose.at_least(parts * floats_transposed);
            std::vector<States> minibatches;
            for (int64_t part = 0, first = 0; part < parts; ++part) {
                const int64_t count = rows / parts + (part < rows % parts);
                const float* const plain = states + first * width;
                float* const forward = packed + part * floats;
                float* const transposed = packed_transpose + part * floats_transposed;
                table_.pack_rows({plain, width, 1}, count, width, tf32_, forward);
                table_.pack_rows({plain, 1, width}, width, count, tf32_, transposed);
                minibatches.push_back({count, forward, transposed, chosen + first});
                first += count;
            }
            return minibatches;
        }

        // CriticGradient::differentiate() of all critics, its sums over them. Threads take a critic each as long as there
        // are enough, and share the products of those that are left, or of all where there are twice as many threads.
        CriticGradient::Squares differentiate_all(const States& states, const std::vector<CriticState>& critics,
                                                  const std::optional<AdamConstants>& waiting) {
            std::vector<CriticGradient::Squares> squares(critics.size());
            const auto differentiate = [&](int64_t k, int64_t slot, int threads) {
                CriticGradient one(plan_, panels_, *memory_.workspaces[static_cast<size_t>(slot)], threads, tf32_);
                squares[static_cast<size_t>(k)] = one.differentiate(states, critics[static_cast<size_t>(k)], waiting);
            };
            const int64_t left = threads_ < plan_.critics_ ? plan_.critics_ % threads_ : 0;
            const int64_t apart = threads_ < 2 * plan_.critics_ ? plan_.critics_ - left : 0;
            WorkerPool::instance().run(apart, threads_, [&](int64_t k, int slot) { differentiate(k, slot, 1); });
            for (int64_t k = apart; k < plan_.critics_; ++k) differentiate(k, 0, threads_);
            CriticGradient::Squares total{0.0, 0.0};
            for (const auto& one : squares) total.errors += one.errors, total.gradients += one.gradients;
            return total;
        }

        const CriticEpoch& plan_;
        const CriticPanels& panels_;
        Memory& memory_;
        const GemmTable& table_;
        const int threads_;
        const bool tf32_ = tf32_allowed();
    };

    std::vector<CriticLayer> layers_;
    const int64_t policies_, critics_, size_, rows_, epochs_, minibatches_;
    const double max_norm_, beta1_, beta2_, eps_;
    const float norm_eps_;
    std::mutex busy_;
    std::vector<std::unique_ptr<Memory>> memories_;  // one for each policy that is trained at the same time
};

}  // namespace
}  // namespace pwm_fast

void register_critic_epoch(py::module_& module) {
    using namespace pwm_fast;
    py::class_<CriticEpoch>(module, "CriticEpoch", "All of a step's updates of the critics; kernels/native_critic_epoch.py.")
        .def(py::init<std::vector<std::vector<int64_t>>, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, double,
                      double, double, double, float>())
        .def("run", &CriticEpoch::run, py::call_guard<py::gil_scoped_release>());
}
