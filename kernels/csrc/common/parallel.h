// Work sharing over torch's own thread pool, so that torch.set_num_threads holds here too.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace thinktwice {

// Calls body(i) for 0 <= i < n, on the threads as they become free: for tasks of uneven length. `grain` tasks
// are taken at a time. The body must not throw.
template <typename Body>
void parallel_tasks(int64_t n, int64_t grain, const Body& body) {
  const int64_t takes = (n + grain - 1) / grain;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), takes);
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t take = next++; take < takes; take = next++)
      for (int64_t i = take * grain; i < std::min(n, (take + 1) * grain); ++i) body(i);
  };
  if (workers <= 1)
    work(0, 1);
  else
    torch::stable::parallel_for(0, workers, 1, work);
}

}  // namespace thinktwice
