// What every owner checks before it trusts a pointer, and the few tensor helpers the ops share.
//
// The same conditions as loraxs_ext/ops/contract.py, in C++ because a direct torch.ops call must not crash the process.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <utility>

#include "kernels/philox.h"

namespace loraxs {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// Throws std::invalid_argument (ValueError in Python): "loraxs::op: name: expected …, got …".
[[noreturn]] void fail(const char* op, const char* name, const std::string& expected, const std::string& got);

// A dimension by its letter in the contract; the first tensor that has it binds its size.
struct Dim {
  const char* letter;
  int64_t size = -1;
};

// Sizes, dtypes and dropout of one call; filled and checked argument by argument.
class Problem {
 public:
  explicit Problem(const char* op_name) : op(op_name) {}

  // An argument [..., dim] that defines (or has to match) the leading dimensions and the dtype.
  void rows(const char* name, const Tensor& t, Dim& dim);
  // An argument of exactly these dimensions in the common dtype.
  void plain(const char* name, const Tensor& t, std::initializer_list<Dim*> dims);
  void pages(const Tensor& t);
  // Factors [S, N], in a dtype that pages may have.
  void factors(const char* name, const Tensor& t);
  // An argument of exactly these dimensions in the accumulation dtype.
  void accumulated(const char* name, const Tensor& t, std::initializer_list<Dim*> dims);
  // Contiguous slots, every value checked on the CPU; null when absent.
  const int32_t* slots(const MaybeTensor& t);
  void dropout(double p_drop, const MaybeTensor& rng);
  // The same two without reading device memory: contiguous tensors, absent where there is nothing to read.
  MaybeTensor device_slots(const MaybeTensor& t);
  MaybeTensor device_dropout(double p_drop, const MaybeTensor& rng);
  // Every tensor that is given lies on this CUDA device.
  void on_device(int32_t device, std::initializer_list<std::pair<const char*, const Tensor*>> tensors) const;

  bool empty() const { return M.size == 0 || K.size == 0 || N.size == 0; }
  const Dropout* mask() const { return masked_ ? &dropout_ : nullptr; }
  uint32_t cutoff() const { return dropout_.cutoff; }

  const char* op;
  Dim M{"M"}, K{"K"}, N{"N"}, r{"r"}, S{"S"};
  ScalarType dtype{}, pages_dtype{};
  double keep_scale = 1;

 private:
  void shape(const char* name, const Tensor& t, std::initializer_list<Dim*> dims);
  void per_slot(const char* name, const Tensor& t);

  const char* first_ = nullptr;
  const int64_t* lead_ = nullptr;
  int64_t n_lead_ = 0;
  MaybeTensor slots_;
  Dropout dropout_{};
  bool masked_ = false;
};

ScalarType accumulate_dtype(ScalarType dtype);

// Uninitialised and contiguous; device types as in the C shims.
Tensor empty_on(const int64_t* sizes, int64_t dim, ScalarType dtype, int32_t device_type, int32_t device);
// The same on the CPU.
Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType dtype);
Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype);
// [..., last] with the leading dimensions of `like`.
Tensor empty_rows(const Tensor& like, int64_t last, ScalarType dtype);
Tensor empty_rows(const Tensor& like, int64_t last, ScalarType dtype, int32_t device_type, int32_t device);

Tensor dense(const Tensor& t);
// Pages [S, r, r] that are contiguous each, at any distance from one another, as the rows of a slab are: pages as they
// lie where that is so, else a dense copy. stride(0) is the distance.
Tensor page_views(const Tensor& pages);
// A tensor whose memory holds contiguous bt [r, N]: b [N, r] itself when it is the transpose of one, else a copy.
Tensor transposed_basis(const Tensor& b);

// While alive, torch records no gradients: inner calls see tensors that may require them.
class NoGrad {
 public:
  NoGrad() : was_(aoti_torch_grad_mode_is_enabled()) {
    if (was_) aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() {
    if (was_) aoti_torch_grad_mode_set_enabled(true);
  }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool was_;
};

}  // namespace loraxs
