// RolloutScheduler: worker threads that keep a ring of staging buffers filled with the next batches of P policies.
//
// A batch is a function of each row's (seed, policy, step) alone, so neither the number of threads, nor how far ahead
// they are, nor who shares the batch can change it. Knows nothing of Python: workers never need its lock.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "sampling.hpp"
#include "scheduler_files.hpp"
#include "scheduler_reading.hpp"
#include "scheduler_roster.hpp"

namespace pwm_fast {

struct Source {
    Columns columns;
    const int64_t* episode_start = nullptr;  // [E+1], the last is the number of rows; read only for partial windows
    int64_t episodes = 0;
    StoreFiles files;
};

struct BatchShape {
    int64_t obs_dim = 1, action_dim = 0;  // width of a row, whatever that of its source (`WindowBatch`)
    int64_t capacity = 1;  // policies
    int64_t batch = 1;     // windows of each
    int64_t horizon = 0;   // 0: start states, of which only `obs` is written
    bool partial = false;  // windows may run over their episode's end; `valid` then says how far they count
    // What a worker takes at a time: claiming it must cost nothing beside filling it, and threads must share a batch.
    int64_t piece_bytes = 1 << 20;
};

// One slot of the ring. Policy p's part of a column follows that of p - 1: obs [P, H+1, B, S], action [P, H, B, A], ...
struct SlotMemory {
    WindowBatch columns;
    uint8_t* valid = nullptr;  // [P, H, B]
};

// Why a batch cannot be had: a window of source number `source` holds a value that is not finite from `row` on, or else
// the reason in words.
struct Fault {
    int64_t row = -1;
    std::string reason;
    int64_t source = 0;

    explicit operator bool() const { return row >= 0 || !reason.empty(); }
};

enum class Answer { kReady, kNotYet, kFinished, kAllHeld, kFault, kClosed };

struct Acquired {
    Answer answer = Answer::kNotYet;
    int64_t slot = -1;
    std::vector<Policy> rows;
    Fault fault;
};

class RolloutScheduler {
public:
    // The memory of `sources` and `ring` must outlive close(). Throws std::invalid_argument, or std::runtime_error if
    // no thread can be started.
    RolloutScheduler(std::vector<Source> sources, const BatchShape& shape, std::vector<SlotMemory> ring, int threads);
    ~RolloutScheduler();
    RolloutScheduler(const RolloutScheduler&) = delete;
    RolloutScheduler& operator=(const RolloutScheduler&) = delete;

    // These three count from the first batch that was not acquired yet; what was prepared for others is made anew.
    void admit(const std::vector<Policy>& policies);  // all or, where one throws std::invalid_argument, none
    void retire(int64_t id);
    void seek(int64_t step);

    // The policies that have steps left, in the order of their admission, each with the step it comes to next.
    std::vector<Policy> policies();

    // The next batch, if it is there within `patience`; meanwhile the consumer fills pieces that no worker has begun.
    // After kFault the same batch is tried again; kFinished means that no policy has steps left, kAllHeld that every slot
    // is held by the consumer.
    Acquired acquire(std::chrono::nanoseconds patience);
    void release(int64_t slot);

    // Another number of threads and another ring; no slot may be held.
    void resize(std::vector<SlotMemory> ring, int threads);

    // Ends the workers, which takes them as long as the piece of a batch that they are at. May be called twice.
    void close();

    std::chrono::nanoseconds waited();  // how long acquire() has waited in all
    int64_t ready();                    // batches that acquire() would not wait for

private:
    struct Found {
        int64_t policy = 0;  // row of the batch
        Fault fault;

        // Whichever piece came first, the fault that is told is that of the first policy, there of the smallest row.
        bool before(const Found& other) const {
            return !other.fault ||
                   std::make_pair(policy, fault.row) < std::make_pair(other.policy, other.fault.row);
        }
    };
    struct Slot {
        SlotMemory memory;
        std::vector<Policy> rows;
        int64_t pieces = 0, next = 0, done = 0;
        Found found;
        bool held = false;
    };

    void work();
    Slot* unclaimed();
    Slot* for_consumer();
    void fill_next(Slot& slot, std::unique_lock<std::mutex>& lock);
    Found fill(const Slot& slot, int64_t piece) const;
    Found gathered(const Slot& slot, int64_t begin, int64_t end, bool absent) const;
    Found shortened(const Slot& slot, int64_t begin, int64_t end) const;
    void draw_rows(const Slot& slot, int64_t begin, int64_t end, bool absent, int64_t* rows) const;
    WindowBatch part_of(const Slot& slot, int64_t policy) const;
    void mark_valid(uint8_t* valid, const Policy& policy, const Draw::Drawn& drawn, int64_t row) const;
    void check(const Policy& policy) const;
    void change(const std::function<void(Roster&)>& edit);
    void plan();
    bool worth_waking() const;
    void assign(Slot& slot, std::vector<Policy> rows);
    void restart(Slot& slot);
    int64_t held() const;
    void require_open() const;
    void start_workers(int threads);
    void stop_workers();

    const std::vector<Source> sources_;
    const BatchShape shape_;
    const Gather gather_;
    const Random random_;
    const int64_t window_bytes_;
    const bool small_;  // a batch takes about as long as to wake a thread
    const int64_t piece_windows_;
    mutable std::atomic<bool> absent_{true};  // the last piece met pages that were not in memory; at first who knows

    std::mutex control_;  // one admission, retirement, resize or close at a time; taken before mutex_
    std::vector<std::thread> workers_;

    std::mutex mutex_;  // guards what follows
    std::condition_variable work_, ready_, idle_;
    std::vector<Slot> slots_;
    std::deque<int64_t> pending_;  // slots of batches that were not acquired, in their order
    Roster consumed_, planned_;    // after the last acquired batch, after the last of pending_
    int64_t working_ = 0;          // pieces being filled, by workers or consumers
    bool paused_ = false, stop_ = true, closed_ = false;  // stop_: there are no workers and nothing is filled
    std::chrono::nanoseconds waited_{0};
};

}  // namespace pwm_fast
