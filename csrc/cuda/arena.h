// Memory of a GPU at addresses that stay while it comes and goes: what has them by heart, such as a CUDA
// graph, need not learn new ones. Knows the driver through a table alone, neither torch nor CUDA's headers.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace thinktwice::gpu {

// The driver's functions of virtual memory; each gives 0 or an error. Sizes are in bytes, whole granules.
struct Driver {
  int (*granularity)(int device, size_t* bytes);
  int (*reserve)(size_t bytes, uint64_t* address);
  int (*free)(uint64_t address, size_t bytes);  // what `reserve` gave
  int (*create)(int device, size_t bytes, uint64_t* memory);
  int (*release)(uint64_t memory);  // what `create` gave; it is there until it is not mapped either
  int (*map)(uint64_t address, size_t bytes, uint64_t memory);
  int (*unmap)(uint64_t address, size_t bytes);
  int (*allow)(int device, uint64_t address, size_t bytes);  // to read and write
  const char* (*text)(int error);
};

// A range of addresses, with memory behind it or without. What fails leaves it as it was, and throws
// std::runtime_error with what was to be done and the driver's reason.
class Arena {
 public:
  // Reserves the addresses alone. `driver` outlives the arena.
  Arena(const Driver& driver, int device, size_t bytes);
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  // Puts memory behind the addresses, of unknown content; nothing where it is there already.
  void map();

  // Gives the memory back; nothing where none is there. Nobody may be using it: work queued on the GPU
  // counts.
  void unmap();

  bool mapped() const { return memory_ != 0; }
  uint64_t address() const { return address_; }
  size_t bytes() const { return bytes_; }  // what was asked for, in whole granules
  int device() const { return device_; }

 private:
  void check(int error, const std::string& task) const;

  const Driver& driver_;
  const int device_;
  size_t bytes_;
  uint64_t address_ = 0;
  uint64_t memory_ = 0;  // the driver's handle of it; never 0
};

}  // namespace thinktwice::gpu
