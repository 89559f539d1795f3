// The threads of parallel_for: those of PyTorch's OpenMP where they are to be had, else a pool of our own.
//
// After each of PyTorch's own loops its threads spin for some milliseconds, so that a pool beside them gets half of a
// core: on 2 cores, taking turns with eager code, 64 x 320 010 of trajectory_distance took 7.1 ms in a pool of our own.
//
// OpenMP hangs in a forked child. Our own pool starts when first asked for and sleeps between calls; nothing ever joins
// its threads, so that they hold up neither the interpreter's exit nor, since a forked child makes a pool of its own,
// anything after a fork.
#include "common/parallel.h"

#include <dlfcn.h>
#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace {

struct Pool {
  std::atomic<bool> taken{false};  // by the one caller it serves at a time
  std::mutex mutex;                // of all below; `running` may be read without it
  std::condition_variable posted, finished;
  void (*work)(void *) = nullptr;
  void *arg = nullptr;
  int open = 0;                 // places in the present call that no thread has taken yet
  std::atomic<int> running{0};  // threads at work on it, without the caller
  int size = 0, asleep = 0;
};

std::atomic<Pool *> current{nullptr};
std::atomic<bool> forked{false};
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { current = nullptr, forked = true; });

// libgomp's entry into a parallel region, part of its stable ABI; LLVM's libomp has it too. PyTorch loads either
// globally.
using OpenMP = void(void (*work)(void *), void *arg, unsigned threads, unsigned flags);
OpenMP *openmp() {
  static auto *const found = reinterpret_cast<OpenMP *>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return forked ? nullptr : found;
}

// Waits for `ready`, but no longer than falling asleep and waking up would take; returns whether it came.
template <class Ready>
bool spin(Ready ready) {
  using clock = std::chrono::steady_clock;
  for (auto end = clock::now() + std::chrono::microseconds(20); !ready();) {
    if (clock::now() > end) return false;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  return true;
}

[[noreturn]] void serve(Pool &pool) {
  std::unique_lock<std::mutex> lock(pool.mutex);
  for (;;) {
    pool.asleep++;
    pool.posted.wait(lock, [&] { return pool.open > 0; });
    pool.asleep--;
    pool.open--, pool.running++;
    auto *work = pool.work;
    void *arg = pool.arg;
    lock.unlock();
    work(arg);
    lock.lock();
    if (--pool.running == 0) pool.finished.notify_one();
  }
}

// Signals go to the threads that Python knows of.
void grow(Pool &pool, int size) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  try {
    for (; pool.size < size; pool.size++) std::thread(serve, std::ref(pool)).detach();
  } catch (const std::system_error &) {
    // No more threads to be had: those that started, and the caller's, do the work.
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// A pool is never deleted: its threads may outlive every static object, and a forked child cannot tell what state its
// parent's was in.
Pool &pool_of_this_process() {
  Pool *pool = current;
  if (!pool) {
    auto *fresh = new Pool;
    if (current.compare_exchange_strong(pool, fresh))
      pool = fresh;
    else
      delete fresh;
  }
  return *pool;
}

}  // namespace

void run_in_pool(int helpers, void (*work)(void *), void *arg) {
  if (OpenMP *parallel = openmp()) return parallel(work, arg, unsigned(helpers) + 1, 0);
  Pool &pool = pool_of_this_process();
  if (pool.taken.exchange(true)) return work(arg);  // by a call on another thread: this one works alone
  {
    std::lock_guard<std::mutex> lock(pool.mutex);
    if (pool.size < helpers) grow(pool, helpers);
    pool.work = work, pool.arg = arg, pool.open = std::min(helpers, pool.size);
    for (int i = std::min(pool.open, pool.asleep); i > 0; i--) pool.posted.notify_one();
  }
  work(arg);
  {
    std::lock_guard<std::mutex> lock(pool.mutex);
    pool.open = 0;
  }
  if (!spin([&] { return pool.running == 0; })) {
    std::unique_lock<std::mutex> lock(pool.mutex);
    pool.finished.wait(lock, [&] { return pool.running == 0; });
  }
  pool.taken = false;
}
