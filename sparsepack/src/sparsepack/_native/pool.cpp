#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#ifndef _WIN32
#include <pthread.h>
#endif

namespace sparsellm {
namespace {

// Long enough for the gap between two linears of a decoder, short enough to leave the core to others soon.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void relax() {
#if defined(__x86_64__) && defined(__GNUC__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) && defined(__GNUC__)
  asm volatile("yield");
#endif
}

// Workers wait for a new ticket, spinning first. Never destroyed: its threads may be asleep in it when the process ends.
class Pool {
 public:
  void run(int threads, void (*body)(void*), void* data) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return body(data);  // another thread is using the workers
    grow(threads - 1);
    const int helpers = threads - 1 < workers_ ? threads - 1 : workers_;
    if (helpers == 0) return body(data);
    body_ = body;
    data_ = data;
    helpers_ = helpers;
    pending_.store(workers_, std::memory_order_relaxed);
    {
      std::lock_guard<std::mutex> lock(sleep_);
      ticket_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    body(data);
    while (pending_.load(std::memory_order_acquire) != 0) relax();
  }

 private:
  void grow(int wanted) {
    try {
      while (workers_ < wanted) {
        std::thread(&Pool::work, this, workers_, ticket_.load()).detach();
        ++workers_;
      }
    } catch (const std::system_error&) {
      // No more threads to be had: those that run do all the work.
    }
  }

  void work(int index, unsigned seen) {
    for (;;) {
      const auto until = std::chrono::steady_clock::now() + kSpin;
      while (ticket_.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) relax();
      if (ticket_.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(sleep_);
        wake_.wait(lock, [&] { return ticket_.load(std::memory_order_acquire) != seen; });
      }
      ++seen;  // the caller waits for every worker, so no ticket is ever missed
      if (index < helpers_) body_(data_);
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::mutex turn_;
  std::mutex sleep_;
  std::condition_variable wake_;
  std::atomic<unsigned> ticket_{0};
  std::atomic<int> pending_{0};
  int workers_ = 0;
  int helpers_ = 0;
  void (*body_)(void*) = nullptr;
  void* data_ = nullptr;
};

std::mutex made;
std::atomic<Pool*> pool{nullptr};
std::atomic<GompParallel> openmp{nullptr};

#ifndef _WIN32
// In a forked child the threads are gone, the pool's and OpenMP's both: start over with a pool of our own.
void before_fork() { made.lock(); }
void after_fork_parent() { made.unlock(); }
void after_fork_child() {
  pool.store(nullptr);
  openmp.store(nullptr);
  made.unlock();
}
const int registered = pthread_atfork(before_fork, after_fork_parent, after_fork_child);
#endif

Pool& own_pool() {
  Pool* found = pool.load(std::memory_order_acquire);
  if (found == nullptr) {
    std::lock_guard<std::mutex> lock(made);
    found = pool.load(std::memory_order_relaxed);
    if (found == nullptr) pool.store(found = new Pool, std::memory_order_release);
  }
  return *found;
}

}  // namespace

void run_parallel(int threads, void (*body)(void*), void* data) {
  if (threads <= 1) return body(data);
  if (const GompParallel start = openmp.load()) return start(body, data, static_cast<unsigned>(threads), 0);
  own_pool().run(threads, body, data);
}

void use_openmp(GompParallel start) { openmp.store(start); }

}  // namespace sparsellm
