// The library's threads: one call runs a function on all of them, with barriers inside.
//
// A waiting thread spins for a bounded number of looks and then sleeps on a futex: the router and
// clients share the cores, and a thread that spins keeps them from running (notes/0004). The caller is
// thread 0. Between calls the other threads sleep, at once or after a while.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

namespace kg {

// A counter to wait at until somebody raises it.
class Gate {
 public:
  int value() const { return value_.load(std::memory_order_relaxed); }
  void wait(int old, int spins);
  // Spins for `limit_us` before it sleeps.
  void linger(int old, int limit_us);
  void open();

 private:
  bool spin(int old, int spins) const;
  void sleep(int old);

  alignas(64) std::atomic<int> value_{0};
  std::atomic<int> num_sleepers_{0};
};

class Pool {
 public:
  Pool(int num_threads, int spins, bool use_amx);
  ~Pool();

  const int num_threads;
  const bool use_amx;

  // `job(thread)` on every thread; returns when all are done. The other threads then stay awake for
  // the next job for `linger_us`.
  template <class Job>
  void run(Job& job, int linger_us = 0) {
    linger_us_ = linger_us;
    start([](void* context, int thread) { (*(Job*)context)(thread); }, &job);
  }
  // Within a job: returns when all threads have come here.
  void barrier();

 private:
  using Call = void (*)(void*, int);
  void start(Call call, void* context);
  void serve(int thread);

  const int spins_;
  Call call_ = nullptr;
  void* context_ = nullptr;
  int linger_us_ = 0;
  bool stop_ = false;
  Gate round_;  // counts jobs
  Gate phase_;  // counts barriers passed
  alignas(64) std::atomic<int> arrived_{0};  // at the present barrier
  std::vector<std::thread> threads_;  // last: they use all of the above
};

}  // namespace kg

struct kg_pool : kg::Pool {
  using Pool::Pool;
};
