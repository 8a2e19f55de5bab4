// Operands in bfloat16, the upper half of a float32 rounded to nearest even: B as packed pairs, the rows that a product
// copies of A. Two neighbours along k share a word, the first in the lower half: dpbf16ps of AVX512-BF16 multiplies such
// words, and elsewhere one shift or one mask makes each half a float again.
#pragma once

#include "elementwise_vector.hpp"

namespace {

// x rounded to bfloat16, in a float's bits. What is beyond bfloat16's range becomes infinite, NaN stays NaN.
PWM_FAST_INLINE BitVec rounded(Vec x) {
    const BitVec bits = reinterpret_cast<BitVec>(x);
    const BitVec nearest = bits + 0x7fffu + ((bits >> 16) & 1u);
    return (x == x ? nearest : bits | 0x400000u) & 0xffff0000u;
}

PWM_FAST_INLINE constexpr int64_t pairs_of(int64_t depth) { return (depth + 1) / 2; }

// `count` floats, and those up to the next whole vector, rounded where they lie.
void round_to_bf16(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) Whole{}.store(x + i, reinterpret_cast<Vec>(rounded(Whole{}.load(x + i))));
}

// Rows [depth][kWidth] of floats as pairs [pairs_of(depth)][kWidth]; zero beside the last of an odd number. Pairs may
// take the place of their rows.
template <int64_t kWidth>
void pair_rows(const float* rows, int64_t depth, float* out) {
    for (int64_t k = 0; k < depth; k += 2, rows += 2 * kWidth, out += kWidth) {
        for (int64_t i = 0; i < kWidth; i += kLanes) {
            const BitVec upper = k + 1 < depth ? rounded(Whole{}.load(rows + kWidth + i)) : BitVec{};
            Whole{}.store(out + i, reinterpret_cast<Vec>((rounded(Whole{}.load(rows + i)) >> 16) | upper));
        }
    }
}

// B [k, n] in panels of pairs; pack_panel(column, panel) writes the floats [k][kWidth] of one, for which there is room.
template <int64_t kWidth, typename PackPanel>
void pack_pairs(int64_t k, int64_t n, float* panel, float* out, PackPanel pack_panel) {
    for (int64_t column = 0; column < n; column += kWidth, out += kWidth * pairs_of(k)) {
        pack_panel(column, panel);
        pair_rows<kWidth>(panel, k, out);
    }
}

// Floats of B [k, n] in panels of kWidth columns, of floats or of pairs.
template <int64_t kWidth>
int64_t panels_floats(int64_t k, int64_t n, bool bf16) {
    return (n + kWidth - 1) / kWidth * kWidth * (bf16 ? pairs_of(k) : k);
}

// The floats [2 * count][kWidth] of `count` rows of pairs.
template <int64_t kWidth>
void widen_pairs(const float* pairs, int64_t count, float* out) {
    for (int64_t k = 0; k < count; ++k, pairs += kWidth, out += 2 * kWidth) {
        for (int64_t i = 0; i < kWidth; i += kLanes) {
            const BitVec both = reinterpret_cast<BitVec>(Whole{}.load(pairs + i));
            Whole{}.store(out + i, reinterpret_cast<Vec>(both << 16));
            Whole{}.store(out + kWidth + i, reinterpret_cast<Vec>(both & 0xffff0000u));
        }
    }
}

}  // namespace
