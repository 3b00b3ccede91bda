// loraxs::linear: one fused product where the CPU has it, else torch's own linear and the low-rank part over its
// output.
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <type_traits>

#include "glue/base.h"
#include "glue/dispatch.h"

namespace loraxs {
namespace {

bool is_fused(const Problem& g, const Tensor& x, const Tensor& weight) {
  if (g.empty() || g.mask() != nullptr || !is_one_product(x, weight)) return false;
  if (g.dtype == ScalarType::Float) return cpu::has_fused<float>(g.r.size);
  return g.dtype == ScalarType::BFloat16 && cpu::has_fused<cpu::bf16>(g.r.size);
}

// One pass over the weight; p may be null.
Tensor fused_linear(const Problem& g, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& a,
                    const Tensor& b, const Tensor& pages, const int32_t* slots, double scale, const Tensor* p) {
  const Tensor y = empty_rows(x, g.N.size, g.dtype);
  const Tensor a_rows = dense(a), bt = transposed_basis(b), page_rows = page_views(pages);
  const MaybeTensor bias_row = bias ? MaybeTensor(dense(*bias)) : std::nullopt;
  visit_dtypes(g, [&](auto types) {
    using T = typename decltype(types)::Element;
    using P = typename decltype(types)::Page;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, cpu::bf16>) {
      const cpu::FusedLayer<T, P> layer{
          {g.M.size, g.K.size, g.N.size, g.r.size, data<T>(x), data<T>(a_rows), data<T>(bt), data<P>(page_rows),
           page_rows.stride(0), slots, nullptr, mutable_data<T>(y), p ? mutable_data<cpu::acc_t<T>>(*p) : nullptr,
           scale, nullptr, 1.0},
          data<T>(weight),
          bias_row ? data<T>(*bias_row) : nullptr};
      cpu::fused(&layer, 1);
    }
  });
  return y;
}

// y, and p in a tensor that is made where `p` is given or the product is not fused.
Tensor forward(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& a, const Tensor& b,
               const Tensor& pages, const MaybeTensor& slots, double scale, double p_drop, const MaybeTensor& rng,
               MaybeTensor* p) {
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
  const bool fused = is_fused(g, x, weight);
  MaybeTensor projected;
  if (p || !fused) projected = empty_cpu({g.M.size, g.r.size}, accumulate_dtype(g.dtype));
  if (p) *p = projected;
  if (fused) return fused_linear(g, x, weight, bias, a, b, pages, s, scale, projected ? &*projected : nullptr);
  const Tensor y = base_linear(g, x, weight, bias);
  if (g.empty())
    torch::stable::zero_(*projected);
  else
    add_low_rank(g, y, x, a, b, pages, s, scale, y, *projected);
  return y;
}

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& a,
                                  const Tensor& b, const Tensor& pages, const MaybeTensor& slots, double scale,
                                  double p_drop, const MaybeTensor& rng) {
  MaybeTensor p;
  Tensor y = forward(x, weight, bias, a, b, pages, slots, scale, p_drop, rng, &p);
  return {y, *p};
}

Tensor linear_output(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& a, const Tensor& b,
                     const Tensor& pages, const MaybeTensor& slots, double scale, double p_drop,
                     const MaybeTensor& rng) {
  return forward(x, weight, bias, a, b, pages, slots, scale, p_drop, rng, nullptr);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("_linear", TORCH_BOX(&linear));
  m.impl("_linear_output", TORCH_BOX(&linear_output));
}

}  // namespace loraxs
