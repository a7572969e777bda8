// A pool of threads that run one function together and meet at barriers.
#pragma once
#include <immintrin.h>

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace proa {

// All threads of a pool pass it together. Spins, since phases last microseconds; sleeps when a peer lost its core: whoever
// spins on, or yields, beside other load spends the share of time that it needs later.
class Barrier {
 public:
  explicit Barrier(int count) : count_(count) {}
  void wait() {
    if (count_ == 1) return;
    const uint32_t phase = phase_.load(std::memory_order_acquire);
    const auto has_passed = [&] { return phase_.load() != phase; };
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == count_) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1);
      if (!sleepers_.load()) return;
      std::lock_guard<std::mutex> lock(mutex_);
      wake_.notify_all();
      return;
    }
    for (int spins = 0; spins < kSpins; ++spins, _mm_pause())
      if (has_passed()) return;
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);  // before looking again, as whoever comes last looks after passing
    wake_.wait(lock, has_passed);
    sleepers_.fetch_sub(1);
  }

 private:
  static constexpr int kSpins = 700;  // 15 to 30 us

  const int count_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint32_t> phase_{0};  // wraps around
  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex mutex_;
  std::condition_variable wake_;
};

class Pool {
 public:
  explicit Pool(int count) : barrier(count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
  }
  ~Pool() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = nullptr;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }
  int size() const { return int(workers_.size()) + 1; }

  // Whoever holds this may call `run`.
  std::unique_lock<std::mutex> acquire() { return std::unique_lock<std::mutex>(turn_); }

  // Run job(thread) on every thread, the caller being thread 0.
  void run(const std::function<void(int)>& job) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      job_ = &job;
      generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    job(0);
    barrier.wait();
  }

  Barrier barrier;

 private:
  void work(int thread) {
    for (uint32_t seen = 0;; ++seen) {
      for (int spins = 0; spins < 4000 && generation_.load(std::memory_order_acquire) == seen; ++spins) _mm_pause();
      if (generation_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_.load(std::memory_order_relaxed) != seen; });
      }
      const std::function<void(int)>* job;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        job = job_;
      }
      if (!job) return;
      (*job)(thread);
      barrier.wait();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex turn_, mutex_;
  std::condition_variable wake_;
  std::atomic<uint32_t> generation_{0};  // wraps around
  const std::function<void(int)>* job_ = nullptr;
};

}  // namespace proa
