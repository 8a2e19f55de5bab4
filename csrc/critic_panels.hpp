// A network of critics as products read it: each hidden weight W [out, in] as panels of W^T, as GemmTable::pack writes B.
// Forward products then copy no weights, weight gradients are written where the weights' places are, and Adam, which looks
// at one number at a time, does not care. Padding is zero in parameters, gradients and moments, and stays so.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gemm.hpp"

namespace pwm_fast {

struct CriticLayer {
    int64_t inputs, outputs;
    int64_t weight, bias, gain, shift;  // places in a row of parameters; gain and shift of hidden layers
};

class CriticPanels {
public:
    struct Places {
        int64_t weight, bias, gain, shift;
    };

    // The last of `layers` is the value itself, one output: its weight stays a vector.
    CriticPanels(const std::vector<CriticLayer>& layers, const GemmTable& table) : layers_(layers), table_(table) {
        const auto take = [&](int64_t floats) {
            const int64_t at = size_;
            size_ += (floats + 15) / 16 * 16;
            return at;
        };
        for (size_t i = 0; i < layers.size(); ++i) {
            const CriticLayer& l = layers[i];
            const bool hidden = i + 1 < layers.size();
            const int64_t weight = take(hidden ? panels(l.outputs) * panel_floats(l) : l.inputs), bias = take(l.outputs);
            places_.push_back({weight, bias, hidden ? take(l.outputs) : 0, hidden ? take(l.outputs) : 0});
        }
    }

    int64_t size() const { return size_; }
    const Places& operator[](size_t layer) const { return places_[layer]; }
    int64_t panels(int64_t columns) const { return (columns + table_.panel - 1) / table_.panel; }
    int64_t panel_floats(const CriticLayer& l) const { return l.inputs * table_.panel; }

    // Place and length of what a layer has beside panels, in one piece: vectors, and the last layer's weight.
    int64_t vectors(size_t layer) const {
        return layer + 1 < layers_.size() ? places_[layer].bias : places_[layer].weight;
    }
    int64_t vectors_floats(size_t layer) const {
        return (layer + 1 < layers_.size() ? places_[layer + 1].weight : size_) - vectors(layer);
    }

    void load(const float* row, float* out) const {
        for (size_t i = 0; i < layers_.size(); ++i) {
            const CriticLayer& l = layers_[i];
            const Places& at = places_[i];
            if (i + 1 < layers_.size()) {
                table_.pack({row + l.weight, 1, l.inputs}, l.inputs, l.outputs, out + at.weight);
            } else {
                std::copy_n(row + l.weight, l.inputs, out + at.weight);
            }
            for_vectors(i, [&](int64_t here, int64_t there) { std::copy_n(row + there, l.outputs, out + here); });
        }
    }

    void store(const float* from, float* row) const {
        for (size_t i = 0; i < layers_.size(); ++i) {
            const CriticLayer& l = layers_[i];
            const Places& at = places_[i];
            const int64_t width = table_.panel;
            if (i + 1 < layers_.size()) {
                constexpr int64_t kTurn = 16;  // of a panel's rows, read from the first-level cache by all its columns
                for (int64_t o = 0; o < l.outputs; o += width) {
                    const float* const panel = from + at.weight + o * l.inputs;
                    for (int64_t k = 0; k < l.inputs; k += kTurn) {
                        for (int64_t j = 0; j < std::min(width, l.outputs - o); ++j) {
                            float* const out = row + l.weight + (o + j) * l.inputs;
                            for (int64_t i = k; i < std::min(k + kTurn, l.inputs); ++i) out[i] = panel[i * width + j];
                        }
                    }
                }
            } else {
                std::copy_n(from + at.weight, l.inputs, row + l.weight);
            }
            for_vectors(i, [&](int64_t here, int64_t there) { std::copy_n(from + here, l.outputs, row + there); });
        }
    }

    // W of a hidden layer, B [out, in] of the input gradient's product, packed from its panels.
    void transpose(const float* panels_of_layer, const CriticLayer& l, float* out) const {
        const int64_t width = table_.panel;
        for (int64_t o = 0; o < l.outputs; o += width) {
            for (int64_t i = 0; i < l.inputs; i += width) {
                table_.pack({panels_of_layer + o * l.inputs + i * width, 1, width}, std::min(width, l.outputs - o),
                            std::min(width, l.inputs - i), out + i * l.outputs + o * width);
            }
        }
    }

private:
    // Calls body(place here, place in a row) for a layer's vectors.
    template <typename Body>
    void for_vectors(size_t i, const Body& body) const {
        body(places_[i].bias, layers_[i].bias);
        if (i + 1 == layers_.size()) return;
        body(places_[i].gain, layers_[i].gain);
        body(places_[i].shift, layers_[i].shift);
    }

    const std::vector<CriticLayer>& layers_;
    const GemmTable& table_;
    std::vector<Places> places_;
    int64_t size_ = 0;
};

}  // namespace pwm_fast
