// Group-relative advantages; the definition stands in kernels/thinktwice_kernels/reference/advantages.py.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <unordered_map>
#include <vector>

#include "loss/options.h"

namespace thinktwice {

struct Group {
  double lowest = std::numeric_limits<double>::infinity();
  double total = 0.0;    // of the rewards above the lowest
  double squares = 0.0;  // of the deviations from the mean
  int64_t size = 0;

  double mean() const { return total / static_cast<double>(size); }
  double deviation() const {
    return std::sqrt(squares / static_cast<double>(std::max<int64_t>(size - 1, 1)));
  }
};

inline Group batch_of(const std::vector<double>& rewards) {
  Group batch;
  batch.size = static_cast<int64_t>(rewards.size());
  for (const double reward : rewards) batch.total += reward;
  for (const double reward : rewards) batch.squares += (reward - batch.mean()) * (reward - batch.mean());
  return batch;
}

// Replaces each reward by its advantage. Where all rewards of a group are equal, that is exactly 0.
inline void to_advantages(std::vector<double>& rewards, const int64_t* ids, ScaleRewards scale, double eps) {
  std::vector<Group> groups;
  std::vector<size_t> group_of(rewards.size());
  std::unordered_map<int64_t, size_t> known;
  for (size_t i = 0; i < rewards.size(); ++i) {
    const auto found = known.try_emplace(ids[i], groups.size());
    if (found.second) groups.emplace_back();
    group_of[i] = found.first->second;
    Group& group = groups[group_of[i]];
    ++group.size;
    if (rewards[i] < group.lowest) group.lowest = rewards[i];
  }
  const double batch_spread = scale == ScaleRewards::kBatch ? batch_of(rewards).deviation() + eps : 1.0;
  for (size_t i = 0; i < rewards.size(); ++i)
    groups[group_of[i]].total += rewards[i] -= groups[group_of[i]].lowest;
  for (size_t i = 0; i < rewards.size(); ++i) {
    rewards[i] -= groups[group_of[i]].mean();
    groups[group_of[i]].squares += rewards[i] * rewards[i];
  }
  for (size_t i = 0; i < rewards.size(); ++i)
    rewards[i] /= scale == ScaleRewards::kGroup ? groups[group_of[i]].deviation() + eps : batch_spread;
}

}  // namespace thinktwice
