// H imagined steps a = tanh(mu(z) + sigma eps), z' = F(z, a) of a population in one call, and their gradient in one. The
// definition is dynamics_rollout in kernels/dynamics_rollout.py; the Python side is kernels/native_dynamics_rollout.py.
//
// A row's steps need no other row's, so spans of rows go through all steps one after the other: what a layer wrote is
// still in the cache for the next, and threads that have spans of their own never wait for one another. Where there are
// too few rows for that, all threads share every product. A row's numbers do not depend on its span.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

#include "elementwise.hpp"
#include "elementwise_threads.hpp"
#include "gemm.hpp"
#include "huge_pages.hpp"
#include "rollout_actors.hpp"
#include "rollout_spans.hpp"

namespace py = pybind11;

namespace pwm_fast {
namespace {

// A layer of the dynamics: W^T and W as products read them, the bias with the distance between policies' (0: shared), and
// the affine part of the norm, null in a last layer without one.
struct DynamicsLayer {
    int64_t inputs, outputs;
    const float *weight, *transpose, *bias;
    int64_t bias_stride;
    const float *gain, *shift;
    bool bf16;  // weight and transpose are packed in bfloat16
};

// The population's arrays, in the layouts of `Recurrence` (pwm_fast/learning/imagination.py).
struct Arrays {
    float *inputs, *latents, *actions;  // [H + 1, P, B, Z + A], [P, H + 1, B, Z], [P, H, B, A]
    std::vector<ActorRows> actor;
};

struct SpanMemory {
    Floats one, other, dz;
};

struct LayerMemory {
    Floats pre, mean, rstd;  // rows [H, P, B]
};

class DynamicsRollout {
public:
    // `actor`: inputs, outputs and places of every layer; `widths`: of the dynamics, from Z + A to Z.
    DynamicsRollout(const std::vector<std::vector<int64_t>>& actor, int64_t size, int64_t log_std,
                    std::vector<int64_t> widths, int64_t policies, int64_t horizon, int64_t batch, bool residual, float eps)
        : actors_(layers_of(actor), policies, size), widths_(std::move(widths)), policies_(policies), horizon_(horizon),
          batch_(batch), size_(size), log_std_(log_std), residual_(residual), eps_(eps) {
        latent_ = actors_.layers().front().inputs;
        action_ = actors_.layers().back().outputs;
        if (widths_.size() < 3 || widths_.front() != latent_ + action_ || widths_.back() != latent_) {
            throw std::invalid_argument("dynamics must lead from " + std::to_string(latent_ + action_) + " columns over " +
                                        "a hidden layer at least to " + std::to_string(latent_));
        }
        widest_ = std::max(actors_.widest(), *std::max_element(widths_.begin(), widths_.end()));
        for (size_t i = 0; i + 1 < widths_.size(); ++i) {
            weights_ += widths_[i] * widths_[i + 1];
            kept_.push_back(std::make_unique<LayerMemory>());
        }
    }

    // Fills `inputs`, `latents`, `actions` and what the actors keep from z [P, B, Z] with noise [P, H, B, A].
    void forward(Address parameters, const std::vector<std::vector<Address>>& dynamics, int64_t panel_row, Address z,
                 Address noise, const std::vector<Address>& places, int threads) {
        const std::lock_guard<std::mutex> only_one(busy_);
        take(dynamics, panel_row, places);
        const float* const p = at(parameters);
        actors_.pack(p, true, threads);
        std::vector<float> std(static_cast<size_t>(policies_ * action_));
        for (int64_t i = 0; i < policies_ * action_; ++i) {
            std[static_cast<size_t>(i)] = std::exp(p[i / action_ * size_ + log_std_ + i % action_]);
        }
        for (size_t i = 0; i < kept_.size(); ++i) {
            const int64_t rows = horizon_ * policies_ * batch_;
            kept_[i]->pre.at_least(rows * widths_[i + 1]), kept_[i]->mean.at_least(rows), kept_[i]->rstd.at_least(rows);
        }
        over_spans(threads, [&](const Span& span, SpanMemory& memory, int inner) {
            imagine(span, memory, at(z), at(noise), std.data(), inner);
        });
        imagined_ = true;
    }

    // d_action [P, H, B, A] of the last forward(), from the gradients d_inputs [H, P, B, Z + A] and d_last [P, B, Z]. The
    // actors' mask [P, A] may be null. With `detach` the actors see z as a constant.
    void backward(Address parameters, const std::vector<std::vector<Address>>& dynamics, int64_t panel_row, Address d_inputs,
                  Address d_last, Address mask, Address d_action, const std::vector<Address>& places, bool detach,
                  int threads) {
        const std::lock_guard<std::mutex> only_one(busy_);
        if (!imagined_) throw std::runtime_error("a rollout's backward pass needs its forward pass first");
        take(dynamics, panel_row, places);
        if (!detach) actors_.pack(at(parameters), false, threads);
        over_spans(threads, [&](const Span& span, SpanMemory& memory, int inner) {
            differentiate(span, memory, at(d_inputs), at(d_last), at(mask), at(d_action), detach, inner);
        });
    }

private:
    static std::vector<ActorLayer> layers_of(const std::vector<std::vector<int64_t>>& rows) {
        std::vector<ActorLayer> layers;
        for (const auto& l : rows) layers.push_back({l.at(0), l.at(1), l.at(2), l.at(3), l.at(4), l.at(5)});
        if (layers.size() < 2) throw std::invalid_argument("actors need a hidden layer at least");
        return layers;
    }

    void take(const std::vector<std::vector<Address>>& dynamics, int64_t panel_row, const std::vector<Address>& places) {
        const int64_t read = gemm_table().panel_row;
        if (panel_row != read) {
            throw std::invalid_argument("the dynamics were packed in panels of " + std::to_string(panel_row) + " floats a row, " +
                                        std::to_string(read) + " are read now: pack them again after set_isa");
        }
        const size_t hidden = actors_.layers().size() - 1;
        if (dynamics.size() + 1 != widths_.size() || places.size() != 3 + 4 * hidden) {
            throw std::invalid_argument("one entry per layer of the dynamics and one place per kept array are needed");
        }
        layers_.clear();
        for (size_t i = 0; i < dynamics.size(); ++i) {
            const auto& l = dynamics[i];
            layers_.push_back({widths_[i], widths_[i + 1], at(l.at(0)), at(l.at(1)), at(l.at(2)),
                               static_cast<int64_t>(l.at(3)), at(l.at(4)), at(l.at(5)), l.at(6) != 0});
        }
        arrays_ = {at(places[0]), at(places[1]), at(places[2]), {}};
        for (size_t i = 0; i < hidden; ++i) {
            const Address* const p = places.data() + 3 + 4 * i;
            arrays_.actor.push_back({at(p[0]), at(p[1]), at(p[2]), at(p[3])});
        }
    }

    // Calls work(span, memory, threads within it) for all rows of all policies.
    template <typename Work>
    void over_spans(int threads, const Work& work) {
        const RolloutSpans plan(policies_, batch_, weights_, threads);
        while (static_cast<int>(memories_.size()) < plan.at_once) memories_.push_back(std::make_unique<SpanMemory>());
        WorkerPool::instance().run(static_cast<int64_t>(plan.spans.size()), plan.at_once, [&](int64_t i, int slot) {
            work(plan.spans[static_cast<size_t>(i)], *memories_[static_cast<size_t>(slot)], plan.within);
        });
    }

    // Number of a span's first row in arrays [H, P, B], and of one policy's rows in arrays [P, H, B] and [P, H + 1, B].
    int64_t by_step(const Span& s, int64_t h) const { return (h * policies_ + s.policy) * batch_ + s.row; }
    int64_t by_policy(const Span& s, int64_t policy, int64_t h) const {
        return (policy * horizon_ + h) * batch_ + s.row;
    }
    float* latents(const Span& s, int64_t policy, int64_t h) const {
        return arrays_.latents + ((policy * (horizon_ + 1) + h) * batch_ + s.row) * latent_;
    }

    // Calls body(policy, its first row among the span's).
    template <typename Body>
    static void over_policies(const Span& s, const Body& body) {
        for (int64_t i = 0; i < s.policies; ++i) body(s.policy + i, i * s.rows);
    }

    void imagine(const Span& s, SpanMemory& memory, const float* z, const float* noise, const float* std,
                 int threads) const {
        over_policies(s, [&](int64_t policy, int64_t) {
            std::copy_n(z + (policy * batch_ + s.row) * latent_, s.rows * latent_, latents(s, policy, 0));
        });
        join_latents(s, 0);
        float* const y = memory.one.at_least(s.all() * widest_);
        float* const mu = memory.other.at_least(s.all() * widest_);
        for (int64_t h = 0; h < horizon_; ++h) {
            over_policies(s, [&](int64_t policy, int64_t) {
                const int64_t first = by_policy(s, policy, h);
                actors_.forward(policy, latents(s, policy, h), arrays_.actor, first, s.rows, mu, eps_, threads);
                act(s, policy, h, mu, noise + first * action_, std + policy * action_);
            });
            step(s, h, y, mu, threads);
            join_latents(s, h + 1);
        }
    }

    // z_h beside the actions, as the networks read them.
    void join_latents(const Span& s, int64_t h) const {
        const int64_t width = widths_[0];
        over_policies(s, [&](int64_t policy, int64_t first) {
            const float* const z = latents(s, policy, h);
            float* const inputs = arrays_.inputs + (by_step(s, h) + first) * width;
            for (int64_t i = 0; i < s.rows; ++i) std::copy_n(z + i * latent_, latent_, inputs + i * width);
        });
    }

    void act(const Span& s, int64_t policy, int64_t h, const float* mu, const float* noise, const float* std) const {
        const int64_t width = widths_[0];
        float* const inputs = arrays_.inputs + ((h * policies_ + policy) * batch_ + s.row) * width + latent_;
        float* const actions = arrays_.actions + by_policy(s, policy, h) * action_;
        for (int64_t i = 0; i < s.rows; ++i) {
            for (int64_t j = 0; j < action_; ++j) {
                const int64_t k = i * action_ + j;
                inputs[i * width + j] = actions[k] = std::tanh(mu[k] + std[j] * noise[k]);
            }
        }
    }

    // z_{h+1} from what `inputs` holds of step h; y and change are memory for [rows, widest].
    void step(const Span& s, int64_t h, float* y, float* change, int threads) const {
        const int64_t first = by_step(s, h), rows = s.all();
        Matrix in{arrays_.inputs + first * widths_[0], widths_[0], 1};
        for (size_t i = 0; i < layers_.size(); ++i) {
            const DynamicsLayer& l = layers_[i];
            float* const mean = kept_[i]->mean.at_least(0) + first;
            float* const rstd = kept_[i]->rstd.at_least(0) + first;
            const bool last = i + 1 == layers_.size();
            float* const pre = last && residual_ ? change : kept_[i]->pre.at_least(0) + first * l.outputs;
            multiply_on_threads({rows, l.outputs, l.inputs, in, {l.weight, 0, 0}, true, pre, l.outputs,
                                 l.bias_stride ? nullptr : l.bias, nullptr, false, 0, l.bf16}, threads);
            if (l.bias_stride) add_biases(s, l, pre);
            if (!last) {
                forward_rows(&ElementwiseTable::layernorm_mish_forward, pre, l.gain, l.shift, y, mean, rstd, rows,
                             l.outputs, eps_, threads);
                in = {y, l.outputs, 1};
                continue;
            }
            over_policies(s, [&](int64_t policy, int64_t begin) {
                const float* const from = pre + begin * latent_;
                float* const next = latents(s, policy, h + 1);
                if (residual_) {
                    const float* const z = latents(s, policy, h);
                    for (int64_t k = 0; k < s.rows * latent_; ++k) next[k] = z[k] + from[k];
                } else {
                    forward_rows(&ElementwiseTable::layernorm_simnorm_forward, from, l.gain, l.shift, next, mean + begin,
                                 rstd + begin, s.rows, latent_, eps_, threads);
                }
            });
        }
    }

    static void add_biases(const Span& s, const DynamicsLayer& l, float* pre) {
        over_policies(s, [&](int64_t policy, int64_t begin) {
            const float* const bias = l.bias + policy * l.bias_stride;
            for (int64_t i = begin; i < begin + s.rows; ++i) {
                for (int64_t j = 0; j < l.outputs; ++j) pre[i * l.outputs + j] += bias[j];
            }
        });
    }

    void differentiate(const Span& s, SpanMemory& memory, const float* d_inputs, const float* d_last, const float* mask,
                       float* d_action, bool detach, int threads) const {
        const int64_t rows = s.all();
        float* const one = memory.one.at_least(rows * widest_);
        float* const other = memory.other.at_least(rows * widest_);
        float* const dz = memory.dz.at_least(rows * latent_);
        std::copy_n(d_last + (s.policy * batch_ + s.row) * latent_, rows * latent_, dz);
        for (int64_t h = horizon_; h-- > 0;) {
            const float* const d = dynamics_gradient(s, h, dz, one, other, threads);
            share_out(s, h, d, d_inputs + by_step(s, h) * widths_[0], dz, d_action);
            if (detach) continue;
            over_policies(s, [&](int64_t policy, int64_t begin) {
                const int64_t first = by_policy(s, policy, h);
                const float* const action = arrays_.actions + first * action_;
                const float* const d_here = d_action + first * action_;
                for (int64_t k = 0; k < s.rows * action_; ++k) {
                    one[k] = d_here[k] * (1.0f - action[k] * action[k]);
                    if (mask) one[k] *= mask[policy * action_ + k % action_];
                }
                const float* const more = actors_.input_gradient(policy, arrays_.actor, first, s.rows, one, other, threads);
                float* const mine = dz + begin * latent_;
                for (int64_t k = 0; k < s.rows * latent_; ++k) mine[k] += more[k];
            });
        }
    }

    // The gradient [rows, Z + A] at the inputs of step h, in `one` or `other`, given that at the dynamics' output.
    const float* dynamics_gradient(const Span& s, int64_t h, const float* dz, float* one, float* other,
                                   int threads) const {
        const int64_t first = by_step(s, h), rows = s.all();
        const float* d = dz;
        for (size_t i = layers_.size(); i-- > 0;) {
            const DynamicsLayer& l = layers_[i];
            const float* const mean = kept_[i]->mean.at_least(0) + first;
            const float* const rstd = kept_[i]->rstd.at_least(0) + first;
            const float* const pre = kept_[i]->pre.at_least(0) + first * l.outputs;
            if (i + 1 < layers_.size()) {
                layernorm_mish_backward(d, pre, mean, rstd, l.gain, l.shift, one, rows, l.outputs, threads);
                d = one;
            } else if (!residual_) {
                over_policies(s, [&](int64_t policy, int64_t begin) {
                    const int64_t k = begin * latent_;
                    layernorm_simnorm_backward(d + k, latents(s, policy, h + 1), pre + k, mean + begin, rstd + begin, l.gain,
                                               one + k, s.rows, latent_, threads);
                });
                d = one;
            }
            multiply_on_threads({rows, l.inputs, l.outputs, {d, l.outputs, 1}, {l.transpose, 0, 0}, true, other, l.inputs,
                                 nullptr, nullptr, false, 0, l.bf16}, threads);
            std::swap(one, other);
            d = one;
        }
        return d;
    }

    // With the gradients from elsewhere added: the actions' go to d_action, those of z_h become dz.
    void share_out(const Span& s, int64_t h, const float* d, const float* elsewhere, float* dz, float* d_action) const {
        const int64_t width = widths_[0];
        over_policies(s, [&](int64_t policy, int64_t begin) {
            float* const actions = d_action + by_policy(s, policy, h) * action_;
            for (int64_t i = 0; i < s.rows; ++i) {
                const float* const here = d + (begin + i) * width;
                const float* const more = elsewhere + (begin + i) * width;
                float* const mine = dz + (begin + i) * latent_;
                for (int64_t j = 0; j < latent_; ++j) mine[j] = (residual_ ? mine[j] : 0.0f) + (more[j] + here[j]);
                for (int64_t j = 0; j < action_; ++j) actions[i * action_ + j] = more[latent_ + j] + here[latent_ + j];
            }
        });
    }

    RolloutActors actors_;
    const std::vector<int64_t> widths_;
    const int64_t policies_, horizon_, batch_, size_, log_std_;
    const bool residual_;
    const float eps_;
    int64_t latent_ = 0, action_ = 0, widest_ = 0, weights_ = 0;
    bool imagined_ = false;
    std::mutex busy_;
    std::vector<DynamicsLayer> layers_;
    Arrays arrays_{};
    std::vector<std::unique_ptr<LayerMemory>> kept_;
    std::vector<std::unique_ptr<SpanMemory>> memories_;  // one for each thread that has spans of its own
};

}  // namespace
}  // namespace pwm_fast

void register_dynamics_rollout(py::module_& module) {
    using namespace pwm_fast;
    py::class_<DynamicsRollout>(module, "DynamicsRollout", "Imagined steps; kernels/native_dynamics_rollout.py.")
        .def(py::init<std::vector<std::vector<int64_t>>, int64_t, int64_t, std::vector<int64_t>, int64_t, int64_t, int64_t,
                      bool, float>())
        .def("forward", &DynamicsRollout::forward, py::call_guard<py::gil_scoped_release>())
        .def("backward", &DynamicsRollout::backward, py::call_guard<py::gil_scoped_release>());
}
