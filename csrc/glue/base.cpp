#include "glue/base.h"

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/ops.h>

#include <array>

namespace loraxs {
namespace {

Tensor as_matrix(const Tensor& t, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride) {
  const int64_t sizes[] = {rows, cols}, strides[] = {row_stride, col_stride};
  AtenTensorHandle handle;
  // The offset is counted from where t begins, whatever the shim's header calls it.
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, 0, &handle));
  return Tensor(handle);
}

Tensor as_rows(const Tensor& t, int64_t rows, int64_t cols) {
  return t.dim() == 2 ? t : as_matrix(t, rows, cols, cols, 1);
}

}  // namespace

// aten::linear and aten::matmul come down to one mm or addmm for these arguments; calling that through the C shims
// instead of the dispatcher saves about 2 us, which counts at one token.
bool is_one_product(const Tensor& rows, const Tensor& weight) {
  const int64_t dim = rows.dim();
  return (dim == 2 || dim == 3) && rows.is_contiguous() && weight.is_contiguous();
}

Tensor base_linear(const Problem& g, const Tensor& x, const Tensor& weight, const MaybeTensor& bias) {
  const int64_t M = g.M.size, K = g.K.size, N = g.N.size;
  if (g.empty() || !is_one_product(x, weight)) {
    using torch::stable::detail::from;
    std::array<StableIValue, 3> stack{from(x), from(weight), from(bias)};
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
    return dense(torch::stable::detail::to<Tensor>(stack[0]));
  }
  const Tensor y = empty_rows(x, N, g.dtype);
  const Tensor out = as_rows(y, M, N), rows = as_rows(x, M, K),
               transposed = as_matrix(weight, K, N, weight.stride(1), weight.stride(0));
  TORCH_ERROR_CODE_CHECK(bias ? aoti_torch_cpu_addmm_out(out.get(), bias->get(), rows.get(), transposed.get(), 1, 1)
                              : aoti_torch_cpu_mm_out(out.get(), rows.get(), transposed.get()));
  return y;
}

Tensor base_backward(const Problem& g, const Tensor& dy, const Tensor& weight) {
  if (g.empty() || !is_one_product(dy, weight)) return dense(torch::stable::matmul(dy, weight));
  const Tensor dx = empty_rows(dy, g.K.size, g.dtype);
  const Tensor out = as_rows(dx, g.M.size, g.K.size), rows = as_rows(dy, g.M.size, g.N.size);
  TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(out.get(), rows.get(), weight.get()));
  return dx;
}

}  // namespace loraxs
