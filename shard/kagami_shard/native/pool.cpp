#include "pool.h"

#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "ops.h"
#include "panel.h"

namespace kg {

void Gate::wait(int old, int spins) {
  for (int i = 0; i < spins; i++) {
    if (value_.load(std::memory_order_acquire) != old) return;
    _mm_pause();
  }
  // A sleeper is counted before the kernel compares the value, an opener changes the value before
  // it looks for sleepers: one of them sees the other.
  num_sleepers_.fetch_add(1);
  while (value_.load() == old)
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  num_sleepers_.fetch_sub(1);
}

void Gate::open() {
  value_.fetch_add(1);
  if (num_sleepers_.load() > 0)
    syscall(SYS_futex, &value_, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
}

Pool::Pool(int num_threads, int spins, bool use_amx)
    : num_threads(num_threads), use_amx(use_amx), spins_(spins) {
  for (int thread = 1; thread < num_threads; thread++)
    threads_.emplace_back([this, thread] { serve(thread); });
}

Pool::~Pool() {
  stop_ = true;
  round_.open();
  for (auto& thread : threads_) thread.join();
}

void Pool::serve(int thread) {
  for (int seen = 0;; seen++) {
    round_.wait(seen, 0);
    if (stop_) return;
    call_(context_, thread);
    if (use_amx) release_tiles();
    barrier();
  }
}

void Pool::start(Call call, void* context) {
  call_ = call;
  context_ = context;
  round_.open();
  call(context, 0);
  if (use_amx) release_tiles();
  barrier();
}

void Pool::barrier() {
  if (num_threads == 1) return;
  const int phase = phase_.value();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 < num_threads) {
    phase_.wait(phase, spins_);
    return;
  }
  arrived_.store(0, std::memory_order_relaxed);
  phase_.open();
}

}  // namespace kg

extern "C" kg_pool* kg_pool_new(int num_threads, int spins, int use_amx) {
  return new kg_pool(num_threads, spins, use_amx != 0);
}

extern "C" void kg_pool_delete(kg_pool* pool) { delete pool; }
