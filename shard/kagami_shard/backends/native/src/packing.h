// Which row of a weight lies where in its panels, and who packs it.
#pragma once
#include <sched.h>

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

#include "panel.h"
#include "step.h"

namespace kg {

// The row of the weight that lies at row `packed` of the panels; -1: padding.
inline int64_t source_row(int64_t packed, int64_t rows, bool gated) {
  if (!gated) return packed < rows ? packed : -1;
  const int64_t panel = packed / kPanel, lane = packed % kPanel;
  const int64_t index = panel * kBlock + lane % kBlock;
  if (index >= rows / 2) return -1;
  return lane < kBlock ? index : rows / 2 + index;
}

constexpr int64_t kWorthThreads = 1 << 20;

// Cores that the process is not kept off.
inline int64_t num_cores() {
  cpu_set_t cores;
  return sched_getaffinity(0, sizeof cores, &cores) ? 1 : CPU_COUNT(&cores);
}

// `work(index)` for `count` panels or blocks of a weight of so many bytes: a large one is packed by
// a thread on each core, as far as threads are to be had.
template <class Work>
void on_all_cores(int64_t count, int64_t bytes, Work work) {
  const int64_t parts = bytes < kWorthThreads ? 1 : std::min(count, num_cores());
  const auto do_part = [=](int64_t part) {
    const Part indices = part_of(count, part, parts);
    for (int64_t index = indices.begin; index < indices.end; index++) work(index);
  };
  std::vector<std::thread> threads;
  int64_t part = 1;
  try {
    for (; part < parts; part++) threads.emplace_back(do_part, part);
  } catch (const std::system_error&) {  // the rest is for this one
  }
  for (; part < parts; part++) do_part(part);
  do_part(0);
  for (auto& thread : threads) thread.join();
}

}  // namespace kg
