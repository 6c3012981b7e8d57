// Small helpers over torch's stable ABI, used by every op.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace thinktwice {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Throws std::runtime_error with the parts joined to one line, unless `ok`.
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

inline Tensor new_tensor(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  const std::vector<int64_t> shape(sizes);
  return torch::stable::empty(shape, dtype);
}

inline void check_vector(const Tensor& tensor, const char* name, ScalarType dtype, int64_t size) {
  check(tensor.is_cpu() && tensor.dim() == 1 && tensor.scalar_type() == dtype && tensor.is_contiguous(), name,
        " must be a contiguous ", torch::headeronly::toString(dtype), " vector on the CPU");
  check(tensor.size(0) == size, name, " has ", tensor.size(0), " entries, expected ", size);
}

}  // namespace thinktwice
