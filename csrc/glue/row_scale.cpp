// loraxs::row_scale: EDoRA's factors from what is cached of the weight.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "glue/dispatch.h"

namespace loraxs {
namespace {

Tensor in_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// c and root describe any basis together; sigma describes a converged one.
void check_one_form(const Problem& c, const MaybeTensor& sigma, const MaybeTensor& rows, const MaybeTensor& root) {
  if (rows.has_value() != root.has_value())
    fail(c.op, rows ? "root" : "c", std::string("a tensor because ") + (rows ? "c" : "root") + " is given", "None");
  if (rows && sigma) fail(c.op, "sigma", "None because c and root are given", "a tensor");
}

// through_norm is a matter of the backward.
std::tuple<Tensor, Tensor> row_scale(const Tensor& rho, const Tensor& b, const Tensor& pages, const MaybeTensor& sigma,
                                     const Tensor& m, double scale, const MaybeTensor& c, const MaybeTensor& root,
                                     bool /*through_norm*/) {
  Problem p("row_scale");
  p.rows("b", b, p.r);
  p.plain("b", b, {&p.N, &p.r});
  if (p.r.size < 1) fail(p.op, "b", "a rank of at least 1", "0");
  p.accumulated("rho", rho, {&p.N});
  p.pages(pages);
  if (sigma) p.accumulated("sigma", *sigma, {&p.r});
  p.factors("m", m);
  if (c) p.accumulated("c", *c, {&p.N, &p.r});
  if (root) p.accumulated("root", *root, {&p.r, &p.r});
  check_one_form(p, sigma, c, root);

  const NoGrad no_grad;
  const ScalarType wide = accumulate_dtype(p.dtype);
  const Tensor g = empty_cpu({p.S.size, p.N.size}, wide), inverse = empty_cpu({p.S.size, p.N.size}, wide);
  if (p.N.size > 0) {
    const Tensor bt = transposed_basis(b), lengths = dense(rho);
    const Tensor cores = page_views(in_dtype(pages, wide)), factors = dense(in_dtype(m, wide));
    const MaybeTensor ct = c ? MaybeTensor(transposed_basis(*c)) : std::nullopt;
    const MaybeTensor lower = root ? MaybeTensor(dense(*root)) : std::nullopt;
    const MaybeTensor values = sigma ? MaybeTensor(dense(*sigma)) : std::nullopt;
    visit_dtypes(p, [&](auto types) {
      using T = typename decltype(types)::Element;
      using A = cpu::acc_t<T>;
      cpu::row_scale<T>({p.N.size, p.r.size, p.S.size, data<T>(bt), ct ? data<A>(*ct) : nullptr, data<A>(cores),
                         lower ? data<A>(*lower) : nullptr, cores.stride(0), values ? data<A>(*values) : nullptr,
                         data<A>(lengths), data<A>(factors), mutable_data<A>(g), mutable_data<A>(inverse), scale});
    });
  }
  return {in_dtype(g, m.scalar_type()), inverse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) {
  m.impl("row_scale", TORCH_BOX(&row_scale));
  m.impl("_row_scale", TORCH_BOX(&row_scale));
}

}  // namespace loraxs
