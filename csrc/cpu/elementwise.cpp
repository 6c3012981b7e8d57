// What happens in a layer between the products, each in one pass over memory, with its gradient. float32.
#include <cmath>
#include <cstring>
#include <string>
#include <tuple>
#include <vector>

#include "cpu/parallel.h"
#include "tensor_utils.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kPart = 8192;  // elements that a task takes

#define THINKTWICE_KERNELS "cpu/elementwise_kernels.inc"
#include "cpu/for_each_isa.h"
#undef THINKTWICE_KERNELS

const float* floats(const Tensor& x) { return x.const_data_ptr<float>(); }

void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  check(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float, op, ": ", name,
        " must be a contiguous float32 CPU tensor");
  check(x.numel() == like.numel(), op, ": ", name, " has ", x.numel(), " elements, expected ", like.numel());
}

// Rows of the weight's size, as many to a task as make a part: what the tasks are does not depend on threads.
struct Rows {
  int64_t size, count, per_task, tasks;

  Rows(const char* op, const Tensor& x, const Tensor& weight) : size(weight.numel()) {
    check_like(op, "x", x, x);
    check_like(op, "weight", weight, weight);
    check(size > 0 && x.numel() % size == 0, op, ": x has ", x.numel(),
          " elements, no multiple of the weight's ", size);
    count = x.numel() / size;
    per_task = std::max<int64_t>(1, kPart / size);
    tasks = (count + per_task - 1) / per_task;
  }

  // body(row's first element) for the rows of one task
  template <typename Body>
  void each(int64_t task, const Body& body) const {
    const int64_t end = std::min(count, (task + 1) * per_task);
    for (int64_t row = task * per_task; row < end; ++row) body(row * size);
  }
};

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const Rows rows("rms_norm", x, weight);
  Tensor out = new_tensor({x.numel()}, ScalarType::Float);
  auto* const to = out.mutable_data_ptr<float>();
  parallel_tasks(rows.tasks, 1, [&](int64_t task) {
    rows.each(task, [&](int64_t i) {
      ISA_DISPATCH(norm_row)(floats(x) + i, floats(weight), rows.size, static_cast<float>(eps), to + i);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, Tensor x, Tensor weight, double eps) {
  const Rows rows("rms_norm_backward", x, weight);
  check_like("rms_norm_backward", "grad", grad, x);
  Tensor of_x = new_tensor({x.numel()}, ScalarType::Float),
         of_weight = new_tensor({rows.size}, ScalarType::Float);
  auto* const to_x = of_x.mutable_data_ptr<float>();
  std::vector<float> parts(rows.tasks * rows.size);  // of the weight's gradient, added up in order
  parallel_tasks(rows.tasks, 1, [&](int64_t task) {
    float* const part = parts.data() + task * rows.size;
    rows.each(task, [&](int64_t i) {
      ISA_DISPATCH(norm_gradient_row)
      (floats(grad) + i, floats(x) + i, floats(weight), rows.size, static_cast<float>(eps), to_x + i, part);
    });
  });
  auto* const to_weight = of_weight.mutable_data_ptr<float>();
  for (int64_t i = 0; i < rows.size; ++i) {
    double sum = 0;
    for (int64_t task = 0; task < rows.tasks; ++task) sum += parts[task * rows.size + i];
    to_weight[i] = static_cast<float>(sum);
  }
  return {of_x, of_weight};
}

// body(first element, how many) for parts of n elements
template <typename Body>
void in_parts(int64_t n, const Body& body) {
  parallel_tasks((n + kPart - 1) / kPart, 1,
                 [&](int64_t part) { body(part * kPart, std::min(kPart, n - part * kPart)); });
}

Tensor silu(Tensor x) {
  check_like("silu", "x", x, x);
  Tensor out = new_tensor({x.numel()}, ScalarType::Float);
  const std::vector<float> ones(kPart, 1.0f);
  auto* const to = out.mutable_data_ptr<float>();
  in_parts(x.numel(),
           [&](int64_t i, int64_t n) { ISA_DISPATCH(gate_row)(floats(x) + i, ones.data(), n, to + i); });
  return out;
}

Tensor swiglu(Tensor gate, Tensor up) {
  check_like("swiglu", "gate", gate, gate);
  check_like("swiglu", "up", up, gate);
  Tensor out = new_tensor({gate.numel()}, ScalarType::Float);
  auto* const to = out.mutable_data_ptr<float>();
  in_parts(gate.numel(), [&](int64_t i, int64_t n) {
    ISA_DISPATCH(gate_row)(floats(gate) + i, floats(up) + i, n, to + i);
  });
  return out;
}

std::tuple<Tensor, Tensor> swiglu_backward(Tensor grad, Tensor gate, Tensor up) {
  check_like("swiglu_backward", "gate", gate, gate);
  check_like("swiglu_backward", "up", up, gate);
  check_like("swiglu_backward", "grad", grad, gate);
  Tensor of_gate = new_tensor({gate.numel()}, ScalarType::Float),
         of_up = new_tensor({gate.numel()}, ScalarType::Float);
  auto *const to_gate = of_gate.mutable_data_ptr<float>(), *const to_up = of_up.mutable_data_ptr<float>();
  in_parts(gate.numel(), [&](int64_t i, int64_t n) {
    ISA_DISPATCH(gate_gradient_row)
    (floats(grad) + i, floats(gate) + i, floats(up) + i, n, to_gate + i, to_up + i);
  });
  return {of_gate, of_up};
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&thinktwice::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&thinktwice::rms_norm_backward));
  m.impl("silu", TORCH_BOX(&thinktwice::silu));
  m.impl("swiglu", TORCH_BOX(&thinktwice::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&thinktwice::swiglu_backward));
}
