// A loop over independent blocks on a few threads, PyTorch's or our own (parallel.cpp).
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

// Calls work(arg) on this thread and, at the same time, on up to `helpers` others; returns when all that began are
// done.
void run_in_pool(int helpers, void (*work)(void *), void *arg);

// Calls f(begin, end) for consecutive blocks of 0..n on up to `threads` threads, the caller's among them, each with
// `worth` blocks or more to its share. Blocks are claimed one by one: a thread held up holds up no other. f must not
// throw.
template <class F>
void parallel_for(int64_t n, int64_t block, int threads, F f, int64_t worth = 2) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(block)) < n;) f(begin, std::min(begin + block, n));
  };
  int64_t shares = std::min<int64_t>(threads, n / block / worth);
  if (shares < 2) return work();
  run_in_pool(int(shares - 1), [](void *w) { (*static_cast<decltype(work) *>(w))(); }, &work);
}
