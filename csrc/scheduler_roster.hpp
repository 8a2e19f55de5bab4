// Which policies share a batch: the first `capacity` in the order of their admission. One that has had all its steps,
// or is retired, leaves; those behind it move up, so the rows in use are always the first ones.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "sampling_draw.hpp"

namespace pwm_fast {

struct Policy {
    int64_t id = 0;
    uint64_t seed = 0;
    int64_t step = 0;  // of its next batch
    int64_t end = std::numeric_limits<int64_t>::max();
    std::shared_ptr<const Draw> draw;
    int64_t source = 0;  // whose rows these are

    bool operator==(const Policy& other) const {
        return id == other.id && seed == other.seed && step == other.step && draw == other.draw &&
               source == other.source;
    }
};

class Roster {
public:
    explicit Roster(int64_t capacity) : capacity_(capacity) {}

    const std::vector<Policy>& policies() const { return policies_; }

    void admit(Policy policy) {
        if (find(policy.id) != policies_.end())
            throw std::invalid_argument("policy " + std::to_string(policy.id) +
                                        " is admitted already; retire it first, or choose another id");
        policies_.push_back(std::move(policy));
    }

    void retire(int64_t id) {
        const auto found = find(id);
        if (found == policies_.end())
            throw std::invalid_argument("policy " + std::to_string(id) +
                                        " is not here; it was never admitted, has had all its steps or is retired");
        policies_.erase(found);
    }

    void seek(int64_t step) {
        for (Policy& policy : policies_) policy.step = step;
        leave();
    }

    // The rows of the next batch, each with the step it draws; none when every policy has had all its steps.
    std::vector<Policy> take() {
        std::vector<Policy> rows(policies_.begin(), policies_.begin() + next());
        skip();
        return rows;
    }

    // As `take`, of a batch whose rows are known.
    void skip() {
        for (int64_t p = 0, count = next(); p < count; ++p) ++policies_[p].step;
        leave();
    }

private:
    int64_t next() const { return std::min<int64_t>(capacity_, static_cast<int64_t>(policies_.size())); }

    std::vector<Policy>::iterator find(int64_t id) {
        return std::find_if(policies_.begin(), policies_.end(), [&](const Policy& policy) { return policy.id == id; });
    }

    void leave() {
        policies_.erase(std::remove_if(policies_.begin(), policies_.end(),
                                       [](const Policy& policy) { return policy.step >= policy.end; }),
                        policies_.end());
    }

    int64_t capacity_;
    std::vector<Policy> policies_;
};

}  // namespace pwm_fast
