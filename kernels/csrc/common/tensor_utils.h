// Small helpers over torch's stable ABI, used by every op.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace thinktwice {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A part of a message. No stream formats it: a library built by a newer g++ than torch's crashed in one.
template <typename Part>
std::string to_text(const Part& part) {
  if constexpr (std::is_floating_point_v<Part>) {
    char digits[32];
    std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
    return digits;
  } else if constexpr (std::is_integral_v<Part>) {
    return std::to_string(part);
  } else {
    return std::string(std::string_view(part));
  }
}

// Throws std::runtime_error with the parts joined to one line, unless `ok`.
template <typename... Parts>
void check(bool ok, const Parts&... parts) {
  if (ok) return;
  throw std::runtime_error((std::string() + ... + to_text(parts)));
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
