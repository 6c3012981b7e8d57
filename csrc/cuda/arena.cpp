#include "cuda/arena.h"

#include <stdexcept>

namespace thinktwice::gpu {

Arena::Arena(const Driver& driver, int device, size_t bytes) : driver_(driver), device_(device) {
  size_t granule = 0;
  check(driver_.granularity(device, &granule), "asking for the size of a page");
  if (bytes == 0 || granule == 0 || bytes > SIZE_MAX - granule)
    throw std::runtime_error("arena: " + std::to_string(bytes) + " bytes in pages of " +
                             std::to_string(granule) + " can't be had");
  bytes_ = (bytes + granule - 1) / granule * granule;
  check(driver_.reserve(bytes_, &address_), "reserving addresses for " + std::to_string(bytes_) + " bytes");
}

Arena::~Arena() {
  // At the end of a process the driver may be gone already: there is nobody to tell.
  if (memory_ != 0) {
    (void)driver_.unmap(address_, bytes_);
    (void)driver_.release(memory_);
  }
  (void)driver_.free(address_, bytes_);
}

void Arena::map() {
  if (memory_ != 0) return;
  uint64_t memory = 0;
  const std::string what = std::to_string(bytes_) + " bytes";
  check(driver_.create(device_, bytes_, &memory), "taking " + what);
  int error = driver_.map(address_, bytes_, memory);
  const bool placed = error == 0;
  if (placed) error = driver_.allow(device_, address_, bytes_);
  if (error == 0) {
    memory_ = memory;
    return;
  }
  if (placed) (void)driver_.unmap(address_, bytes_);
  (void)driver_.release(memory);
  check(error, (placed ? "allowing access to " : "mapping ") + what);
}

void Arena::unmap() {
  if (memory_ == 0) return;
  check(driver_.unmap(address_, bytes_), "unmapping " + std::to_string(bytes_) + " bytes");
  const uint64_t memory = memory_;
  memory_ = 0;
  check(driver_.release(memory), "giving back " + std::to_string(bytes_) + " bytes");
}

void Arena::check(int error, const std::string& task) const {
  if (error == 0) return;
  const char* reason = driver_.text(error);
  throw std::runtime_error("arena on GPU " + std::to_string(device_) + ": " + task +
                           " failed: " + (reason != nullptr ? reason : "error " + std::to_string(error)));
}

}  // namespace thinktwice::gpu
