// A loop over independent blocks on a few threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <system_error>
#include <thread>
#include <vector>

// Calls f(begin, end) for consecutive blocks of 0..n on up to `threads` threads, the caller's among them. Threads live
// for one call, so nothing is left that a forked process would wait for; starting one takes about as long as a block
// should, hence eight blocks or more for each. Blocks are claimed one by one: a thread held up holds up no other.
template <class F> void parallel_for(int64_t n, int64_t block, int threads, F f) {
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t begin; (begin = next.fetch_add(block)) < n;) f(begin, std::min(begin + block, n));
  };
  std::vector<std::thread> helpers;
  try {
    for (int i = 1; i < threads && 8 * i * block < n; i++) helpers.emplace_back(work);
  } catch (const std::system_error &) {
    // No more threads to be had: those that started, and this one, do the work.
  }
  work();
  for (auto &helper : helpers) helper.join();
}
