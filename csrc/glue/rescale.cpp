// loraxs::rescale and its backward: what a magnitude makes of the output of a layer.
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "glue/dispatch.h"

namespace loraxs {
namespace {

Tensor rescale(const Tensor& z, const Tensor& g, const MaybeTensor& slots, const MaybeTensor& bias) {
  Problem c("rescale");
  c.rows("z", z, c.N);
  c.factors(g);
  const int32_t* s = c.slots(slots);
  if (bias) c.plain("bias", *bias, {&c.N});

  const NoGrad no_grad;
  const Tensor y = empty_rows(z, c.N.size, c.dtype);
  if (c.empty()) return y;
  const Tensor rows = dense(z), scales = dense(g);
  const MaybeTensor shift = bias ? MaybeTensor(dense(*bias)) : std::nullopt;
  visit_dtypes(c, [&](auto types) {
    using T = typename decltype(types)::Element;
    using P = typename decltype(types)::Page;
    cpu::rescale<T, P>(
        {data<T>(rows), data<P>(scales), s, shift ? data<T>(*shift) : nullptr, mutable_data<T>(y), c.M.size, c.N.size});
  });
  return y;
}

std::tuple<Tensor, Tensor> rescale_backward(const Tensor& dy, const MaybeTensor& z, const Tensor& g,
                                            const MaybeTensor& slots, bool need_dz) {
  Problem c("rescale_backward");
  c.rows("dy", dy, c.N);
  if (z) c.rows("z", *z, c.N);
  c.factors(g);
  const int32_t* s = c.slots(slots);

  const NoGrad no_grad;
  Tensor dz = need_dz ? empty_rows(dy, c.N.size, c.dtype) : empty_cpu({0}, c.dtype);
  Tensor dg = z ? empty_cpu({c.S.size, c.N.size}, c.pages_dtype) : empty_cpu({0}, c.pages_dtype);
  if (c.empty()) {
    torch::stable::zero_(dg);
    return {dz, dg};
  }
  const Tensor rows = dense(dy), scales = dense(g);
  const MaybeTensor kept = z ? MaybeTensor(dense(*z)) : std::nullopt;
  visit_dtypes(c, [&](auto types) {
    using T = typename decltype(types)::Element;
    using P = typename decltype(types)::Page;
    cpu::rescale_backward<T, P>({c.M.size, c.N.size, c.S.size, data<T>(rows), kept ? data<T>(*kept) : nullptr,
                                 data<P>(scales), s, need_dz ? mutable_data<T>(dz) : nullptr,
                                 kept ? mutable_data<P>(dg) : nullptr});
  });
  return {dz, dg};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) {
  m.impl("rescale", TORCH_BOX(&rescale));
  m.impl("_rescale", TORCH_BOX(&rescale));
  m.impl("rescale_backward", TORCH_BOX(&rescale_backward));
}

}  // namespace loraxs
