// What happens in a decoder layer between the products, each in one pass over memory, with its gradient.
// float32, rows one after another.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/parallel.h"
#include "common/tensor_utils.h"

namespace thinktwice {
namespace {

using c10::BFloat16;
using c10::Half;

constexpr int64_t kPart = 8192;  // elements that a task takes

#define THINKTWICE_KERNELS "layers/elementwise_kernels.inc"
#include "common/for_each_isa.h"
#undef THINKTWICE_KERNELS

const float* floats(const Tensor& x) { return x.const_data_ptr<float>(); }

void check_like(const char* op, const char* name, const Tensor& x, const Tensor& like) {
  check(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float, op, ": ", name,
        " must be a contiguous float32 CPU tensor");
  check(x.numel() == like.numel(), op, ": ", name, " has ", x.numel(), " elements, expected ", like.numel());
}

// Rows, as many to a task as make a part: what the tasks are does not depend on threads.
struct RowTasks {
  int64_t rows, per_task, count;

  RowTasks(int64_t rows, int64_t elements)
      : rows(rows),
        per_task(std::max<int64_t>(1, kPart / std::max<int64_t>(1, elements))),
        count((rows + per_task - 1) / per_task) {}

  // body(row) for the rows of one task
  template <typename Body>
  void each(int64_t task, const Body& body) const {
    const int64_t end = std::min(rows, (task + 1) * per_task);
    for (int64_t row = task * per_task; row < end; ++row) body(row);
  }

  template <typename Body>
  void each(const Body& body) const {
    parallel_tasks(count, 1, [&](int64_t task) { each(task, body); });
  }
};

// The rows of x, of the weight's size each.
RowTasks norm_rows(const char* op, const Tensor& x, const Tensor& weight) {
  const int64_t size = weight.numel();
  check_like(op, "x", x, x);
  check_like(op, "weight", weight, weight);
  check(size > 0 && x.numel() % size == 0, op, ": x has ", x.numel(),
        " elements, no multiple of the weight's ", size);
  return {x.numel() / size, size};
}

// y and, where there is a residual, x + residual.
std::tuple<Tensor, Tensor> rms_norm(Tensor x, std::optional<Tensor> residual, Tensor weight, double eps) {
  const RowTasks tasks = norm_rows("rms_norm", x, weight);
  if (residual) check_like("rms_norm", "residual", *residual, x);
  const int64_t size = weight.numel();
  Tensor out = new_tensor({x.numel()}, ScalarType::Float),
         sum = new_tensor({residual ? x.numel() : 0}, ScalarType::Float);
  auto *const to = out.mutable_data_ptr<float>(), *const to_sum = sum.mutable_data_ptr<float>();
  const auto epsilon = static_cast<float>(eps);
  tasks.each([&](int64_t row) {
    const int64_t i = row * size;
    if (!residual) return ISA_DISPATCH(norm_row)(floats(x) + i, floats(weight), size, epsilon, to + i);
    const float* const added = floats(*residual) + i;
    ISA_DISPATCH(add_norm_row)(floats(x) + i, added, floats(weight), size, epsilon, to_sum + i, to + i);
  });
  return {out, sum};
}

// Gradients of a weight that tasks add up on their own; the total does not depend on threads. Of no elements
// where none is wanted.
class WeightSums {
 public:
  WeightSums(int64_t tasks, int64_t size) : tasks_(tasks), size_(size), parts_(tasks * size) {}

  float* of_task(int64_t task) { return size_ ? parts_.data() + task * size_ : nullptr; }

  Tensor total() const {
    std::vector<double> sums(size_);
    for (int64_t task = 0; task < tasks_; ++task)
      for (int64_t i = 0; i < size_; ++i) sums[i] += parts_[task * size_ + i];
    Tensor out = new_tensor({size_}, ScalarType::Float);
    std::copy(sums.begin(), sums.end(), out.mutable_data_ptr<float>());
    return out;
  }

 private:
  int64_t tasks_, size_;
  std::vector<float> parts_;
};

std::tuple<Tensor, Tensor> rms_norm_backward(Tensor grad, std::optional<Tensor> besides, Tensor x,
                                             Tensor weight, double eps, bool want_weight) {
  const RowTasks tasks = norm_rows("rms_norm_backward", x, weight);
  check_like("rms_norm_backward", "grad", grad, x);
  if (besides) check_like("rms_norm_backward", "besides", *besides, x);
  const int64_t size = weight.numel();
  Tensor of_x = new_tensor({x.numel()}, ScalarType::Float);
  auto* const to_x = of_x.mutable_data_ptr<float>();
  WeightSums sums(tasks.count, want_weight ? size : 0);
  parallel_tasks(tasks.count, 1, [&](int64_t task) {
    tasks.each(task, [&](int64_t row) {
      const int64_t i = row * size;
      ISA_DISPATCH(norm_gradient_row)
      (floats(grad) + i, besides ? floats(*besides) + i : nullptr, floats(x) + i, floats(weight), size,
       static_cast<float>(eps), to_x + i, sums.of_task(task));
    });
  });
  return {of_x, sums.total()};
}

// The rows [gate | up] of a product [tokens, 2 * inner].
RowTasks gate_rows(const char* op, const Tensor& x) {
  check(x.dim() == 2 && x.size(1) % 2 == 0, op, ": x must be [tokens, 2 * inner]");
  check_like(op, "x", x, x);
  return {x.size(0), x.size(1) / 2};
}

Tensor swiglu(Tensor x) {
  const RowTasks tasks = gate_rows("swiglu", x);
  const int64_t inner = x.size(1) / 2;
  Tensor out = new_tensor({tasks.rows, inner}, ScalarType::Float);
  auto* const to = out.mutable_data_ptr<float>();
  tasks.each([&](int64_t token) {
    const float* const gate = floats(x) + token * 2 * inner;
    ISA_DISPATCH(gate_row)(gate, gate + inner, inner, to + token * inner);
  });
  return out;
}

Tensor swiglu_backward(Tensor grad, Tensor x) {
  const RowTasks tasks = gate_rows("swiglu_backward", x);
  const int64_t inner = x.size(1) / 2;
  check_like("swiglu_backward", "grad", grad, grad);
  check(grad.numel() == tasks.rows * inner, "swiglu_backward: grad must be [", tasks.rows, ", ", inner, "]");
  Tensor of_x = new_tensor({tasks.rows, 2 * inner}, ScalarType::Float);
  auto* const to = of_x.mutable_data_ptr<float>();
  tasks.each([&](int64_t token) {
    const int64_t row = token * 2 * inner;
    const float* const gate = floats(x) + row;
    ISA_DISPATCH(gate_gradient_row)
    (floats(grad) + token * inner, gate, gate + inner, inner, to + row, to + row + inner);
  });
  return of_x;
}

// The heads of one kind inside the rows of a product [tokens, elements]: queries, keys or values.
struct Strand {
  int64_t start, size;          // the first element, and the elements of all heads
  const float* norm = nullptr;  // weight of the norm before the rotation
  int64_t norm_size = 0;        // elements that its mean goes over: a head's or all

  Strand(const char* op, int64_t start, int64_t size, int64_t dim, const std::optional<Tensor>& weight)
      : start(start), size(size) {
    if (!weight) return;
    check_like(op, "norm", *weight, *weight);
    norm = floats(*weight);
    norm_size = weight->numel();
    check(norm_size == dim || norm_size == size, op, ": a norm has ", norm_size, " elements, expected ", dim,
          " or, over all heads, ", size);
  }
};

// Rows [queries | keys | values] of a product, and the angles of their tokens: those of a head's halves one
// after another, or the same for both.
struct HeadRows {
  int64_t tokens, dim, width;
  float eps;
  Strand q, k;
  int64_t v_start, v_size;
  const float *cos, *sin;
  int64_t angles, upper;  // of a token; where those of the upper half begin
  RowTasks tasks;

  HeadRows(const char* op, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t dim,
           const std::optional<Tensor>& q_norm, const std::optional<Tensor>& k_norm, double eps,
           const Tensor& cos, const Tensor& sin)
      : tokens(tokens),
        dim(dim),
        width((heads + 2 * kv_heads) * dim),
        eps(static_cast<float>(eps)),
        q(op, 0, heads * dim, dim, q_norm),
        k(op, heads * dim, kv_heads * dim, dim, k_norm),
        v_start((heads + kv_heads) * dim),
        v_size(kv_heads * dim),
        cos(floats(cos)),
        sin(floats(sin)),
        angles(cos.size(1)),
        upper(angles == dim ? dim / 2 : 0),
        tasks(tokens, width) {
    check(angles == dim || 2 * angles == dim, op, ": cos has rows of ", angles, " elements, expected ", dim,
          " or half of them");
    for (const Tensor& table : {cos, sin}) {
      check_like(op, "cos or sin", table, table);
      check(table.numel() == tokens * angles && dim % 2 == 0, op, ": cos and sin must be [", tokens, ", ",
            angles, "], for heads of two halves");
    }
  }

  void check_rows(const char* op, const Tensor& qkv) const {
    check_like(op, "qkv", qkv, qkv);
    check(qkv.dim() == 2 && qkv.size(0) == tokens && qkv.size(1) == width, op, ": qkv must be [", tokens,
          ", ", width, "]");
  }
};

// A token's heads of one kind, normed and rotated; `room` holds as many elements.
void turn_heads(const HeadRows& rows, const Strand& strand, int64_t token, const float* x, float* room,
                float* to) {
  if (strand.norm) {
    for (int64_t i = 0; i < strand.size; i += strand.norm_size)
      ISA_DISPATCH(norm_row)(x + i, strand.norm, strand.norm_size, rows.eps, room + i);
    x = room;
  }
  const float *const cos = rows.cos + token * rows.angles, *const sin = rows.sin + token * rows.angles;
  for (int64_t i = 0; i < strand.size; i += rows.dim)
    ISA_DISPATCH(rotate_row<false>)(x + i, cos, sin, rows.upper, rows.dim / 2, to + i);
}

// The gradient of turn_heads, and what the token adds to that of the norm's weight.
void turn_heads_back(const HeadRows& rows, const Strand& strand, int64_t token, const float* grad,
                     const float* x, float* room, float* to, float* to_norm) {
  const float *const cos = rows.cos + token * rows.angles, *const sin = rows.sin + token * rows.angles;
  float* const turned = strand.norm ? room : to;
  for (int64_t i = 0; i < strand.size; i += rows.dim)
    ISA_DISPATCH(rotate_row<true>)(grad + i, cos, sin, rows.upper, rows.dim / 2, turned + i);
  for (int64_t i = 0; strand.norm && i < strand.size; i += strand.norm_size) ISA_DISPATCH(norm_gradient_row)
  (turned + i, nullptr, x + i, strand.norm, strand.norm_size, rows.eps, to + i, to_norm);
}

std::tuple<Tensor, Tensor, Tensor> rotary(Tensor qkv, Tensor cos, Tensor sin, int64_t heads, int64_t kv_heads,
                                          std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                                          double eps) {
  check(qkv.dim() == 2 && heads > 0 && kv_heads > 0 && qkv.size(1) % (heads + 2 * kv_heads) == 0,
        "rotary: qkv must be [tokens, (heads + 2 * kv_heads) * head_dim]");
  const HeadRows rows("rotary", qkv.size(0), heads, kv_heads, qkv.size(1) / (heads + 2 * kv_heads), q_norm,
                      k_norm, eps, cos, sin);
  rows.check_rows("rotary", qkv);
  Tensor q = new_tensor({rows.tokens, heads, rows.dim}, ScalarType::Float),
         k = new_tensor({rows.tokens, kv_heads, rows.dim}, ScalarType::Float),
         v = new_tensor({rows.tokens, kv_heads, rows.dim}, ScalarType::Float);
  auto *const to_q = q.mutable_data_ptr<float>(), *const to_k = k.mutable_data_ptr<float>(),
              *const to_v = v.mutable_data_ptr<float>();
  parallel_tasks(rows.tasks.count, 1, [&](int64_t task) {
    std::vector<float> room(rows.width);
    rows.tasks.each(task, [&](int64_t token) {
      const float* const x = floats(qkv) + token * rows.width;
      turn_heads(rows, rows.q, token, x, room.data(), to_q + token * rows.q.size);
      turn_heads(rows, rows.k, token, x + rows.k.start, room.data(), to_k + token * rows.k.size);
      std::memcpy(to_v + token * rows.v_size, x + rows.v_start, rows.v_size * sizeof(float));
    });
  });
  return {q, k, v};
}

// `qkv` is needed where there are norms.
std::tuple<Tensor, Tensor, Tensor> rotary_backward(Tensor of_q, Tensor of_k, Tensor of_v,
                                                   std::optional<Tensor> qkv, Tensor cos, Tensor sin,
                                                   std::optional<Tensor> q_norm, std::optional<Tensor> k_norm,
                                                   double eps, bool want_q_norm, bool want_k_norm) {
  const char* const op = "rotary_backward";
  check(of_q.dim() == 3 && of_k.dim() == 3, op, ": gradients must be [tokens, heads, head_dim]");
  const HeadRows rows(op, of_q.size(0), of_q.size(1), of_k.size(1), of_q.size(2), q_norm, k_norm, eps, cos,
                      sin);
  check_like(op, "gradient of q", of_q, of_q);
  check_like(op, "gradient of k", of_k, of_k);
  check_like(op, "gradient of v", of_v, of_k);
  check(of_q.numel() == rows.tokens * rows.q.size && of_k.numel() == rows.tokens * rows.k.size, op,
        ": gradients must be of ", rows.tokens, " tokens with heads of ", rows.dim, " elements");
  check(qkv || !(q_norm || k_norm), op, ": norms need qkv");
  if (qkv) rows.check_rows(op, *qkv);
  const float* const from = qkv ? floats(*qkv) : nullptr;
  Tensor of_qkv = new_tensor({rows.tokens, rows.width}, ScalarType::Float);
  auto* const to = of_qkv.mutable_data_ptr<float>();
  WeightSums q_sums(rows.tasks.count, want_q_norm ? rows.q.norm_size : 0),
      k_sums(rows.tasks.count, want_k_norm ? rows.k.norm_size : 0);
  parallel_tasks(rows.tasks.count, 1, [&](int64_t task) {
    std::vector<float> room(rows.width);
    rows.tasks.each(task, [&](int64_t token) {
      const int64_t row = token * rows.width;
      const float *const x = from ? from + row : nullptr, *const grad_q = floats(of_q) + token * rows.q.size,
                         *const grad_k = floats(of_k) + token * rows.k.size;
      turn_heads_back(rows, rows.q, token, grad_q, x, room.data(), to + row, q_sums.of_task(task));
      turn_heads_back(rows, rows.k, token, grad_k, x ? x + rows.k.start : nullptr, room.data(),
                      to + row + rows.k.start, k_sums.of_task(task));
      std::memcpy(to + row + rows.v_start, floats(of_v) + token * rows.v_size, rows.v_size * sizeof(float));
    });
  });
  return {of_qkv, q_sums.total(), k_sums.total()};
}

}  // namespace
}  // namespace thinktwice

STABLE_TORCH_LIBRARY_IMPL(thinktwice_layers, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&thinktwice::rms_norm));
  m.impl("rms_norm_backward", TORCH_BOX(&thinktwice::rms_norm_backward));
  m.impl("swiglu", TORCH_BOX(&thinktwice::swiglu));
  m.impl("swiglu_backward", TORCH_BOX(&thinktwice::swiglu_backward));
  m.impl("rotary", TORCH_BOX(&thinktwice::rotary));
  m.impl("rotary_backward", TORCH_BOX(&thinktwice::rotary_backward));
}
