// loraxs::add_delta and add_delta_: the low-rank part over a base output that someone else computed.
#include <torch/csrc/stable/ops.h>

#include <cstring>
#include <tuple>

#include "glue/dispatch.h"

namespace loraxs {

void add_low_rank(const Problem& g, const Tensor& in, const Tensor& x, const Tensor& a, const Tensor& b,
                  const Tensor& pages, const int32_t* slots, double scale, const Tensor& out, const Tensor& p) {
  const Tensor x_rows = dense(x), a_rows = dense(a), bt = transposed_basis(b), page_rows = page_views(pages);
  visit_dtypes(g, [&](auto types) {
    using T = typename decltype(types)::Element;
    using P = typename decltype(types)::Page;
    cpu::forward<T, P>({g.M.size, g.K.size, g.N.size, g.r.size, data<T>(x_rows), data<T>(a_rows), data<T>(bt),
                        data<P>(page_rows), page_rows.stride(0), slots, data<T>(in), mutable_data<T>(out),
                        mutable_data<cpu::acc_t<T>>(p), scale, g.mask(), g.keep_scale});
  });
}

namespace {

const int32_t* check(Problem& g, const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                     const Tensor& pages, const MaybeTensor& slots, double p_drop, const MaybeTensor& rng) {
  g.rows("x", x, g.K);
  g.rows("y", y, g.N);
  g.plain("a", a, {&g.r, &g.K});
  g.plain("b", b, {&g.N, &g.r});
  g.pages(pages);
  g.dropout(p_drop, rng);
  return g.slots(slots);
}

Tensor empty_p(const Problem& g) {
  Tensor p = empty_cpu({g.M.size, g.r.size}, accumulate_dtype(g.dtype));
  if (g.empty()) torch::stable::zero_(p);
  return p;
}

std::tuple<Tensor, Tensor> add_delta(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b,
                                     const Tensor& pages, const MaybeTensor& slots, double scale, double p_drop,
                                     const MaybeTensor& rng) {
  Problem g("add_delta");
  const int32_t* s = check(g, y, x, a, b, pages, slots, p_drop, rng);
  const NoGrad no_grad;
  Tensor p = empty_p(g);
  const Tensor in = dense(y);
  Tensor out = empty_rows(y, g.N.size, g.dtype);
  if (g.empty())
    torch::stable::copy_(out, in);
  else
    add_low_rank(g, in, x, a, b, pages, s, scale, out, p);
  return {out, p};
}

void add_delta_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& pages,
                const MaybeTensor& slots, double scale, double p_drop, const MaybeTensor& rng) {
  Problem g("add_delta_");
  const int32_t* s = check(g, y, x, a, b, pages, slots, p_drop, rng);
  if (g.empty()) return;
  const NoGrad no_grad;
  const Tensor rows = dense(y);
  add_low_rank(g, rows, x, a, b, pages, s, scale, rows, empty_p(g));
  if (!y.is_contiguous()) torch::stable::copy_(y, rows);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) {
  m.impl("add_delta", TORCH_BOX(&add_delta));
  m.impl("_add_delta", TORCH_BOX(&add_delta));
  m.impl("add_delta_", TORCH_BOX(&add_delta_));
}

}  // namespace loraxs
