#include "pool.h"

#include <immintrin.h>
#include <limits.h>
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>

#include "ops.h"
#include "panel.h"

namespace kg {
namespace {
constexpr int kLooksAtATime = 100;  // some microseconds
}

bool Gate::spin(int old, int spins) const {
  for (int i = 0; i < spins; i++) {
    if (value_.load(std::memory_order_acquire) != old) return true;
    _mm_pause();
  }
  return false;
}

void Gate::sleep(int old) {
  // A sleeper is counted before the kernel compares the value, an opener changes the value before
  // it looks for sleepers: one of them sees the other.
  num_sleepers_.fetch_add(1);
  while (value_.load() == old)
    syscall(SYS_futex, &value_, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
  num_sleepers_.fetch_sub(1);
}

void Gate::wait(int old, int spins) {
  if (!spin(old, spins)) sleep(old);
}

void Gate::linger(int old, int limit_us) {
  using Clock = std::chrono::steady_clock;
  if (!limit_us) return sleep(old);
  const auto end = Clock::now() + std::chrono::microseconds(limit_us);
  while (!spin(old, kLooksAtATime))
    if (Clock::now() >= end) return sleep(old);
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
  for (int seen = 0, linger_us = 0;; seen++) {
    round_.linger(seen, linger_us);
    if (stop_) return;
    linger_us = linger_us_;  // behind the barrier the next job may change it
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
