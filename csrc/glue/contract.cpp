#include "glue/contract.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

namespace loraxs {
namespace {

std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::string s = "[";
  for (int64_t i = 0; i < dim; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

std::string shape_text(const Tensor& t) { return shape_text(t.sizes().data(), t.dim()); }

std::string dtype_text(ScalarType t) {
  switch (t) {
    case ScalarType::Float:
      return "torch.float32";
    case ScalarType::Double:
      return "torch.float64";
    case ScalarType::BFloat16:
      return "torch.bfloat16";
    case ScalarType::Half:
      return "torch.float16";
    case ScalarType::Int:
      return "torch.int32";
    case ScalarType::Long:
      return "torch.int64";
    default:
      return std::string("dtype ") + torch::headeronly::toString(t);
  }
}

bool is_float(ScalarType t) {
  return t == ScalarType::Float || t == ScalarType::BFloat16 || t == ScalarType::Half || t == ScalarType::Double;
}

void expect_dtype(const char* op, const char* name, const Tensor& t, ScalarType want, const char* why) {
  const ScalarType got = t.scalar_type();
  if (got != want) fail(op, name, "dtype " + dtype_text(want) + why, dtype_text(got));
}

}  // namespace

void fail(const char* op, const char* name, const std::string& expected, const std::string& got) {
  throw std::invalid_argument(std::string("loraxs::") + op + ": " + name + ": expected " + expected + ", got " + got);
}

void Problem::shape(const char* name, const Tensor& t, std::initializer_list<Dim*> dims) {
  bool fits = t.dim() == int64_t(dims.size());
  if (fits) {
    const int64_t* size = t.sizes().data();
    for (Dim* d : dims) {
      if (d->size < 0) d->size = *size;
      fits &= d->size == *size++;
    }
  }
  if (fits) return;
  std::string want = "shape [";
  for (const Dim* d : dims) {
    if (want.back() != '[') want += ", ";
    want += d->letter;
    if (d->size >= 0) want += "=" + std::to_string(d->size);
  }
  fail(op, name, want + "]", shape_text(t));
}

void Problem::rows(const char* name, const Tensor& t, Dim& dim) {
  const int64_t n = t.dim();
  const int64_t* sizes = t.sizes().data();
  if (n < 1) fail(op, name, std::string("shape [..., ") + dim.letter + "]", "[]");
  if (first_ == nullptr) {
    dtype = t.scalar_type();
    if (!is_float(dtype))
      fail(op, name, "a dtype of torch.float32, torch.bfloat16, torch.float16, torch.float64", dtype_text(dtype));
    first_ = name, lead_ = sizes, n_lead_ = n - 1;
    M.size = 1;
    for (int64_t i = 0; i < n - 1; ++i) M.size *= sizes[i];
    if (M.size > INT32_MAX) fail(op, name, "fewer than 2^31 rows", shape_text(t));
  } else {
    expect_dtype(op, name, t, dtype, "");
    if (n - 1 != n_lead_ || !std::equal(lead_, lead_ + n_lead_, sizes))
      fail(op, name, "leading dimensions " + shape_text(lead_, n_lead_), shape_text(t));
  }
  if (dim.size < 0) dim.size = sizes[n - 1];
  if (dim.size != sizes[n - 1])
    fail(op, name, std::string("shape [..., ") + dim.letter + "=" + std::to_string(dim.size) + "]", shape_text(t));
}

void Problem::plain(const char* name, const Tensor& t, std::initializer_list<Dim*> dims) {
  shape(name, t, dims);
  expect_dtype(op, name, t, dtype, "");
}

void Problem::pages(const Tensor& t) {
  shape("pages", t, {&S, &r, &r});
  if (r.size < 1) fail(op, "a", "a rank of at least 1", "0");
  per_slot("pages", t);
}

void Problem::factors(const char* name, const Tensor& t) {
  shape(name, t, {&S, &N});
  per_slot(name, t);
}

void Problem::accumulated(const char* name, const Tensor& t, std::initializer_list<Dim*> dims) {
  shape(name, t, dims);
  expect_dtype(op, name, t, accumulate_dtype(dtype), "");
}

void Problem::per_slot(const char* name, const Tensor& t) {
  if (S.size < 1) fail(op, name, "at least one slot", "0");
  pages_dtype = t.scalar_type();
  if (pages_dtype != ScalarType::Float) expect_dtype(op, name, t, dtype, " or torch.float32");
}

MaybeTensor Problem::device_slots(const MaybeTensor& t) {
  if (!t) return std::nullopt;
  shape("slots", *t, {&M});
  expect_dtype(op, "slots", *t, ScalarType::Int, "");
  return dense(*t);
}

const int32_t* Problem::slots(const MaybeTensor& t) {
  slots_ = device_slots(t);
  if (!slots_) return nullptr;
  const auto* s = static_cast<const int32_t*>(slots_->const_data_ptr());
  int32_t low = 0, high = -1;
  for (int64_t m = 0; m < M.size; ++m) low = std::min(low, s[m]), high = std::max(high, s[m]);
  if (low < -1 || high >= S.size)
    fail(op, "slots", "values in [-1, " + std::to_string(S.size) + ")", std::to_string(low < -1 ? low : high));
  return s;
}

MaybeTensor Problem::device_dropout(double p_drop, const MaybeTensor& rng) {
  if (!(p_drop >= 0 && p_drop < 1)) fail(op, "p_drop", "a probability in [0, 1)", std::to_string(p_drop));
  if (rng) {
    Dim two{"2", 2};
    shape("rng", *rng, {&two});
    expect_dtype(op, "rng", *rng, ScalarType::Long, "");
  }
  if (p_drop == 0) return std::nullopt;
  if (!rng) fail(op, "rng", "int64 [2] = (seed, offset) because p_drop is " + std::to_string(p_drop), "None");
  keep_scale = 1 / (1 - p_drop);
  const double threshold = std::min(std::nearbyint(p_drop * 0x1p32), 0x1p32 - 1);
  if (threshold == 0) return std::nullopt;  // below the resolution of 32 bits: everything is kept
  dropout_.cutoff = uint32_t(threshold) - 1;
  return dense(*rng);
}

void Problem::dropout(double p_drop, const MaybeTensor& rng) {
  const MaybeTensor words = device_dropout(p_drop, rng);
  if (!words) return;
  const auto* v = static_cast<const uint64_t*>(words->const_data_ptr());
  masked_ = true;
  dropout_ = {{uint32_t(v[0]), uint32_t(v[0] >> 32)}, {uint32_t(v[1]), uint32_t(v[1] >> 32)}, dropout_.cutoff};
}

void Problem::on_device(int32_t device, std::initializer_list<std::pair<const char*, const Tensor*>> tensors) const {
  for (const auto& [name, t] : tensors)
    if (t != nullptr && !(t->is_cuda() && t->get_device_index() == device))
      fail(op, name, "device cuda:" + std::to_string(device),
           t->is_cuda() ? "cuda:" + std::to_string(t->get_device_index()) : "another device");
}

ScalarType accumulate_dtype(ScalarType dtype) {
  return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

Tensor empty_on(const int64_t* sizes, int64_t dim, ScalarType dtype, int32_t device_type, int32_t device) {
  constexpr int64_t kMaxDim = 64;  // as in torch
  int64_t strides[kMaxDim], step = 1;
  for (int64_t i = dim - 1; i >= 0; --i) strides[i] = step, step *= std::max<int64_t>(sizes[i], 1);
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)), device_type, device,
      &handle));
  return Tensor(handle);
}

Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType dtype) {
  return empty_on(sizes, dim, dtype, aoti_torch_device_type_cpu(), 0);
}

Tensor empty_cpu(std::initializer_list<int64_t> sizes, ScalarType dtype) {
  return empty_cpu(sizes.begin(), int64_t(sizes.size()), dtype);
}

Tensor empty_rows(const Tensor& like, int64_t last, ScalarType dtype, int32_t device_type, int32_t device) {
  constexpr int64_t kMaxDim = 64;
  int64_t sizes[kMaxDim];
  const int64_t dim = like.dim();
  std::copy_n(like.sizes().data(), dim - 1, sizes);
  sizes[dim - 1] = last;
  return empty_on(sizes, dim, dtype, device_type, device);
}

Tensor empty_rows(const Tensor& like, int64_t last, ScalarType dtype) {
  return empty_rows(like, last, dtype, aoti_torch_device_type_cpu(), 0);
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor page_views(const Tensor& pages) {
  const int64_t r = pages.size(2);
  return r == 1 || (pages.stride(2) == 1 && pages.stride(1) == r) ? pages : dense(pages);
}

Tensor transposed_basis(const Tensor& b) {
  return b.stride(0) == 1 && b.stride(1) == b.size(0) ? b : dense(torch::stable::transpose(b, 0, 1));
}

}  // namespace loraxs
