// The threads of parallel_for: those of PyTorch's OpenMP library, or a pool of our own.
//
// After each of PyTorch's own loops its threads spin for some milliseconds. A separate pool then gets only half of a
// core. On 2 cores, alternating with eager code, 64 x 320 010 of trajectory_distance took 7.1 ms in a pool of our own.
//
// OpenMP hangs in a forked child, so a child uses the pool. The pool starts at its first use and sleeps between calls.
// Its threads are detached: they do not block the exit of the interpreter, and a forked child creates a new pool.
#include "common/parallel.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace {

struct Pool {
  std::atomic<bool> busy{false};  // it serves one caller at a time
  std::mutex mutex;               // guards everything below; `running` may be read without it
  std::condition_variable posted, finished;
  void (*work)(void *) = nullptr;
  void *arg = nullptr;
  int open = 0;                 // places in the current call that no thread has claimed yet
  std::atomic<int> running{0};  // threads that work on the call, without the caller
  int size = 0, asleep = 0;
};

// The function GOMP_parallel is part of libgomp's stable ABI. LLVM's libomp has it, too.
using GompParallel = void(void (*work)(void *), void *arg, unsigned threads, unsigned flags);

std::atomic<GompParallel *> openmp{nullptr};
std::atomic<Pool *> current{nullptr};

// In a forked child, neither OpenMP nor the parent's pool may be used.
void forget_threads() {
  openmp = nullptr;
  current = nullptr;
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, forget_threads);

// Waits for `ready`, at most as long as a thread takes to fall asleep and wake up. Returns whether it became true.
template <class Ready>
bool spin(Ready ready) {
  using clock = std::chrono::steady_clock;
  auto end = clock::now() + std::chrono::microseconds(20);
  while (!ready()) {
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
    pool.open--;
    pool.running++;
    auto *work = pool.work;
    void *arg = pool.arg;
    lock.unlock();
    work(arg);
    lock.lock();
    if (--pool.running == 0) pool.finished.notify_one();
  }
}

// Starts a thread of the pool. Returns false if the system gives no more threads.
bool start_thread(Pool &pool) {
  try {
    std::thread(serve, std::ref(pool)).detach();
    return true;
  } catch (const std::exception &) {
    return false;
  }
}

// Starts threads up to `size`, or as many as the system gives. They block all signals, so that signals go to the
// threads that Python knows of.
void grow(Pool &pool, int size) {
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  while (pool.size < size && start_thread(pool)) pool.size++;
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
}

// A pool is never deleted: its threads may outlive every static object, and a forked child cannot know the state of
// its parent's pool.
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

void set_openmp(uintptr_t address) { openmp = reinterpret_cast<GompParallel *>(address); }

std::string thread_pool() { return openmp.load() ? "openmp" : "pool"; }

void run_on_threads(int team, int shares, void (*work)(void *), void *arg) {
  if (GompParallel *parallel = openmp) return parallel(work, arg, unsigned(team), 0);
  Pool &pool = pool_of_this_process();
  if (pool.busy.exchange(true)) return work(arg);  // another thread's call uses the pool: this thread works alone
  {
    std::lock_guard<std::mutex> lock(pool.mutex);
    if (pool.size < shares - 1) grow(pool, shares - 1);
    pool.work = work;
    pool.arg = arg;
    pool.open = std::min(shares - 1, pool.size);
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
  pool.busy = false;
}
