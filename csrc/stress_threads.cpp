// Jobs for the worker pool from several callers at once, with pauses shorter and longer than workers look for the next job
// before they sleep. Run under a sanitizer: `stress_threads 10000`; tests/data_store/test_scheduler_sanitizers.py does.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "elementwise_threads.hpp"

namespace {

using pwm_fast::WorkerPool;

// Every task adds to a number of its own, and to one of its slot: all must be done once, no slot used by two at a time.
bool one_job(unsigned number) {
    const int64_t tasks = 1 + number % 7;
    const int threads = static_cast<int>(1 + number % 5);
    std::vector<std::atomic<int>> done(static_cast<size_t>(tasks));
    std::vector<int> by_slot(static_cast<size_t>(threads));
    WorkerPool::instance().run(tasks, threads, [&](int64_t task, int slot) {
        ++done[static_cast<size_t>(task)];
        ++by_slot[static_cast<size_t>(slot)];
        WorkerPool::instance().run(3, 2, [&](int64_t, int) { ++done[static_cast<size_t>(task)]; });
    });
    int total = 0;
    for (const int count : by_slot) total += count;
    for (const auto& count : done) {
        if (count.load() != 4) return false;
    }
    return total == tasks;
}

bool many_jobs(unsigned seed, long rounds) {
    for (long i = 0; i < rounds; ++i) {
        seed = seed * 1664525u + 1013904223u;
        if (!one_job(seed >> 8)) return false;
        const unsigned pause = seed >> 24;
        if (pause < 16) std::this_thread::sleep_for(std::chrono::microseconds(20 * pause));
    }
    return true;
}

}  // namespace

int main(int count, char** words) {
    const long rounds = count > 1 ? std::atol(words[1]) : 1000;
    bool other = false;
    std::thread second([&] { other = many_jobs(2, rounds); });
    const bool mine = many_jobs(1, rounds);
    second.join();
    std::printf("%ld rounds: %s\n", rounds, mine && other ? "every task done once" : "WRONG");
    return mine && other ? 0 : 1;
}
