#include "block_manager.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace thinktwice {
namespace {

constexpr int64_t kPlaces = int64_t{1} << 32;  // handle = generation * kPlaces + place

[[noreturn]] void misuse(const std::string& what) { throw std::invalid_argument("paged KV cache: " + what); }

}  // namespace

BlockManager::BlockManager(int64_t num_blocks, int64_t block_size) : block_size_(block_size) {
  if (num_blocks < 1 || num_blocks > std::numeric_limits<int32_t>::max() || block_size < 1)
    misuse("needs at least one block of one token, got " + std::to_string(num_blocks) + " blocks of " +
           std::to_string(block_size));
  ref_counts_.assign(num_blocks, 0);
  block_versions_.assign(num_blocks, 0);
  free_.reserve(num_blocks);
  for (int64_t block = num_blocks; block-- > 0;) free_.push_back(static_cast<int32_t>(block));
}

const BlockManager::Sequence& BlockManager::find(int64_t handle) const {
  const int64_t place = handle % kPlaces;
  if (handle < 0 || place >= static_cast<int64_t>(sequences_.size()))
    misuse("unknown sequence handle " + std::to_string(handle));
  const Sequence& sequence = sequences_[place];
  if (sequence.generation != handle / kPlaces || sequence.generation % 2 == 0)
    misuse("sequence handle " + std::to_string(handle) + " was released before");
  return sequence;
}

BlockManager::Sequence& BlockManager::find(int64_t handle) {
  return const_cast<Sequence&>(static_cast<const BlockManager*>(this)->find(handle));
}

void BlockManager::check_distinct(const int64_t* handles, int64_t n) {
  ++calls_;
  for (int64_t i = 0; i < n; ++i) {
    Sequence& sequence = find(handles[i]);
    if (sequence.last_call == calls_)
      misuse("sequence handle " + std::to_string(handles[i]) + " is named twice in one call");
    sequence.last_call = calls_;
  }
}

int32_t BlockManager::take_block(int64_t version) {
  const int32_t block = free_.back();
  free_.pop_back();
  ref_counts_[block] = 1;
  block_versions_[block] = version;
  return block;
}

void BlockManager::drop_block(int32_t block) {
  if (--ref_counts_[block] == 0) free_.push_back(block);
}

int64_t BlockManager::version(int64_t handle) const {
  const Sequence& sequence = find(handle);
  return sequence.blocks.empty() ? -1 : block_versions_[sequence.blocks.front()];
}

int64_t BlockManager::prefill() {
  if (free_sequences_.empty()) {
    free_sequences_.push_back(static_cast<int64_t>(sequences_.size()));
    sequences_.emplace_back();
  }
  const int64_t place = free_sequences_.back();
  free_sequences_.pop_back();
  return ++sequences_[place].generation * kPlaces + place;
}

int64_t BlockManager::extend(const int64_t* handles, const int64_t* counts, int64_t n, int64_t version) {
  const int64_t missing = take_ahead(handles, counts, n, version);
  for (int64_t i = 0; missing == 0 && i < n; ++i) find(handles[i]).length += counts[i];
  return missing;
}

int64_t BlockManager::take_ahead(const int64_t* handles, const int64_t* counts, int64_t n, int64_t version) {
  check_distinct(handles, n);
  const auto more = [&](int64_t i) {
    const Sequence& sequence = find(handles[i]);
    const int64_t held = static_cast<int64_t>(sequence.blocks.size());
    return std::max<int64_t>(0, blocks_for(sequence.length + counts[i]) - held);
  };
  int64_t needed = 0;
  for (int64_t i = 0; i < n; ++i) {
    const Sequence& sequence = find(handles[i]);
    if (counts[i] < 0 || counts[i] > std::numeric_limits<int32_t>::max() - sequence.length)
      misuse("cannot extend a sequence of " + std::to_string(sequence.length) + " tokens by " +
             std::to_string(counts[i]));
    if (!sequence.blocks.empty() && block_versions_[sequence.blocks.front()] != version)
      throw std::runtime_error(
          "paged KV cache: sequence handle " + std::to_string(handles[i]) +
          " was written by policy version " + std::to_string(block_versions_[sequence.blocks.front()]) +
          " and cannot be extended under version " + std::to_string(version) + "; prefill it anew");
    if (sequence.length % block_size_ != 0 && counts[i] > 0 &&
        ref_counts_[sequence.blocks[sequence.length / block_size_]] != 1)
      throw std::logic_error("paged KV cache: a partly filled block is shared");
    needed += more(i);
  }
  if (needed > free_blocks()) return needed - free_blocks();
  for (int64_t i = 0; i < n; ++i)
    for (int64_t left = more(i); left > 0; --left) find(handles[i]).blocks.push_back(take_block(version));
  return 0;
}

void BlockManager::trim(const int64_t* handles, int64_t n) {
  check_distinct(handles, n);
  for (int64_t i = 0; i < n; ++i) {
    Sequence& sequence = find(handles[i]);
    for (; static_cast<int64_t>(sequence.blocks.size()) > blocks_for(sequence.length);
         sequence.blocks.pop_back())
      drop_block(sequence.blocks.back());
  }
}

BlockManager::ForkResult BlockManager::fork(int64_t handle, int64_t n) {
  if (n < 0) misuse("cannot fork a sequence " + std::to_string(n) + " times");
  const bool has_tail = find(handle).length % block_size_ != 0;
  if (has_tail && n > free_blocks())
    throw std::runtime_error("paged KV cache: forking a sequence " + std::to_string(n) + " times takes " +
                             std::to_string(n) + " blocks, only " + std::to_string(free_blocks()) +
                             " are free");
  ForkResult result;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t child_handle = prefill();  // may move the sequences: look both up after it
    const Sequence& parent = find(handle);
    Sequence& child = find(child_handle);
    child.length = parent.length;
    child.blocks.assign(parent.blocks.begin(), parent.blocks.begin() + blocks_for(parent.length));
    for (const int32_t block : child.blocks) ++ref_counts_[block];
    if (has_tail) {
      const int32_t tail = child.blocks.back();
      drop_block(tail);
      child.blocks.back() = take_block(block_versions_[tail]);
      result.copies.emplace_back(tail, child.blocks.back());
    }
    result.handles.push_back(child_handle);
  }
  return result;
}

void BlockManager::release(const int64_t* handles, int64_t n) {
  check_distinct(handles, n);
  for (int64_t i = 0; i < n; ++i) {
    Sequence& sequence = find(handles[i]);
    for (const int32_t block : sequence.blocks) drop_block(block);
    sequence.blocks.clear();
    sequence.length = 0;
    ++sequence.generation;
    free_sequences_.push_back(handles[i] % kPlaces);
  }
}

}  // namespace thinktwice
