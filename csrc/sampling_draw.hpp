// Which rows a batch may be drawn from. pwm_fast/data/drawing.py is the definition: the same rows, bit for bit.
#pragma once

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "philox.hpp"

namespace pwm_fast {

// A choice among the rows of E episodes: first a group of consecutive episodes, each with its share, then one of the
// group's rows, all equally likely. Episode e's rows are offsets[e+1] - offsets[e], from first_row[e] on.
class Draw {
public:
    struct Drawn {
        int64_t row, episode;
    };

    // offsets [E+1]; first_row [E]; group [G+1], the first episode of each group; threshold [G-1]: 64 random bits
    // choose the first group whose threshold is above them. Throws std::invalid_argument if they do not fit.
    Draw(std::vector<int64_t> offsets, std::vector<int64_t> first_row, std::vector<int64_t> group,
         std::vector<uint64_t> threshold)
        : offsets_(std::move(offsets)),
          first_row_(std::move(first_row)),
          group_(std::move(group)),
          threshold_(std::move(threshold)) {
        const auto E = static_cast<int64_t>(first_row_.size());
        require(E >= 1 && offsets_.size() == first_row_.size() + 1 && offsets_.front() == 0,
                "a draw must have first_row [E] and offsets [E+1] that begin at 0");
        require(std::is_sorted(offsets_.begin(), offsets_.end()), "the offsets of a draw must not decrease");
        require(group_.size() == threshold_.size() + 2 && group_.front() == 0 && group_.back() == E,
                "the groups [G+1] of a draw must cover its episodes, with G-1 thresholds");
        require(std::is_sorted(threshold_.begin(), threshold_.end()), "the thresholds of a draw must not decrease");
        for (size_t g = 0; g + 1 < group_.size(); ++g)
            require(group_[g] >= 0 && group_[g] < group_[g + 1] && group_[g + 1] <= E &&
                        offsets_[group_[g]] < offsets_[group_[g + 1]],
                    "each group of a draw must count at least one window");
        while ((offsets_.back() >> shift_) >= 4 * E) ++shift_;
        const int64_t buckets = (offsets_.back() >> shift_) + 1;
        int64_t episode = 0;
        for (int64_t bucket = 0; bucket <= buckets; ++bucket) {
            const int64_t drawn = std::min(bucket << shift_, offsets_.back() - 1);
            while (offsets_[episode + 1] <= drawn) ++episode;
            table_.push_back(episode);
        }
    }

    int64_t episodes() const { return static_cast<int64_t>(first_row_.size()); }
    int64_t first(int64_t episode) const { return first_row_[episode]; }
    int64_t count(int64_t episode) const { return offsets_[episode + 1] - offsets_[episode]; }

    Drawn operator()(const RandomPair& bits) const {
        const auto g = std::upper_bound(threshold_.begin(), threshold_.end(), bits.second) - threshold_.begin();
        const int64_t begin = offsets_[group_[g]], end = offsets_[group_[g + 1]];
        const int64_t drawn = begin + static_cast<int64_t>(scale_to(bits.first, static_cast<uint64_t>(end - begin)));
        const int64_t* const near = &table_[drawn >> shift_];
        int64_t episode = near[0];
        for (int64_t left = near[1] - near[0] + 1; left > 1;) {  // the last with offsets[episode] <= drawn
            const int64_t half = left / 2;
            episode += half & -static_cast<int64_t>(offsets_[episode + half] <= drawn);  // a branch would be a guess
            left -= half;
        }
        return {first_row_[episode] + drawn - offsets_[episode], episode};
    }

private:
    static void require(bool condition, const char* message) {
        if (!condition) throw std::invalid_argument(message);
    }

    std::vector<int64_t> offsets_, first_row_, group_;
    std::vector<uint64_t> threshold_;
    // The episode of every 2^shift_-th draw. Between neighbours there is one episode or none more in most places, so a
    // search costs the same in stores of a hundred episodes and of a million.
    std::vector<int64_t> table_;
    int shift_ = 0;
};

}  // namespace pwm_fast
