// loraxs::linear: torch's own linear, then the low-rank part in place over its output.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "glue/base.h"
#include "glue/dispatch.h"

namespace loraxs {
namespace {

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& a,
                                  const Tensor& b, const Tensor& pages, const MaybeTensor& slots, double scale,
                                  double p_drop, const MaybeTensor& rng) {
  Problem g("linear");
  g.rows("x", x, g.K);
  g.plain("weight", weight, {&g.N, &g.K});
  if (bias) g.plain("bias", *bias, {&g.N});
  g.plain("a", a, {&g.r, &g.K});
  g.plain("b", b, {&g.N, &g.r});
  g.pages(pages);
  g.dropout(p_drop, rng);
  const int32_t* s = g.slots(slots);

  const NoGrad no_grad;
  Tensor p = empty_cpu({g.M.size, g.r.size}, accumulate_dtype(g.dtype));
  const Tensor y = base_linear(g, x, weight, bias);
  if (g.empty())
    torch::stable::zero_(p);
  else
    add_low_rank(g, y, x, a, b, pages, s, scale, y, p);
  return {y, p};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("_linear", TORCH_BOX(&linear));
}

}  // namespace loraxs
