// loraxs::linear_backward: gradients of linear (and of add_delta, which has no weight) for x and the pages.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "glue/base.h"
#include "glue/dispatch.h"

namespace loraxs {
namespace {

bool is_one_pass(const Problem& g, const Tensor& weight) {
  if (g.empty() || g.mask() != nullptr || !weight.is_contiguous()) return false;
  bool answer = false;
  visit_dtypes(g, [&](auto types) {
    using T = typename decltype(types)::Element;
    answer = cpu::has_one_pass<T>(g.M.size, g.N.size, g.K.size, g.r.size);
  });
  return answer;
}

std::tuple<Tensor, Tensor> linear_backward(const Tensor& dy, const MaybeTensor& weight, const Tensor& a,
                                           const Tensor& b, const Tensor& pages, const MaybeTensor& slots,
                                           const Tensor& p, double scale, double p_drop, const MaybeTensor& rng,
                                           bool need_dx, bool need_dpages) {
  Problem g("linear_backward");
  g.rows("dy", dy, g.N);
  if (weight) g.plain("weight", *weight, {&g.N, &g.K});
  g.plain("a", a, {&g.r, &g.K});
  g.plain("b", b, {&g.N, &g.r});
  g.pages(pages);
  g.accumulated("p", p, {&g.M, &g.r});
  g.dropout(p_drop, rng);
  const int32_t* s = g.slots(slots);

  const NoGrad no_grad;
  const bool one_pass = need_dx && weight && is_one_pass(g, *weight);
  Tensor dx = !need_dx              ? empty_cpu({0}, g.dtype)
              : weight && !one_pass ? base_backward(g, dy, *weight)
                                    : empty_rows(dy, g.K.size, g.dtype);
  Tensor dpages =
      need_dpages ? empty_cpu({g.S.size, g.r.size, g.r.size}, g.pages_dtype) : empty_cpu({0}, g.pages_dtype);
  if (g.empty()) {
    if (need_dx && !weight) torch::stable::zero_(dx);
    torch::stable::zero_(dpages);
    return {dx, dpages};
  }
  if (!need_dx && !need_dpages) return {dx, dpages};

  const Tensor rows = dense(dy), a_rows = dense(a), bt = transposed_basis(b), page_rows = page_views(pages);
  const Tensor p_rows = dense(p);
  visit_dtypes(g, [&](auto types) {
    using T = typename decltype(types)::Element;
    using P = typename decltype(types)::Page;
    cpu::backward<T, P>({g.M.size, g.K.size, g.N.size, g.r.size, g.S.size, data<T>(rows), data<T>(a_rows), data<T>(bt),
                         data<P>(page_rows), page_rows.stride(0), s, data<cpu::acc_t<T>>(p_rows),
                         one_pass ? data<T>(*weight) : nullptr, need_dx && weight && !one_pass ? data<T>(dx) : nullptr,
                         need_dx ? mutable_data<T>(dx) : nullptr, need_dpages ? mutable_data<P>(dpages) : nullptr,
                         scale, g.mask(), g.keep_scale});
  });
  return {dx, dpages};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) { m.impl("linear_backward", TORCH_BOX(&linear_backward)); }

}  // namespace loraxs
