// Running one function on several threads.
#pragma once

#include <atomic>
#include <cstdint>

namespace sparsellm {

// Calls body(data) on the calling thread and on up to `threads - 1` others, and returns when all calls have. The body
// must share the work out by itself (it takes pieces until none is left), so fewer threads than asked for are no error.
void run_parallel(int threads, void (*body)(void*), void* data);

// Calls use(index) for every index below `count`, on several threads.
template <class Use>
void for_each(int threads, int64_t count, const Use& use) {
  struct Shared {
    int64_t count;
    const Use& use;
    std::atomic<int64_t> next{0};
  } shared{count, use};
  run_parallel(
      threads,
      [](void* data) noexcept {  // without memory the process ends: nothing could catch an exception of a worker
        Shared& mine = *static_cast<Shared*>(data);
        for (int64_t index; (index = mine.next.fetch_add(1)) < mine.count;) mine.use(index);
      },
      &shared);
}

// OpenMP's GOMP_parallel as found in the library that torch computes with, or null. With it the kernels run on torch's
// own threads: a second pool would compete with those, which spin for a while after each of torch's operations.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void use_openmp(GompParallel start);

}  // namespace sparsellm
