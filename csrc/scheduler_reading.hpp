// Windows that are on the disk only: where each fault waits for its own read, and for the megabytes around it, a batch of
// 256 took 500 ms; where all are asked for first, 10 ms (bench/test_scheduler.py).
#pragma once

#include <cstdint>

#include "sampling.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>
#endif

namespace pwm_fast {

struct PageFaults {
    int64_t read = 0, mapped = 0;  // those that waited for the disk, and the others

    static PageFaults of_this_thread() {
#if defined(__linux__)
        struct rusage usage;
        if (::getrusage(RUSAGE_THREAD, &usage) == 0) return {usage.ru_majflt, usage.ru_minflt};
#endif
        return {};
    }
};

inline void ask_for(const void* from, int64_t bytes) {
#if defined(__linux__)
    static const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGESIZE));
    const uintptr_t begin = reinterpret_cast<uintptr_t>(from) / page * page;
    const uintptr_t end = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes);
    ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_WILLNEED);  // advice: an error changes nothing
#else
    static_cast<void>(from), static_cast<void>(bytes);
#endif
}

// Has the system begin to read a window of a mapped store, unless it has it.
inline void ask_for_window(const Columns& from, int64_t row, int64_t horizon) {
    ask_for(from.obs + row * from.obs_dim, (horizon + 1) * from.obs_dim * 4);
    if (horizon == 0) return;
    if (from.action_dim > 0) ask_for(from.action + row * from.action_dim, horizon * from.action_dim * 4);
    ask_for(from.reward + row, horizon * 4);
    ask_for(from.terminated + row, horizon);
    ask_for(from.task + row, 4);
}

}  // namespace pwm_fast
