// A few worker threads for kernels that take tens of microseconds, too short for making threads per call.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace pwm_fast {

// Tasks are claimed one by one and the caller claims too, so a worker that gets no core (torch's own threads may be
// spinning on it) costs nothing but its help. Which thread runs a task must not matter to the result.
class WorkerPool {
public:
    // The process's pool. It is never destroyed: workers sleep until the process ends. A forked child has none of its
    // parent's threads, so it starts with a new pool.
    static WorkerPool& instance() {
        std::atomic<WorkerPool*>& slot = current();
        WorkerPool* pool = slot.load();
        if (pool == nullptr) {
            auto fresh = std::make_unique<WorkerPool>();
            if (slot.compare_exchange_strong(pool, fresh.get())) pool = fresh.release();
        }
        return *pool;
    }

    // Calls work(task, slot) for every task in [0, tasks); slots in [0, threads) are never used by two tasks at once.
    // `work` must not throw.
    template <typename Work>
    void run(int64_t tasks, int threads, const Work& work) {
        std::unique_lock<std::mutex> only_one(busy_, std::defer_lock);
        if (threads <= 1 || tasks <= 1 || !only_one.try_lock()) {
            for (int64_t task = 0; task < tasks; ++task) work(task, 0);
            return;
        }
        auto job = std::make_shared<Job>();
        job->tasks = tasks;
        job->helpers = static_cast<int>(std::min<int64_t>(threads, tasks)) - 1;
        job->work = &work;
        job->call = [](const void* what, int64_t task, int slot) { (*static_cast<const Work*>(what))(task, slot); };
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (workers_ < job->helpers && start_worker()) ++workers_;
            job_ = job;
            posted_.fetch_add(1);
        }
        if (asleep_.load() > 0) wake_.notify_all();
        job->claim(0);
        spin_until([&] { return job->done.load() == tasks; });
        std::unique_lock<std::mutex> lock(mutex_);
        finished_.wait(lock, [&] { return job->done.load() == tasks; });
        job_.reset();
    }

private:
    struct Job {
        int64_t tasks = 0;
        int helpers = 0;
        const void* work = nullptr;
        void (*call)(const void* work, int64_t task, int slot) = nullptr;
        std::atomic<int64_t> next{0}, done{0};
        std::atomic<int> joined{0};

        // Runs tasks until none is left; true if it finished the last one.
        bool claim(int slot) {
            bool last = false;
            for (int64_t task; (task = next.fetch_add(1)) < tasks;) {
                call(work, task, slot);
                last = done.fetch_add(1) + 1 == tasks;
            }
            return last;
        }
    };

    static std::atomic<WorkerPool*>& current() {
        static std::atomic<WorkerPool*> pool{nullptr};
#if defined(__unix__) || defined(__APPLE__)
        static const int registered = pthread_atfork(nullptr, nullptr, [] { pool.store(nullptr); });
        static_cast<void>(registered);
#endif
        return pool;
    }

    bool start_worker() {
        try {
            std::thread([this] { serve(); }).detach();
            return true;
        } catch (const std::system_error&) {  // no more threads to be had: the caller does the work
            return false;
        }
    }

    // Jobs of one step follow each other within microseconds, and to wake a thread takes tens of them: who waits looks for
    // that long before it sleeps.
    template <typename Done>
    static void spin_until(const Done& done) {
        constexpr int kLooks = 2000;  // some 30 us
        for (int i = 0; i < kLooks && !done(); ++i) {
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#endif
        }
    }

    void serve() {
        int64_t known = -1;
        for (;;) {
            spin_until([&] { return posted_.load() != known; });
            std::shared_ptr<Job> job;
            {
                std::unique_lock<std::mutex> lock(mutex_);
                ++asleep_;
                wake_.wait(lock, [&] { return posted_.load() != known; });
                --asleep_;
                known = posted_.load();
                job = job_;
            }
            if (!job) continue;  // done before this thread looked
            const int slot = job->joined.fetch_add(1) + 1;
            if (slot <= job->helpers && job->claim(slot)) {
                std::lock_guard<std::mutex> lock(mutex_);
                finished_.notify_one();
            }
        }
    }

    std::mutex busy_;   // held by the caller whose job runs
    std::mutex mutex_;  // guards job_ and the two conditions
    std::condition_variable wake_, finished_;
    std::shared_ptr<Job> job_;
    std::atomic<int64_t> posted_{0};  // jobs so far
    std::atomic<int> asleep_{0};
    int workers_ = 0;
};

}  // namespace pwm_fast
