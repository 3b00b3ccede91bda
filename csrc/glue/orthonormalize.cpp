// loraxs::_cholesky_qr: the first pass of loraxs::orthonormalize on the CPU, and how well each block was conditioned.
#include <tuple>

#include "cpu/parallel.h"
#include "glue/dispatch.h"

namespace loraxs {
namespace {

std::tuple<Tensor, Tensor> cholesky_qr(const Tensor& y) {
  Problem g("_cholesky_qr");
  Dim batch{"batch"}, k{"k"}, n{"n"};
  g.rows("Y", y, n);
  g.plain("Y", y, {&batch, &k, &n});
  if (g.dtype != ScalarType::Float) fail(g.op, "Y", "dtype torch.float32", "another one");
  const NoGrad no_grad;
  const Tensor rows = dense(y), q = empty_cpu({batch.size, k.size, n.size}, ScalarType::Float);
  const Tensor pivots = empty_cpu({batch.size}, ScalarType::Double);
  const int64_t size = k.size * n.size;
  cpu::parallel_for(batch.size, [&](int64_t i0, int64_t i1) {
    for (int64_t i = i0; i < i1; ++i)
      mutable_data<double>(pivots)[i] =
          cpu::cholesky_qr(data<float>(rows) + i * size, k.size, n.size, mutable_data<float>(q) + i * size);
  });
  return {q, pivots};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) { m.impl("_cholesky_qr", TORCH_BOX(&cholesky_qr)); }

}  // namespace loraxs
