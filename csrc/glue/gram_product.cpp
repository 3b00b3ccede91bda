// loraxs::gram_product: (x Wᵀ) W for every matrix of a batch.
#include <torch/csrc/stable/ops.h>

#include "glue/dispatch.h"

namespace loraxs {
namespace {

Tensor gram_product(const Tensor& x, const Tensor& weight) {
  Problem g("gram_product");
  Dim batch{"batch"}, l{"l"}, n{"n"}, m{"m"};
  g.rows("x", x, n);
  g.plain("x", x, {&batch, &l, &n});
  g.plain("weight", weight, {&batch, &m, &n});
  const NoGrad no_grad;
  if (g.dtype != ScalarType::Float || x.numel() == 0 || m.size == 0)
    return dense(torch::stable::matmul(torch::stable::matmul(x, torch::stable::transpose(weight, 1, 2)), weight));
  const Tensor rows = dense(x), w = dense(weight), out = empty_cpu({batch.size, l.size, n.size}, ScalarType::Float);
  for (int64_t i = 0; i < batch.size; ++i)
    cpu::gram_product({l.size, m.size, n.size, data<float>(rows) + i * l.size * n.size,
                       data<float>(w) + i * m.size * n.size, mutable_data<float>(out) + i * l.size * n.size});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) { m.impl("gram_product", TORCH_BOX(&gram_product)); }

}  // namespace loraxs
