#include "scheduler.hpp"

#include <array>
#include <exception>
#include <stdexcept>
#include <utility>

namespace pwm_fast {

namespace {

constexpr int64_t kDrawn = 512;  // windows that are drawn, then gathered

constexpr int64_t kWorthWaking = 1 << 18;  // bytes; filling as many takes ten times as long as waking

int64_t bytes_per_window(const BatchShape& shape) {
    return shape.obs_dim * (shape.horizon + 1) * 4 + (shape.action_dim + 2) * shape.horizon * 4;
}

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

void require_ring(const std::vector<SlotMemory>& ring, int threads) {
    require(!ring.empty(), "the ring must have at least one slot, got none");
    require(threads >= 1, "threads must be >= 1, got " + std::to_string(threads));
}

}  // namespace

RolloutScheduler::RolloutScheduler(std::vector<Source> sources, const BatchShape& shape, std::vector<SlotMemory> ring,
                                   int threads)
    : sources_(std::move(sources)),
      shape_(shape),
      gather_(selected_gather()),
      random_(selected_random()),
      window_bytes_(bytes_per_window(shape)),
      small_(shape.capacity * shape.batch * window_bytes_ < kWorthWaking),
      piece_windows_(std::max<int64_t>(1, shape.piece_bytes / std::max<int64_t>(1, window_bytes_))),
      consumed_(shape.capacity),
      planned_(shape.capacity) {
    require(shape.capacity >= 1, "capacity must be >= 1, got " + std::to_string(shape.capacity));
    require(shape.batch >= 1, "batch must be >= 1, got " + std::to_string(shape.batch));
    require(!sources_.empty(), "there must be at least one source, got none");
    for (const Source& source : sources_)
        require(shape.horizon >= 0 && source.columns.rows > shape.horizon,
                "horizon must be in [0, " + std::to_string(source.columns.rows) + "), the store's rows, got " +
                    std::to_string(shape.horizon));
    require_ring(ring, threads);
    slots_.resize(ring.size());
    for (size_t i = 0; i < ring.size(); ++i) slots_[i].memory = ring[i];
    start_workers(threads);
}

RolloutScheduler::~RolloutScheduler() { close(); }

// Rows outside the store never become reads outside its memory.
void RolloutScheduler::check(const Policy& policy) const {
    const Draw& draw = *policy.draw;
    require(policy.step >= 0 && policy.step < policy.end,
            "policy " + std::to_string(policy.id) + " must have steps left, got step " + std::to_string(policy.step) +
                " of " + std::to_string(policy.end));
    require(policy.source >= 0 && policy.source < static_cast<int64_t>(sources_.size()),
            "there are " + std::to_string(sources_.size()) + " sources, got number " + std::to_string(policy.source));
    const int64_t after = shape_.partial ? 1 : shape_.horizon;  // rows that must follow the drawn one
    const int64_t rows = sources_[policy.source].columns.rows;
    for (int64_t e = 0; e < draw.episodes(); ++e)
        require(draw.first(e) >= 0 && draw.count(e) <= rows && draw.first(e) <= rows - draw.count(e) - after,
                "a window lies outside the store");
}

void RolloutScheduler::admit(const std::vector<Policy>& policies) {
    for (const Policy& policy : policies) check(policy);
    change([&](Roster& roster) {
        for (const Policy& policy : policies) roster.admit(policy);
    });
}

void RolloutScheduler::retire(int64_t id) {
    change([&](Roster& roster) { roster.retire(id); });
}

void RolloutScheduler::seek(int64_t step) {
    require(step >= 0, "step must be >= 0, got " + std::to_string(step));
    change([&](Roster& roster) { roster.seek(step); });
}

std::vector<Policy> RolloutScheduler::policies() {
    std::lock_guard<std::mutex> lock(mutex_);
    return consumed_.policies();
}

// Plans again from the consumer's place on. Batches that stay as they were keep what is done of them.
void RolloutScheduler::change(const std::function<void(Roster&)>& edit) {
    std::lock_guard<std::mutex> one(control_);
    std::unique_lock<std::mutex> lock(mutex_);
    require_open();
    paused_ = true;
    idle_.wait(lock, [&] { return working_ == 0; });
    paused_ = false;
    work_.notify_all();  // they get the lock when all is planned, or when `edit` has thrown
    Roster edited = consumed_;
    edit(edited);
    consumed_ = std::move(edited);
    planned_ = consumed_;
    std::deque<int64_t> before;
    before.swap(pending_);
    for (const int64_t index : before) {
        Slot& slot = slots_[index];
        std::vector<Policy> rows = planned_.take();
        if (rows.empty()) {
            slot.rows.clear();
            continue;
        }
        if (rows != slot.rows) assign(slot, std::move(rows));
        pending_.push_back(index);
    }
    plan();
}

// Gives every free slot the next batch to prepare.
void RolloutScheduler::plan() {
    for (size_t i = 0; i < slots_.size(); ++i) {
        Slot& slot = slots_[i];
        if (slot.held || !slot.rows.empty()) continue;
        std::vector<Policy> rows = planned_.take();
        if (rows.empty()) break;
        assign(slot, std::move(rows));
        pending_.push_back(static_cast<int64_t>(i));
    }
    if (worth_waking()) work_.notify_all();
    ready_.notify_all();
}

// To wake a worker for every small batch would cost more than to fill it: half of the ring is filled at a time.
bool RolloutScheduler::worth_waking() const {
    const auto waiting = std::count_if(pending_.begin(), pending_.end(),
                                       [&](int64_t index) { return slots_[index].next < slots_[index].pieces; });
    return !small_ || 2 * waiting >= static_cast<int64_t>(slots_.size());
}

void RolloutScheduler::assign(Slot& slot, std::vector<Policy> rows) {
    slot.rows = std::move(rows);
    const int64_t windows = static_cast<int64_t>(slot.rows.size()) * shape_.batch;
    slot.pieces = (windows + piece_windows_ - 1) / piece_windows_;
    restart(slot);
}

void RolloutScheduler::restart(Slot& slot) {
    slot.next = slot.done = 0;
    slot.found = Found{};
}

Acquired RolloutScheduler::acquire(std::chrono::nanoseconds patience) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto complete = [&] { return slots_[pending_.front()].done == slots_[pending_.front()].pieces; };
    const auto answerable = [&] { return closed_ || pending_.empty() || complete(); };
    if (!answerable()) {
        const auto begin = std::chrono::steady_clock::now();
        while (!answerable() && std::chrono::steady_clock::now() - begin < patience) {
            if (Slot* const slot = for_consumer()) {
                fill_next(*slot, lock);
            } else {
                ready_.wait_until(lock, begin + patience, [&] { return answerable() || for_consumer() != nullptr; });
            }
        }
        waited_ += std::chrono::steady_clock::now() - begin;
    }
    Acquired result;
    if (closed_) {
        result.answer = Answer::kClosed;
    } else if (pending_.empty()) {
        result.answer = consumed_.policies().empty() ? Answer::kFinished : Answer::kAllHeld;
    } else if (complete()) {
        const int64_t index = pending_.front();
        Slot& slot = slots_[index];
        if (slot.found.fault) {
            result.answer = Answer::kFault;
            result.fault = slot.found.fault;
            restart(slot);
            work_.notify_all();
        } else {
            result.answer = Answer::kReady;
            result.slot = index;
            result.rows = slot.rows;
            slot.held = true;
            pending_.pop_front();
            consumed_.skip();
        }
    }
    return result;
}

void RolloutScheduler::release(int64_t index) {
    std::lock_guard<std::mutex> lock(mutex_);
    require(index >= 0 && index < static_cast<int64_t>(slots_.size()) && slots_[index].held,
            "slot " + std::to_string(index) + " is not held");
    slots_[index].held = false;
    slots_[index].rows.clear();
    if (!closed_) plan();
}

int64_t RolloutScheduler::held() const {
    return std::count_if(slots_.begin(), slots_.end(), [](const Slot& slot) { return slot.held; });
}

void RolloutScheduler::resize(std::vector<SlotMemory> ring, int threads) {
    require_ring(ring, threads);
    std::lock_guard<std::mutex> one(control_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        require_open();
        require(held() == 0, std::to_string(held()) + " batches are in use; release them before resizing");
    }
    const int before = static_cast<int>(workers_.size());
    stop_workers();
    bool refused = false;
    {
        std::lock_guard<std::mutex> lock(mutex_);
        refused = held() != 0;  // another thread took one while the workers ended
        if (!refused) {
            slots_.clear();
            slots_.resize(ring.size());
            for (size_t i = 0; i < ring.size(); ++i) slots_[i].memory = ring[i];
            pending_.clear();
            planned_ = consumed_;
            plan();
        }
    }
    try {
        start_workers(refused ? before : threads);
    } catch (...) {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;  // or a consumer would wait for nobody
        ready_.notify_all();
        throw;
    }
    require(!refused, "a batch was taken while resizing; release it first");
}

void RolloutScheduler::close() {
    std::lock_guard<std::mutex> one(control_);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        closed_ = true;
    }
    ready_.notify_all();
    stop_workers();
}

std::chrono::nanoseconds RolloutScheduler::waited() {
    std::lock_guard<std::mutex> lock(mutex_);
    return waited_;
}

int64_t RolloutScheduler::ready() {
    std::lock_guard<std::mutex> lock(mutex_);
    return std::count_if(pending_.begin(), pending_.end(),
                         [&](int64_t index) { return slots_[index].done == slots_[index].pieces; });
}

void RolloutScheduler::require_open() const {
    if (closed_) throw std::runtime_error("the scheduler is closed");
}

// Fewer threads than asked for are no reason to stop; none is.
void RolloutScheduler::start_workers(int threads) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = false;
    }
    workers_.reserve(threads);
    try {
        while (static_cast<int>(workers_.size()) < threads) workers_.emplace_back([this] { work(); });
    } catch (const std::exception& error) {
        if (workers_.empty()) throw std::runtime_error(std::string("no thread can be started: ") + error.what());
    }
}

void RolloutScheduler::stop_workers() {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    work_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    std::unique_lock<std::mutex> lock(mutex_);
    idle_.wait(lock, [&] { return working_ == 0; });
}

// The earliest batch with a piece that nobody has taken.
RolloutScheduler::Slot* RolloutScheduler::unclaimed() {
    for (const int64_t index : pending_)
        if (slots_[index].next < slots_[index].pieces) return &slots_[index];
    return nullptr;
}

// What a consumer does in place of waiting: a piece of its own batch, or, as it takes no longer than to sleep and wake
// again, a small later batch.
RolloutScheduler::Slot* RolloutScheduler::for_consumer() {
    Slot* const slot = paused_ || stop_ ? nullptr : unclaimed();
    return slot != nullptr && (small_ || slot == &slots_[pending_.front()]) ? slot : nullptr;
}

// Fills the next piece of a batch; the lock is held before and after, not meanwhile.
void RolloutScheduler::fill_next(Slot& slot, std::unique_lock<std::mutex>& lock) {
    const int64_t piece = slot.next++;
    ++working_;
    lock.unlock();
    Found found;
    try {
        found = fill(slot, piece);
    } catch (const std::exception& error) {
        found.fault.reason = error.what();
    }
    lock.lock();
    if (found.fault && found.before(slot.found)) slot.found = std::move(found);
    if (++slot.done == slot.pieces) ready_.notify_all();
    if (--working_ == 0) idle_.notify_all();
}

void RolloutScheduler::work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        Slot* slot = nullptr;
        work_.wait(lock, [&] { return stop_ || (!paused_ && (slot = unclaimed()) != nullptr); });
        if (stop_) return;
        fill_next(*slot, lock);
    }
}

RolloutScheduler::Found RolloutScheduler::fill(const Slot& slot, int64_t piece) const {
    const int64_t end =
        std::min((piece + 1) * piece_windows_, static_cast<int64_t>(slot.rows.size()) * shape_.batch);
    const int64_t begin = piece * piece_windows_;
    const Found found = shortened(slot, begin, end);
    if (found.fault) return found;
    const PageFaults before = PageFaults::of_this_thread();
    Found result = gathered(slot, begin, end, absent_.load(std::memory_order_relaxed));
    const PageFaults after = PageFaults::of_this_thread();
    // What was asked for in time is only mapped when it is met. A few such pages are not worth five calls a window.
    absent_.store(after.read > before.read || 4 * (after.mapped - before.mapped) > end - begin,
                  std::memory_order_relaxed);
    return result;
}

RolloutScheduler::Found RolloutScheduler::gathered(const Slot& slot, int64_t begin, int64_t end, bool absent) const {
    const int64_t B = shape_.batch, H = shape_.horizon;
    Found found;
    std::array<int64_t, kDrawn> rows;
    for (int64_t drawn; begin < end; begin = drawn) {
        drawn = std::min(begin + kDrawn, end);
        draw_rows(slot, begin, drawn, absent, rows.data());
        for (int64_t n = begin, stop, same = begin; n < drawn; n = stop) {
            const int64_t p = n / B, source = slot.rows[p].source, *const first = rows.data() + n - begin;
            const Columns& columns = sources_[source].columns;
            stop = std::min((p + 1) * B, drawn);
            while (same < drawn && slot.rows[same / B].source == source) same = std::min((same / B + 1) * B, drawn);
            if (gather_(columns, first, stop - n, same - n, H, n % B, B, part_of(slot, p))) continue;
            Found here{p, {first_not_finite(columns, first, stop - n, H), {}, source}};
            if (!here.fault) here.fault.reason = "a value was NaN or infinite and changed while it was read";
            if (here.before(found)) found = std::move(here);
        }
    }
    return found;
}

// Whether files of windows begin to end of a batch were cut.
RolloutScheduler::Found RolloutScheduler::shortened(const Slot& slot, int64_t begin, int64_t end) const {
    Found found;
    int64_t seen = -1;
    for (int64_t p = begin / shape_.batch; p * shape_.batch < end && !found.fault; ++p) {
        const int64_t source = slot.rows[p].source;
        if (source != seen) found = {p, {-1, sources_[source].files.shortened(), source}};
        seen = source;
    }
    return found;
}

// The first rows of windows begin to end of a batch, policy after policy; of partial ones, also where they are valid.
void RolloutScheduler::draw_rows(const Slot& slot, int64_t begin, int64_t end, bool absent, int64_t* rows) const {
    const int64_t B = shape_.batch, H = shape_.horizon;
    const uint32_t stream = H == 0 ? kStartStream : kWindowStream;
    RandomPairs pairs;
    for (int64_t n = begin; n < end;) {
        const int64_t p = n / B, b = n % B, count = std::min({B - b, end - n, pairs.kMost});
        const Policy& policy = slot.rows[p];
        const Columns& columns = sources_[policy.source].columns;
        const int64_t last = columns.rows - H - 1;
        random_(policy.seed, stream, static_cast<uint64_t>(policy.step), static_cast<uint32_t>(b), count, pairs);
        for (int64_t i = 0; i < count; ++i, ++rows) {
            const Draw::Drawn drawn = (*policy.draw)(pairs[i]);
            *rows = std::min(drawn.row, last);  // a partial window must not run over the store's end
            if (absent) ask_for_window(columns, *rows, H);
            prefetch_numbers(columns, *rows, H);
            if (shape_.partial) mark_valid(slot.memory.valid + p * H * B + b + i, policy, drawn, *rows);
        }
        n += count;
    }
}

WindowBatch RolloutScheduler::part_of(const Slot& slot, int64_t policy) const {
    const int64_t B = shape_.batch, H = shape_.horizon;
    WindowBatch part = slot.memory.columns;
    part.obs_dim = shape_.obs_dim;
    part.action_dim = shape_.action_dim;
    part.obs += policy * (H + 1) * B * part.obs_dim;
    if (H > 0) {
        part.action += policy * H * B * part.action_dim;
        part.reward += policy * H * B;
        part.terminated += policy * H * B;
        part.task += policy * B;
    }
    return part;
}

// valid [H, B] of one window: its transitions before the episode's last row.
void RolloutScheduler::mark_valid(uint8_t* valid, const Policy& policy, const Draw::Drawn& drawn, int64_t row) const {
    const Source& source = sources_[policy.source];
    int64_t last = policy.draw->first(drawn.episode) + policy.draw->count(drawn.episode);
    if (row != drawn.row)
        last = *std::upper_bound(source.episode_start, source.episode_start + source.episodes, row) - 1;
    for (int64_t h = 0; h < shape_.horizon; ++h) valid[h * shape_.batch] = h < last - row;
}

}  // namespace pwm_fast
