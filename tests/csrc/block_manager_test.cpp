// Random sequences of calls on the block manager, held against a plain model of who owns which block; built
// with the address and undefined-behaviour sanitizers and run by test_native.py.
#include "block_manager.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <stdexcept>

using thinktwice::BlockManager;

#define REQUIRE(condition)                                               \
  if (!(condition)) {                                                    \
    std::fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #condition); \
    std::exit(1);                                                        \
  }

template <typename Error, typename Call>
bool throws(const Call& call) {
  try {
    call();
  } catch (const Error&) {
    return true;
  }
  return false;
}

struct Expected {
  int64_t length;
  int64_t version;
  int64_t held;  // blocks, those taken ahead among them
};

int64_t blocks_for(const BlockManager& manager, int64_t tokens) {
  return (tokens + manager.block_size() - 1) / manager.block_size();
}

void check_against(const BlockManager& manager, const std::map<int64_t, Expected>& live) {
  std::vector<int32_t> references(manager.num_blocks(), 0);
  for (const auto& [handle, expected] : live) {
    REQUIRE(manager.length(handle) == expected.length);
    REQUIRE(manager.version(handle) == (expected.held == 0 ? -1 : expected.version));
    REQUIRE(static_cast<int64_t>(manager.blocks(handle).size()) == expected.held);
    for (const int32_t block : manager.blocks(handle)) ++references[block];
  }
  REQUIRE(references == manager.ref_counts());
  int64_t unused = 0;
  for (const int32_t count : references) unused += count == 0;
  REQUIRE(unused == manager.free_blocks());
  for (const auto& [handle, expected] : live)
    for (int64_t own = expected.length / manager.block_size(); own < expected.held; ++own)
      REQUIRE(references[manager.blocks(handle)[own]] == 1);
}

void random_calls(uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&random](int64_t n) { return static_cast<int64_t>(random() % n); };
  BlockManager manager(1 + below(40), 1 + below(9));
  std::map<int64_t, Expected> live;
  std::vector<int64_t> released;
  int64_t version = 0;
  const auto pick = [&] { return std::next(live.begin(), below(live.size()))->first; };
  for (int step = 0; step < 400; ++step) {
    const int64_t free_before = manager.free_blocks();
    const int64_t action = below(12);
    if (live.empty() || action < 2) {
      const int64_t handle = manager.prefill();
      REQUIRE(live.emplace(handle, Expected{0, 0, 0}).second);
    } else if (action < 6) {
      std::vector<int64_t> handles, counts;
      bool stale = false;
      for (const auto& [handle, expected] : live)
        if (below(2)) {
          handles.push_back(handle);
          counts.push_back(below(12));
          stale |= expected.held > 0 && expected.version != version;
        }
      const bool ahead = below(3) == 0;
      const auto extend = [&] {
        return ahead ? manager.take_ahead(handles.data(), counts.data(), handles.size(), version)
                     : manager.extend(handles.data(), counts.data(), handles.size(), version);
      };
      if (stale) {
        REQUIRE(throws<std::runtime_error>(extend));
      } else if (extend() > 0) {
        REQUIRE(manager.free_blocks() == free_before);
      } else {
        for (size_t i = 0; i < handles.size(); ++i) {
          Expected& expected = live[handles[i]];
          if (expected.held == 0) expected.version = version;
          expected.held = std::max(expected.held, blocks_for(manager, expected.length + counts[i]));
          if (!ahead) expected.length += counts[i];
        }
      }
    } else if (action < 8) {
      const int64_t handle = pick(), n = below(5);
      const bool fits = live[handle].length % manager.block_size() == 0 || n <= free_before;
      if (fits)
        for (const int64_t child : manager.fork(handle, n).handles) {
          live[child] = live[handle];
          live[child].held = blocks_for(manager, live[child].length);
        }
      else
        REQUIRE(throws<std::runtime_error>([&] { manager.fork(handle, n); }));
    } else if (action < 9) {
      const int64_t handle = pick();
      manager.release(&handle, 1);
      live.erase(handle);
      released.push_back(handle);
    } else if (action < 11) {
      const int64_t handle = pick();
      manager.trim(&handle, 1);
      live[handle].held = blocks_for(manager, live[handle].length);
    } else {
      ++version;
    }
    check_against(manager, live);
  }
  for (const int64_t handle : released) {
    REQUIRE(throws<std::invalid_argument>([&] { manager.release(&handle, 1); }));
    REQUIRE(throws<std::invalid_argument>([&] { manager.fork(handle, 1); }));
  }
  while (!live.empty()) {
    const int64_t handle = live.begin()->first;
    manager.release(&handle, 1);
    live.erase(handle);
  }
  REQUIRE(manager.free_blocks() == manager.num_blocks());
}

int main() {
  for (uint32_t seed = 0; seed < 100; ++seed) random_calls(seed);
  const int64_t unknown = 7;
  BlockManager manager(4, 2);
  REQUIRE(throws<std::invalid_argument>([&] { manager.release(&unknown, 1); }));
  const int64_t handle = manager.prefill();
  const int64_t pair[] = {handle, handle}, counts[] = {1, 1}, negative[] = {-1};
  REQUIRE(throws<std::invalid_argument>([&] { manager.release(pair, 2); }));
  REQUIRE(throws<std::invalid_argument>([&] { manager.extend(pair, counts, 2, 0); }));
  REQUIRE(throws<std::invalid_argument>([&] { manager.extend(pair, negative, 1, 0); }));
  REQUIRE(throws<std::invalid_argument>([] { BlockManager(0, 16); }));
  return 0;
}
