// A population's actors within a rollout: mu(z) of some rows and its gradient at z. Their weights are brought into the
// products' order once a call, not once a step: they are constant within a rollout.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "elementwise.hpp"
#include "elementwise_threads.hpp"
#include "gemm.hpp"
#include "huge_pages.hpp"

namespace pwm_fast {

struct ActorLayer {
    int64_t inputs, outputs;
    int64_t weight, bias, gain, shift;  // places in a policy's row of parameters; gain and shift of hidden layers
};

// What a hidden layer keeps for its backward pass, rows [P, H B]: Linear's output, the layer's, mean and rstd.
struct ActorRows {
    float *pre, *y, *mean, *rstd;
};

class RolloutActors {
public:
    // `size` floats lie between the parameters of neighbouring policies.
    RolloutActors(std::vector<ActorLayer> layers, int64_t policies, int64_t size)
        : layers_(std::move(layers)), policies_(policies), size_(size) {
        for (const ActorLayer& l : layers_) widest_ = std::max({widest_, l.inputs, l.outputs});
    }

    const std::vector<ActorLayer>& layers() const { return layers_; }
    int64_t widest() const { return widest_; }

    // Before `forward`: W^T of every layer [inputs, outputs]. Before `input_gradient`: W, with `transposed` false.
    void pack(const float* parameters, bool transposed, int threads) {
        const GemmTable& table = gemm_table();
        places_.clear();
        packed_size_ = 0;
        for (const ActorLayer& l : layers_) {
            const int64_t columns = transposed ? l.outputs : l.inputs, rows = transposed ? l.inputs : l.outputs;
            places_.push_back(packed_size_);
            packed_size_ += table.packed_floats(rows, columns, false);
        }
        parameters_ = parameters;
        float* const packed = packed_.at_least(policies_ * packed_size_);
        WorkerPool::instance().run(policies_, threads, [&](int64_t policy, int) {
            for (size_t i = 0; i < layers_.size(); ++i) {
                const ActorLayer& l = layers_[i];
                const float* const w = parameters + policy * size_ + l.weight;
                float* const out = packed + policy * packed_size_ + places_[i];
                if (transposed) {
                    table.pack({w, 1, l.inputs}, l.inputs, l.outputs, out);
                } else {
                    table.pack({w, l.inputs, 1}, l.outputs, l.inputs, out);
                }
            }
        });
    }

    // mu [rows, actions] of z [rows, inputs]; what the layers keep begins at row `first` of `kept`.
    void forward(int64_t policy, const float* z, const std::vector<ActorRows>& kept, int64_t first, int64_t rows,
                 float* mu, float eps, int threads) const {
        const float* const p = parameters_ + policy * size_;
        Matrix in{z, layers_[0].inputs, 1};
        for (size_t i = 0; i < layers_.size(); ++i) {
            const ActorLayer& l = layers_[i];
            const bool hidden = i + 1 < layers_.size();
            float* const pre = hidden ? kept[i].pre + first * l.outputs : mu;
            multiply_on_threads({rows, l.outputs, l.inputs, in, packed(policy, i), true, pre, l.outputs, p + l.bias,
                                 nullptr}, threads);
            if (!hidden) return;
            float* const y = kept[i].y + first * l.outputs;
            mish_layernorm_forward(pre, p + l.gain, p + l.shift, y, kept[i].mean + first, kept[i].rstd + first, rows,
                                   l.outputs, eps, threads);
            in = {y, l.outputs, 1};
        }
    }

    // The gradient [rows, inputs] at z given that at mu, which lies in `one`; it is returned in `one` or `other`, both
    // of `widest` columns.
    const float* input_gradient(int64_t policy, const std::vector<ActorRows>& kept, int64_t first, int64_t rows,
                                float* one, float* other, int threads) const {
        const float* const p = parameters_ + policy * size_;
        for (size_t i = layers_.size(); i-- > 0;) {
            const ActorLayer& l = layers_[i];
            if (i + 1 < layers_.size()) {
                mish_layernorm_backward(one, kept[i].pre + first * l.outputs, kept[i].mean + first, kept[i].rstd + first,
                                        p + l.gain, one, nullptr, nullptr, rows, l.outputs, threads);
            }
            multiply_on_threads({rows, l.inputs, l.outputs, {one, l.outputs, 1}, packed(policy, i), true, other, l.inputs,
                                 nullptr, nullptr}, threads);
            std::swap(one, other);
        }
        return one;
    }

private:
    Matrix packed(int64_t policy, size_t layer) const {
        return {packed_.data() + policy * packed_size_ + places_[layer], 0, 0};
    }

    std::vector<ActorLayer> layers_;
    const int64_t policies_, size_;
    int64_t widest_ = 0;
    const float* parameters_ = nullptr;
    Floats packed_;
    std::vector<int64_t> places_;
    int64_t packed_size_ = 0;
};

}  // namespace pwm_fast
