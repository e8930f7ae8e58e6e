// Running one function on several threads.
#pragma once

namespace sparsellm {

// Calls body(data) on the calling thread and on up to `threads - 1` others, and returns when all calls have. The body
// must share the work out by itself (it takes pieces until none is left), so fewer threads than asked for are no error.
void run_parallel(int threads, void (*body)(void*), void* data);

// OpenMP's GOMP_parallel as found in the library that torch computes with, or null. With it the kernels run on torch's
// own threads: a second pool would compete with those, which spin for a while after each of torch's operations.
using GompParallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void use_openmp(GompParallel start);

// "openmp" or "own".
const char* pool_name();

}  // namespace sparsellm
