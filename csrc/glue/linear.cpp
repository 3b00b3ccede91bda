// loraxs::linear and loraxs::linear_siblings: one fused product where the CPU has it, else torch's own linear and the
// low-rank part over its output.
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <type_traits>
#include <vector>

#include "glue/base.h"
#include "glue/dispatch.h"

namespace loraxs {
namespace {

// One call of the contract, checked; `lay_out` prepares it for the fused kernels.
class Call {
 public:
  Call(const char* op, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& a, const Tensor& b,
       const Tensor& pages, const MaybeTensor& slots, double scale, double p_drop, const MaybeTensor& rng)
      : g_(op), x_(x), weight_(weight), bias_(bias), a_(a), b_(b), pages_(pages), scale_(scale) {
    g_.rows("x", x, g_.K);
    g_.plain("weight", weight, {&g_.N, &g_.K});
    if (bias) g_.plain("bias", *bias, {&g_.N});
    g_.plain("a", a, {&g_.r, &g_.K});
    g_.plain("b", b, {&g_.N, &g_.r});
    g_.pages(pages);
    g_.dropout(p_drop, rng);
    slots_ = g_.slots(slots);
  }

  bool is_fused() const {
    if (g_.empty() || g_.mask() != nullptr || !is_one_product(x_, weight_)) return false;
    if (g_.dtype == ScalarType::Float) return cpu::has_fused<float>(g_.r.size);
    return g_.dtype == ScalarType::BFloat16 && cpu::has_fused<cpu::bf16>(g_.r.size);
  }

  const Problem& problem() const { return g_; }
  Tensor new_p() const { return empty_cpu({g_.M.size, g_.r.size}, accumulate_dtype(g_.dtype)); }

  // y by torch's own product and the low-rank part over it.
  Tensor in_two_steps(Tensor p) const {
    const Tensor y = base_linear(g_, x_, weight_, bias_);
    if (g_.empty())
      torch::stable::zero_(p);
    else
      add_low_rank(g_, y, x_, a_, b_, pages_, slots_, scale_, y, p);
    return y;
  }

  // An uninitialised y, and the other tensors as the fused kernels want them.
  Tensor lay_out() {
    a_ = dense(a_), b_ = transposed_basis(b_), pages_ = page_views(pages_);
    if (bias_) bias_ = dense(*bias_);
    return empty_rows(x_, g_.N.size, g_.dtype);
  }

  template <class T, class P>
  cpu::FusedLayer<T, P> pointers(const Tensor& y, const Tensor* p) const {
    return {{g_.M.size, g_.K.size, g_.N.size, g_.r.size, data<T>(x_), data<T>(a_), data<T>(b_), data<P>(pages_),
             pages_.stride(0), slots_, nullptr, mutable_data<T>(y), p ? mutable_data<cpu::acc_t<T>>(*p) : nullptr,
             scale_, nullptr, 1.0},
            data<T>(weight_),
            bias_ ? data<T>(*bias_) : nullptr};
  }

 private:
  Problem g_;
  Tensor x_, weight_;
  MaybeTensor bias_;
  Tensor a_, b_, pages_;
  double scale_;
  const int32_t* slots_;
};

// One pass over the weights of calls that share x and the dtype of pages; p, if wanted, of the only one.
void run_fused(Call* calls, Tensor* ys, size_t count, const Tensor* p) {
  for (size_t i = 0; i < count; ++i) ys[i] = calls[i].lay_out();
  visit_dtypes(calls->problem(), [&](auto types) {
    using T = typename decltype(types)::Element;
    using P = typename decltype(types)::Page;
    if constexpr (std::is_same_v<T, float> || std::is_same_v<T, cpu::bf16>) {
      std::vector<cpu::FusedLayer<T, P>> layers;
      layers.reserve(count);
      for (size_t i = 0; i < count; ++i) layers.push_back(calls[i].pointers<T, P>(ys[i], p));
      cpu::fused<T, P>(layers.data(), int64_t(count));
    }
  });
}

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const MaybeTensor& bias, const Tensor& a,
                                  const Tensor& b, const Tensor& pages, const MaybeTensor& slots, double scale,
                                  double p_drop, const MaybeTensor& rng) {
  Call call("linear", x, weight, bias, a, b, pages, slots, scale, p_drop, rng);
  const NoGrad no_grad;
  Tensor p = call.new_p();
  if (!call.is_fused()) return {call.in_two_steps(p), p};
  Tensor y;
  run_fused(&call, &y, 1, &p);
  return {y, p};
}

std::vector<Tensor> linear_siblings(const Tensor& x, const std::vector<Tensor>& weight, const std::vector<Tensor>& bias,
                                    const std::vector<Tensor>& a, const std::vector<Tensor>& b,
                                    const std::vector<Tensor>& pages, const MaybeTensor& slots, double scale) {
  const char* const op = "linear_siblings";
  const size_t count = weight.size();
  const auto expect_as_many = [&](const char* name, const std::vector<Tensor>& list) {
    if (list.size() != count)
      fail(op, name, std::to_string(count) + " tensors, as many as weights", std::to_string(list.size()));
  };
  if (count == 0) fail(op, "weight", "at least one tensor", "none");
  if (!bias.empty()) expect_as_many("bias", bias);
  expect_as_many("a", a), expect_as_many("b", b), expect_as_many("pages", pages);

  std::vector<Call> calls;
  calls.reserve(count);
  bool fused = true;
  for (size_t i = 0; i < count; ++i) {
    calls.emplace_back(op, x, weight[i], bias.empty() ? std::nullopt : MaybeTensor(bias[i]), a[i], b[i], pages[i],
                       slots, scale, 0.0, std::nullopt);
    fused &= calls[i].is_fused() && calls[i].problem().pages_dtype == calls[0].problem().pages_dtype;
  }
  const NoGrad no_grad;
  std::vector<Tensor> ys(count);
  if (fused)
    run_fused(calls.data(), ys.data(), count, nullptr);
  else
    for (size_t i = 0; i < count; ++i) ys[i] = calls[i].in_two_steps(calls[i].new_p());
  return ys;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("_linear", TORCH_BOX(&linear));
  m.impl("linear_siblings", TORCH_BOX(&linear_siblings));
}

}  // namespace loraxs
