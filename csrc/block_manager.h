// Bookkeeping of a paged KV cache: which blocks hold which sequence. Knows nothing about tensors or devices.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

namespace thinktwice {

// A pool of `num_blocks` blocks of `block_size` tokens, shared by sequences through reference counts.
//
// A sequence is named by a handle, which is never used twice. A sequence grows in its last block, and that
// block is always its own: `fork` shares the full blocks only. Every block carries the policy version that
// its keys and values come from. Since they are computed from everything before them, a sequence grows under
// its own version alone.
//
// Wrong use (an unknown or released handle, one named twice in a call, a bad count) throws
// std::invalid_argument; a stale sequence, or a fork without the blocks for it, std::runtime_error. Either
// leaves everything as it was.
class BlockManager {
 public:
  struct ForkResult {
    std::vector<int64_t> handles;
    std::vector<std::pair<int64_t, int64_t>> copies;  // (from, to) blocks whose data the caller must copy
  };

  BlockManager(int64_t num_blocks, int64_t block_size);

  // A new, empty sequence.
  int64_t prefill();

  // Reserves counts[i] more tokens in sequence handles[i], all or nothing. Returns how many free blocks were
  // missing: 0 = done, otherwise nothing has changed.
  int64_t extend(const int64_t* handles, const int64_t* counts, int64_t n, int64_t version);

  // Takes the blocks that `extend` would take, and leaves the lengths as they are: what sequences may grow by
  // while nobody looks.
  int64_t take_ahead(const int64_t* handles, const int64_t* counts, int64_t n, int64_t version);

  // Gives back the blocks beyond the lengths of these sequences.
  void trim(const int64_t* handles, int64_t n);

  // n new sequences equal to `handle`, which stays, without blocks taken ahead. Takes n blocks if its last
  // block is partly filled, else none.
  ForkResult fork(int64_t handle, int64_t n);

  void release(const int64_t* handles, int64_t n);

  // Those of its tokens, then any that were taken ahead.
  const std::vector<int32_t>& blocks(int64_t handle) const { return find(handle).blocks; }
  int64_t length(int64_t handle) const { return find(handle).length; }
  // The policy version of the sequence; -1 while it is empty.
  int64_t version(int64_t handle) const;

  int64_t block_size() const { return block_size_; }
  int64_t num_blocks() const { return static_cast<int64_t>(ref_counts_.size()); }
  int64_t free_blocks() const { return static_cast<int64_t>(free_.size()); }
  const std::vector<int32_t>& ref_counts() const { return ref_counts_; }

 private:
  struct Sequence {
    std::vector<int32_t> blocks;
    int64_t length = 0;
    int64_t generation = 0;  // how often this place was given out; even = now free
    int64_t last_call = 0;   // number of the last call that named it, to notice one named twice
  };

  const Sequence& find(int64_t handle) const;
  Sequence& find(int64_t handle);
  void check_distinct(const int64_t* handles, int64_t n);
  int64_t blocks_for(int64_t tokens) const { return (tokens + block_size_ - 1) / block_size_; }
  int32_t take_block(int64_t version);
  void drop_block(int32_t block);

  int64_t block_size_;
  std::vector<int32_t> free_;
  std::vector<int32_t> ref_counts_;      // per block
  std::vector<int64_t> block_versions_;  // per block
  std::vector<Sequence> sequences_;
  std::vector<int64_t> free_sequences_;
  int64_t calls_ = 0;
};

}  // namespace thinktwice
