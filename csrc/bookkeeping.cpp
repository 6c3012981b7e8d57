// The block manager as ops: a registry of caches by number, and the plan of each forward pass.
#include "bookkeeping.h"

#include <algorithm>
#include <memory>
#include <mutex>
#include <numeric>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "common/tensor_utils.h"

namespace thinktwice {
namespace {

// Python releases its interpreter lock while an op runs, so the registry has one of its own.
std::mutex mutex;
std::unordered_map<int64_t, std::unique_ptr<BlockManager>> caches;
int64_t next_cache = 1;

BlockManager& find_cache(int64_t cache) {
  const auto found = caches.find(cache);
  check(found != caches.end(), "paged KV cache: cache ", cache, " does not exist or was closed");
  return *found->second;
}

int64_t create(int64_t num_blocks, int64_t block_size) {
  auto manager = std::make_unique<BlockManager>(num_blocks, block_size);
  const std::lock_guard<std::mutex> lock(mutex);
  caches.emplace(next_cache, std::move(manager));
  return next_cache++;
}

void destroy(int64_t cache) {
  const std::lock_guard<std::mutex> lock(mutex);
  find_cache(cache);
  caches.erase(cache);
}

int64_t prefill(int64_t cache) {
  const std::lock_guard<std::mutex> lock(mutex);
  return find_cache(cache).prefill();
}

Tensor int_tensor(const std::vector<int32_t>& values) {
  Tensor tensor = new_tensor({static_cast<int64_t>(values.size())}, ScalarType::Int);
  std::copy(values.begin(), values.end(), tensor.mutable_data_ptr<int32_t>());
  return tensor;
}

using Blocks = std::vector<int32_t>;

int64_t common_blocks(const Blocks& a, const Blocks& b) {
  const auto end = a.begin() + static_cast<int64_t>(std::min(a.size(), b.size()));
  return std::mismatch(a.begin(), end, b.begin()).first - a.begin();
}

struct Groups {
  std::vector<int32_t> offsets, shared_blocks;
};

// Neighbours that share so many keys or more at their start, in whole blocks, are a group, and so are those
// between that share nothing. No groups where nobody shares, nor for 0 keys.
Groups find_groups(const BlockManager& manager, const int64_t* handles, int64_t n, int64_t shared_keys) {
  if (shared_keys == 0) return {};
  const int64_t least = (shared_keys + manager.block_size() - 1) / manager.block_size();
  Groups groups;
  bool any = false;
  for (int64_t first = 0, end; first < n; first = end) {
    end = first + 1;
    const Blocks& blocks = manager.blocks(handles[first]);
    const int64_t shared = end < n ? common_blocks(blocks, manager.blocks(handles[end])) : 0;
    const bool shares = shared >= least;
    while (shares && end < n && common_blocks(blocks, manager.blocks(handles[end])) >= shared) ++end;
    any |= shares;
    if (!shares && !groups.offsets.empty() && groups.shared_blocks.back() == 0) continue;
    groups.offsets.push_back(static_cast<int32_t>(first));
    groups.shared_blocks.push_back(shares ? static_cast<int32_t>(shared) : 0);
  }
  if (!any) return {};
  groups.offsets.push_back(static_cast<int32_t>(n));
  return groups;
}

// [n, blocks of the longest], padded with 0.
Tensor make_tables(const BlockManager& manager, const int64_t* handles, int64_t n) {
  size_t width = 1;
  for (int64_t i = 0; i < n; ++i) width = std::max(width, manager.blocks(handles[i]).size());
  Tensor block_tables = new_tensor({n, static_cast<int64_t>(width)}, ScalarType::Int);
  auto* table = block_tables.mutable_data_ptr<int32_t>();
  for (int64_t i = 0; i < n; ++i, table += width) {
    const Blocks& blocks = manager.blocks(handles[i]);
    std::fill(std::copy(blocks.begin(), blocks.end(), table), table + width, 0);
  }
  return block_tables;
}

using Plan = std::tuple<int64_t, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// `shared_keys`: how many keys decoding sequences must share to be a group; 0 = no groups.
Plan make_plan(const BlockManager& manager, const int64_t* handles, const int64_t* counts, int64_t n,
               int64_t shared_keys) {
  const int64_t tokens = std::accumulate(counts, counts + n, int64_t{0});
  Tensor block_tables = make_tables(manager, handles, n);
  Tensor context_lens = new_tensor({n}, ScalarType::Int);
  Tensor cu_seqlens_q = new_tensor({n + 1}, ScalarType::Int);
  Tensor positions = new_tensor({tokens}, ScalarType::Long);
  Tensor slots = new_tensor({tokens}, ScalarType::Long);
  auto* lens = context_lens.mutable_data_ptr<int32_t>();
  auto* starts = cu_seqlens_q.mutable_data_ptr<int32_t>();
  auto* position = positions.mutable_data_ptr<int64_t>();
  auto* slot = slots.mutable_data_ptr<int64_t>();
  const int64_t size = manager.block_size();
  starts[0] = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Blocks& blocks = manager.blocks(handles[i]);
    const int64_t length = manager.length(handles[i]);
    lens[i] = static_cast<int32_t>(length);
    starts[i + 1] = starts[i] + static_cast<int32_t>(counts[i]);
    for (int64_t p = length - counts[i]; p < length; ++p) {
      *position++ = p;
      *slot++ = blocks[p / size] * size + p % size;
    }
  }
  Groups groups;
  if (std::all_of(counts, counts + n, [](int64_t count) { return count == 1; }))
    groups = find_groups(manager, handles, n, shared_keys);
  return {0,
          block_tables,
          context_lens,
          cu_seqlens_q,
          positions,
          slots,
          int_tensor(groups.offsets),
          int_tensor(groups.shared_blocks)};
}

Plan extend(int64_t cache, Tensor handles, Tensor counts, int64_t version, int64_t shared_keys) {
  const int64_t n = handles.numel();
  check_vector(handles, "handles", ScalarType::Long, n);
  check_vector(counts, "counts", ScalarType::Long, n);
  const auto* handle = handles.const_data_ptr<int64_t>();
  const auto* count = counts.const_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(mutex);
  BlockManager& manager = find_cache(cache);
  const int64_t missing = manager.extend(handle, count, n, version);
  if (missing == 0) return make_plan(manager, handle, count, n, shared_keys);
  const Tensor none = new_tensor({0}, ScalarType::Int);
  return {missing, none, none, none, none, none, none, none};
}

std::tuple<int64_t, Tensor, Tensor, Tensor> take_ahead(int64_t cache, Tensor handles, Tensor counts,
                                                       int64_t version, int64_t shared_keys) {
  const int64_t n = handles.numel();
  check_vector(handles, "handles", ScalarType::Long, n);
  check_vector(counts, "counts", ScalarType::Long, n);
  const auto* handle = handles.const_data_ptr<int64_t>();
  const std::lock_guard<std::mutex> lock(mutex);
  BlockManager& manager = find_cache(cache);
  const int64_t missing = manager.take_ahead(handle, counts.const_data_ptr<int64_t>(), n, version);
  const Groups groups = find_groups(manager, handle, n, shared_keys);
  return {missing, make_tables(manager, handle, n), int_tensor(groups.offsets),
          int_tensor(groups.shared_blocks)};
}

void trim(int64_t cache, Tensor handles) {
  check_vector(handles, "handles", ScalarType::Long, handles.numel());
  const std::lock_guard<std::mutex> lock(mutex);
  find_cache(cache).trim(handles.const_data_ptr<int64_t>(), handles.numel());
}

std::tuple<Tensor, Tensor> fork(int64_t cache, int64_t handle, int64_t n) {
  const std::lock_guard<std::mutex> lock(mutex);
  const BlockManager::ForkResult forked = find_cache(cache).fork(handle, n);
  Tensor handles = new_tensor({static_cast<int64_t>(forked.handles.size())}, ScalarType::Long);
  Tensor pairs = new_tensor({static_cast<int64_t>(forked.copies.size()), 2}, ScalarType::Long);
  std::copy(forked.handles.begin(), forked.handles.end(), handles.mutable_data_ptr<int64_t>());
  auto* pair = pairs.mutable_data_ptr<int64_t>();
  for (const auto& [from, to] : forked.copies) {
    *pair++ = from;
    *pair++ = to;
  }
  return {handles, pairs};
}

void release(int64_t cache, Tensor handles) {
  check_vector(handles, "handles", ScalarType::Long, handles.numel());
  const std::lock_guard<std::mutex> lock(mutex);
  find_cache(cache).release(handles.const_data_ptr<int64_t>(), handles.numel());
}

int64_t free_blocks(int64_t cache) {
  const std::lock_guard<std::mutex> lock(mutex);
  return find_cache(cache).free_blocks();
}

Tensor ref_counts(int64_t cache) {
  const std::lock_guard<std::mutex> lock(mutex);
  return int_tensor(find_cache(cache).ref_counts());
}

std::tuple<int64_t, int64_t, Tensor> sequence(int64_t cache, int64_t handle) {
  const std::lock_guard<std::mutex> lock(mutex);
  const BlockManager& manager = find_cache(cache);
  return {manager.length(handle), manager.version(handle), int_tensor(manager.blocks(handle))};
}

}  // namespace

void with_cache(int64_t cache, const std::function<void(BlockManager&)>& use) {
  const std::lock_guard<std::mutex> lock(mutex);
  use(find_cache(cache));
}

}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CompositeExplicitAutograd, m) {
  m.impl("cache_create", TORCH_BOX(&thinktwice::create));
  m.impl("cache_destroy", TORCH_BOX(&thinktwice::destroy));
  m.impl("cache_prefill", TORCH_BOX(&thinktwice::prefill));
  m.impl("cache_extend", TORCH_BOX(&thinktwice::extend));
  m.impl("cache_take_ahead", TORCH_BOX(&thinktwice::take_ahead));
  m.impl("cache_trim", TORCH_BOX(&thinktwice::trim));
  m.impl("cache_fork", TORCH_BOX(&thinktwice::fork));
  m.impl("cache_release", TORCH_BOX(&thinktwice::release));
  m.impl("cache_free_blocks", TORCH_BOX(&thinktwice::free_blocks));
  m.impl("cache_ref_counts", TORCH_BOX(&thinktwice::ref_counts));
  m.impl("cache_sequence", TORCH_BOX(&thinktwice::sequence));
}
