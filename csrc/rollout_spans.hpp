// How a rollout's rows are shared out: rows that go through all steps together, and the threads that take them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace pwm_fast {

// Rows [row, row + rows) of each of `policies` neighbouring policies; all rows where there is more than one policy.
struct Span {
    int64_t policy, policies, row, rows;

    int64_t all() const { return policies * rows; }
};

struct RolloutSpans {
    std::vector<Span> spans;
    int at_once, within;  // threads that take spans of their own, threads that share each span's products

    // `weights`: floats of the dynamics. Small ones come from the third-level cache in no time, so activations had better
    // stay in the second; larger ones are read for many rows at once. Threads of few rows each read all weights as often
    // as one of many rows does: instead they share every product.
    RolloutSpans(int64_t policies, int64_t batch, int64_t weights, int threads) {
        const int64_t longest = weights <= 1 << 19 ? 64 : 256, fewest = weights <= 1 << 20 ? 16 : 64;
        const int64_t all = policies * batch;
        const bool even = policies % threads == 0 || policies >= 4 * threads;
        const int64_t parts = even ? 1 : threads / std::gcd(policies, static_cast<int64_t>(threads));
        const bool apart = even ? all >= threads * fewest : batch >= parts * fewest;
        at_once = apart ? threads : 1;
        within = apart ? 1 : threads;
        if (apart && parts > 1) {
            for (int64_t i = 0; i < policies * parts; ++i) {
                const int64_t begin = batch * (i % parts) / parts, end = batch * (i % parts + 1) / parts;
                spans.push_back({i / parts, 1, begin, end - begin});
            }
            return;
        }
        const int64_t rows = at_once * longest, count = std::min(policies, at_once * ((all + rows - 1) / rows));
        for (int64_t i = 0; i < count; ++i) {
            const int64_t begin = policies * i / count, end = policies * (i + 1) / count;
            spans.push_back({begin, end - begin, 0, batch});
        }
    }
};

}  // namespace pwm_fast
