// A loop over independent blocks on a few threads: PyTorch's threads or a pool of our own (parallel.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <string>

// Uses the OpenMP library that has the function GOMP_parallel at this address; 0 means a pool of our own. Without a
// call of set_openmp, the pool is used.
void set_openmp(uintptr_t address);

// The threads that a parallel_for of this process uses now: "openmp" or "pool".
std::string thread_pool();

// Calls work(arg) on this thread and on other threads at the same time. Returns when all calls are done. OpenMP makes
// `team` calls, the pool at most `shares`. work must not throw.
//
// `team` must be PyTorch's number of threads: libgomp ends the threads that a smaller team leaves idle, and PyTorch's
// next loop starts them again. Idle members return at once.
void run_on_threads(int team, int shares, void (*work)(void *), void *arg);

// Calls body(begin, end) for consecutive blocks of 0..n on up to `threads` threads, the caller's among them. `threads`
// is PyTorch's number of threads, or 1. A loop with fewer than 2 * `blocks_per_thread` blocks runs on the caller's
// thread. Threads claim blocks one by one, so a delayed thread delays no other. Throws the first exception of `body`;
// the blocks that are not yet claimed are then skipped.
template <class Body>
void parallel_for(int64_t n, int64_t block, int threads, Body body, int64_t blocks_per_thread = 2) {
  struct Loop {
    Body &body;
    int64_t n, block;
    std::atomic<int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error;

    void run() {
      for (int64_t begin; !failed && (begin = next.fetch_add(block)) < n;) body(begin, std::min(begin + block, n));
    }
    void run_and_keep_error() noexcept {
      try {
        run();
      } catch (...) {
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  } loop{body, n, block};
  int shares = int(std::min<int64_t>(threads, n / block / blocks_per_thread));
  if (shares < 2) return loop.run();
  run_on_threads(threads, shares, [](void *arg) { static_cast<Loop *>(arg)->run_and_keep_error(); }, &loop);
  if (loop.error) std::rethrow_exception(loop.error);
}
