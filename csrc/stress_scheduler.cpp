// Starts, stops, resizes and breaks the scheduler in random order and checks every batch; meant to run under a
// sanitizer (CMakeLists.txt). Usage: stress_scheduler [rounds] [seed]. Ends with 0 if nothing was wrong.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <unistd.h>

#include "scheduler.hpp"

namespace {

using namespace pwm_fast;
using std::chrono::seconds;

constexpr auto kLong = seconds(60);  // a batch that takes longer never comes

void expect(bool condition, const std::string& what) {
    if (!condition) throw std::logic_error(what);
}

// Episodes whose every number says which row, of which store, it is of.
struct Store {
    int64_t number, obs_dim, action_dim;
    std::vector<int64_t> start{0};
    std::vector<float> obs, action, reward;
    std::vector<uint8_t> terminated;
    std::vector<int32_t> task;
    std::string path;

    Store(std::mt19937& random, int64_t which, bool poisoned)
        : number(which), obs_dim(1 + random() % 20), action_dim(1 + random() % 5) {
        const int episodes = 1 + static_cast<int>(random() % 6);
        for (int e = 0; e < episodes; ++e) start.push_back(start.back() + 6 + static_cast<int64_t>(random() % 20));
        const int64_t rows = start.back();
        for (int64_t row = 0; row < rows; ++row) {
            for (int64_t s = 0; s < obs_dim; ++s) obs.push_back(observation(row, s));
            for (int64_t a = 0; a < action_dim; ++a) action.push_back(-static_cast<float>(row));
            reward.push_back(static_cast<float>(row) / 2);
            terminated.push_back(row % 2);
            task.push_back(static_cast<int32_t>(row % 7));
        }
        if (poisoned) (random() % 2 ? obs : reward)[random() % rows] = std::numeric_limits<float>::quiet_NaN();
        path = "stress_scheduler." + std::to_string(::getpid()) + "." + std::to_string(which) + ".obs";
        std::ofstream file(path, std::ios::binary);
        file.write(reinterpret_cast<const char*>(obs.data()), bytes());
    }
    ~Store() { std::remove(path.c_str()); }

    float observation(int64_t row, int64_t s) const {
        return static_cast<float>(1000 * number + row) + static_cast<float>(s) / 32;
    }
    int64_t bytes() const { return static_cast<int64_t>(obs.size() * sizeof(float)); }
    void cut() const { expect(::truncate(path.c_str(), bytes() / 2) == 0, "truncate"); }

    Source source() const {
        std::vector<StoreFiles::File> files{{path, bytes()}};
        return {{obs.data(), action.data(), reward.data(), terminated.data(), task.data(), start.back(), obs_dim, action_dim},
                start.data(), static_cast<int64_t>(start.size()) - 1, StoreFiles(std::move(files))};
    }
    // Of one group, or of two with shares 1/4 and 3/4.
    std::shared_ptr<Draw> draw(const BatchShape& shape, bool grouped) const {
        std::vector<int64_t> offsets{0}, first_row(start.begin(), start.end() - 1);
        for (size_t e = 0; e + 1 < start.size(); ++e) {
            const int64_t after = shape.partial ? 1 : std::max<int64_t>(shape.horizon, 1);
            offsets.push_back(offsets.back() + start[e + 1] - start[e] - after);
        }
        const auto episodes = static_cast<int64_t>(first_row.size());
        if (!grouped || episodes < 2)
            return std::make_shared<Draw>(offsets, first_row, std::vector<int64_t>{0, episodes},
                                          std::vector<uint64_t>{});
        return std::make_shared<Draw>(offsets, first_row, std::vector<int64_t>{0, 1, episodes},
                                      std::vector<uint64_t>{uint64_t{1} << 62});
    }
};

struct Ring {
    std::vector<float> obs, action, reward;
    std::vector<uint8_t> terminated, valid;
    std::vector<int32_t> task;
    std::vector<SlotMemory> slots;

    Ring(int64_t count, const BatchShape& s) {
        const int64_t rows = s.capacity * s.batch, H = s.horizon;
        obs.resize(count * rows * (H + 1) * s.obs_dim);
        action.resize(count * rows * H * s.action_dim);
        reward.resize(count * rows * H);
        terminated.resize(count * rows * H);
        valid.resize(count * rows * H);
        task.resize(count * rows);
        for (int64_t i = 0; i < count; ++i)
            slots.push_back({{&obs[i * rows * (H + 1) * s.obs_dim], action.data() + i * rows * H * s.action_dim,
                              reward.data() + i * rows * H, terminated.data() + i * rows * H, &task[i * rows]},
                             valid.data() + i * rows * H});
    }
};

using Stores = std::vector<std::unique_ptr<Store>>;

// Every number of a batch, from the definition.
void check(const Stores& stores, const BatchShape& shape, const SlotMemory& at, const std::vector<Policy>& rows) {
    const int64_t B = shape.batch, H = shape.horizon;
    for (int64_t p = 0; p < static_cast<int64_t>(rows.size()); ++p) {
        const Policy& policy = rows[p];
        const Store& store = *stores[policy.source];
        for (int64_t b = 0; b < B; ++b) {
            const RandomPair bits = random_pair(policy.seed, H == 0 ? kStartStream : kWindowStream,
                                                static_cast<uint64_t>(policy.step), static_cast<uint32_t>(b));
            int64_t row = (*policy.draw)(bits).row;
            row = std::min(row, store.start.back() - H - 1);
            const int64_t next = *std::upper_bound(store.start.begin(), store.start.end(), row);
            for (int64_t h = 0; h <= H; ++h) {
                const float* obs = at.columns.obs + ((p * (H + 1) + h) * B + b) * shape.obs_dim;
                for (int64_t s = 0; s < shape.obs_dim; ++s)
                    expect(obs[s] == (s < store.obs_dim ? store.observation(row + h, s) : 0.0f), "wrong observation");
                if (h == H) break;
                const int64_t t = (p * H + h) * B + b;
                for (int64_t a = 0; a < shape.action_dim; ++a)
                    expect(at.columns.action[t * shape.action_dim + a] ==
                               (a < store.action_dim ? -static_cast<float>(row + h) : 0.0f), "wrong action");
                expect(at.columns.reward[t] == static_cast<float>(row + h) / 2, "wrong reward");
                expect(at.columns.terminated[t] == (row + h) % 2, "wrong termination");
                expect(shape.partial || row + h + 1 < next, "a window crosses its episode's end");
                if (shape.partial) expect(at.valid[t] == (row + h + 1 < next), "wrong validity");
            }
            if (H > 0) expect(at.columns.task[p * B + b] == row % 7, "wrong task");
        }
    }
}

// Takes batches and gives them back until the scheduler is closed.
class OtherConsumer {
public:
    explicit OtherConsumer(RolloutScheduler& scheduler) : scheduler_(scheduler) {}
    ~OtherConsumer() {
        scheduler_.close();
        thread_.join();
    }

private:
    void consume() {
        for (;;) {
            const Acquired got = scheduler_.acquire(std::chrono::milliseconds(1));
            if (got.answer == Answer::kReady) scheduler_.release(got.slot);
            if (got.answer == Answer::kClosed) return;
            std::this_thread::yield();
        }
    }

    RolloutScheduler& scheduler_;
    std::thread thread_{[this] { consume(); }};
};

struct Counts {
    int64_t batches = 0, faults = 0, resizes = 0, refusals = 0, finished = 0, concurrent = 0;
};

// One scheduler from start to stop, whatever it is doing by then.
void round(std::mt19937& random, Counts& counts) {
    const auto below = [&](int n) { return static_cast<int>(random() % n); };
    const bool poisoned = below(5) == 0, cut = below(8) == 0, shared = below(4) == 0;
    Stores stores;
    std::vector<Source> sources;
    for (int64_t number = 0, count = 1 + below(3); number < count; ++number) {
        stores.push_back(std::make_unique<Store>(random, number, poisoned));
        sources.push_back(stores.back()->source());
    }
    BatchShape shape;
    shape.obs_dim = 1 + below(20);
    shape.action_dim = 1 + below(5);
    shape.capacity = 1 + below(3);
    shape.batch = 1 + below(24);
    shape.horizon = below(6);
    shape.partial = shape.horizon > 0 && below(2) == 0;
    shape.piece_bytes = 1 << (6 + below(6));
    std::vector<std::unique_ptr<Ring>> rings;
    rings.push_back(std::make_unique<Ring>(1 + below(4), shape));
    std::vector<std::shared_ptr<Draw>> draws;
    for (const auto& store : stores) draws.push_back(store->draw(shape, below(2) == 0));
    size_t current = 0;  // of rings: the one in use
    std::set<int64_t> held;
    std::map<int64_t, int64_t> last;  // step of each policy that was seen last
    RolloutScheduler scheduler(std::move(sources), shape, rings.back()->slots, 1 + below(3));
    std::unique_ptr<OtherConsumer> other;
    if (shared) {
        ++counts.concurrent;
        other = std::make_unique<OtherConsumer>(scheduler);
    }
    int64_t id = 0;
    for (int action = below(24); action-- > 0;) {
        switch (below(8)) {
            case 0:
            case 1: {
                const int source = below(static_cast<int>(stores.size()));
                Policy policy{id++, random(), below(100), std::numeric_limits<int64_t>::max(), draws[source], source};
                if (below(2)) policy.end = policy.step + 1 + below(4);
                std::vector<Policy> together{policy};
                if (below(3) == 0) together.push_back({id++, random(), policy.step, policy.end, draws[source], source});
                scheduler.admit(together);
                if (below(4) == 0) {
                    try {
                        scheduler.admit({{id, 0, 0, 1, draws[source], source}, together.back()});
                        expect(shared, "a policy was admitted twice");  // unless it had all its steps meanwhile
                        ++id;
                    } catch (const std::invalid_argument&) {
                        ++counts.refusals;
                    }
                }
                break;
            }
            case 2:
                try {
                    scheduler.retire(below(4));
                } catch (const std::invalid_argument&) {
                    ++counts.refusals;
                }
                break;
            case 3:
                if (!held.empty()) {
                    scheduler.release(*held.begin());
                    held.erase(held.begin());
                }
                break;
            case 4: {
                auto ring = std::make_unique<Ring>(1 + below(4), shape);
                rings.push_back(std::move(ring));
                try {
                    scheduler.resize(rings.back()->slots, 1 + below(3));
                    current = rings.size() - 1;
                    ++counts.resizes;
                } catch (const std::invalid_argument&) {
                    expect(shared || !held.empty(), "a free ring cannot be resized");
                    ++counts.refusals;
                }
                break;
            }
            case 5:
                if (cut) stores[below(static_cast<int>(stores.size()))]->cut();
                if (below(4) == 0) {
                    scheduler.seek(below(50));
                    last.clear();
                }
                break;
            default: {
                const Acquired got = scheduler.acquire(kLong);
                expect(got.answer != Answer::kNotYet && got.answer != Answer::kClosed, "a batch never came");
                counts.finished += got.answer == Answer::kFinished;
                if (got.answer == Answer::kFault) {
                    expect(got.fault.row >= 0 ? poisoned : cut, "a fault without a cause");
                    ++counts.faults;
                }
                if (got.answer != Answer::kReady) break;
                ++counts.batches;
                expect(static_cast<int64_t>(got.rows.size()) <= shape.capacity, "too many policies");
                for (const Policy& policy : got.rows) {
                    const auto before = last.find(policy.id);
                    expect(shared || before == last.end() || before->second + 1 == policy.step, "a step is lost");
                    last[policy.id] = policy.step;
                }
                held.insert(got.slot);
                check(stores, shape, rings[current]->slots[got.slot], got.rows);
            }
        }
    }
    if (below(2)) scheduler.close();
}

}  // namespace

int main(int count, char** arguments) {
    const int64_t rounds = count > 1 ? std::atoll(arguments[1]) : 10000;
    const auto seed = static_cast<uint32_t>(count > 2 ? std::atoll(arguments[2]) : 0);
    Counts counts;
    for (int64_t i = 0; i < rounds; ++i) {
        std::mt19937 random(seed + static_cast<uint32_t>(i));
        try {
            round(random, counts);
        } catch (const std::exception& error) {
            std::fprintf(stderr, "round %lld (seed %u): %s\n", static_cast<long long>(i), seed, error.what());
            return 1;
        }
    }
    std::printf("%lld rounds: %lld batches checked, %lld faults, %lld resizes, %lld refusals, %lld ends, %lld shared\n",
                static_cast<long long>(rounds), static_cast<long long>(counts.batches),
                static_cast<long long>(counts.faults), static_cast<long long>(counts.resizes),
                static_cast<long long>(counts.refusals), static_cast<long long>(counts.finished),
                static_cast<long long>(counts.concurrent));
    return 0;
}
