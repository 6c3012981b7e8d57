// What csrc/cuda/mma.cuh does by single instructions, after their description in the PTX manual. A copy
// arrives only when it is waited for, so that reading too early shows; when the threads go backwards it
// arrives at once, so that overwriting too early does.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <vector>

namespace thinktwice::gpu {

struct Copy {
  void* to;
  const void* from;
  bool used;
};

struct Copies {
  std::vector<Copy> open;
  std::vector<std::vector<Copy>> groups;
};

inline std::map<int, Copies> copies;  // by thread

inline Copies& own_copies() { return copies[emulated::block->current]; }

inline void finish(const Copy& copy) {
  if (copy.used)
    std::memcpy(copy.to, copy.from, 16);
  else
    std::memset(copy.to, 0, 16);
}

inline void copy_async(void* to, const void* from, bool used) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || (used && reinterpret_cast<uintptr_t>(from) % 16)) std::abort();
  if (emulated::backwards)
    finish({to, from, used});
  else
    own_copies().open.push_back({to, from, used});
}

inline void commit_copies() {
  own_copies().groups.push_back(std::move(own_copies().open));
  own_copies().open.clear();
}

template <size_t kNewest>
void wait_for_all_but() {
  auto& groups = own_copies().groups;
  for (; groups.size() > kNewest; groups.erase(groups.begin()))
    for (const Copy& copy : groups.front()) finish(copy);
}

inline void load_rows(uint32_t (&to)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16) std::abort();
  const int lane = emulated::lane();
  emulated::from_warp(row, [&](const auto& shown) {
    for (int matrix = 0; matrix < 4; ++matrix) {
      uint16_t pair[2];
      for (int i = 0; i < 2; ++i) {
        const int r = transposed ? lane % 4 * 2 + i : lane / 4,
                  column = transposed ? lane / 4 : lane % 4 * 2 + i;
        pair[i] = static_cast<const uint16_t*>(shown(matrix * 8 + r))[column];
      }
      to[matrix] = pair[0] | uint32_t{pair[1]} << 16;
    }
    return nullptr;
  });
}

inline void load_matrices(uint32_t (&to)[4], const void* row) { load_rows(to, row, false); }
inline void load_matrices_transposed(uint32_t (&to)[4], const void* row) { load_rows(to, row, true); }

template <typename T>
float half_of(uint32_t pair, int i) {
  T value;
  value.x = static_cast<uint16_t>(pair >> (16 * i));
  return static_cast<float>(value);
}

struct Operands {
  uint32_t a[4], b[2];
};

template <typename T>
void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int lane = emulated::lane();
  const Operands own{{a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulated::from_warp(&own, [&](const auto& shown) {
    for (int e = 0; e < 4; ++e)
      for (int k = 0; k < 16; ++k) {
        const int owner = k % 8 / 2;  // among the four lanes that hold a row of a, or a column of b
        const Operands* const row = shown(lane / 4 * 4 + owner);
        const Operands* const column = shown((lane % 4 * 2 + e % 2) * 4 + owner);
        sums[e] += half_of<T>(row->a[k / 8 * 2 + e / 2], k % 2) * half_of<T>(column->b[k / 8], k % 2);
      }
    return nullptr;
  });
}

template <typename T>
struct Pair {
  static inline const uint32_t kOnes = T(1.0f).x * 0x10001u;
  static uint32_t pack(float low, float high) { return T(low).x | uint32_t{T(high).x} << 16; }
};

}  // namespace thinktwice::gpu
