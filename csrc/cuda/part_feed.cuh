// The parts that a block works on, one after the other, with three of them known at a time: the copies of a
// part's first keys and values start while the part before it is still worked on, so that between two parts
// nothing is waited for. The block's chunks are one stream, each copied kAhead chunks before it is needed.
#pragma once

#include "cuda/mma.cuh"
#include "cuda/rows.cuh"
#include "cuda/tile_memory.cuh"

namespace thinktwice::gpu {

// Memory: a TileMemory. Source: its next() gives one part after the other, from the end on ones without rows
// or keys.
template <typename Memory, typename Source>
class PartFeed {
 public:
  int place = 0;  // in the memory's rings, of the stream's current chunk

  __device__ PartFeed(const Attention& attention, Memory& block_memory, const Source& parts)
      : a(attention), memory(block_memory), source(parts) {
    aim(find(0));
    __syncthreads();
    start_copies(0);
    const KeyRange second = find(1);
    find(2);
    __syncthreads();
    if (lead == 1) aim(second);  // nothing was known of it when the copies came to it
#pragma unroll
    for (int i = 1; i < Memory::kAhead; ++i) start_copies(i);
  }

  // The next part's rows are known too.
  __device__ const KnownPart& current() const { return memory.parts[ring(0)]; }
  __device__ const KnownPart& next() const { return memory.parts[ring(1)]; }

  // Goes on to the next part. All threads have passed a barrier since the current one's keys were read.
  __device__ void advance() {
    first = ring(1);
    --lead;
    const KeyRange last = find(kLast);
    if (lead == kLast && !copies_left()) aim(last);
  }

  // Start the copy of keys or values, one group, to where those of the stream's current chunk were. Copies
  // are counted, so there is a group even where nothing is left.
  __device__ void copy_keys() const { copy(memory.keys[place], a.k_cache); }
  __device__ void copy_values() {
    copy(memory.values[place], a.v_cache);
    step();
    place = (place + 1) % Memory::kAhead;
  }

 private:
  static constexpr int kLast = 2;  // of the parts that are known, counted from the current one

  const Attention& a;
  Memory& memory;
  Source source;
  int first = 0;  // in the ring of parts, the current one
  // The chunk that is copied next begins at `start`; it belongs to the part that comes so many after the
  // current one. Nothing is left to copy, or that part is not known yet, where `start` is not below `end`.
  int lead = 0, start = 0, end = 0;

  __device__ int ring(int later) const { return (first + later) % Memory::kParts; }

  __device__ KeyRange find(int later) {
    const KnownPart found = source.next();
    if (found.exists())
      find_keys(a, found.rows, found.keys.first / kSplit * kSplit, found.keys, memory.offsets[ring(later)]);
    if (threadIdx.x == 0) memory.parts[ring(later)] = found;
    return found.keys;
  }

  __device__ bool copies_left() const { return start < end; }

  __device__ void aim(KeyRange keys) {
    start = keys.first / kChunk * kChunk;
    end = keys.end;
  }

  __device__ void step() {
    if (!copies_left()) return;
    start += kChunk;
    if (copies_left()) return;
    ++lead;
    aim(lead <= kLast ? memory.parts[ring(lead)].keys : KeyRange{0, 0});
  }

  __device__ void copy(typename Memory::Chunk& to, const void* cache) const {
    if (copies_left()) copy_chunk<Memory>(a, to, cache, &memory.offsets[ring(lead)][start % kSplit]);
    commit_copies();
  }

  __device__ void start_copies(int to) {
    copy(memory.keys[to], a.k_cache);
    copy(memory.values[to], a.v_cache);
    step();
  }
};

}  // namespace thinktwice::gpu
