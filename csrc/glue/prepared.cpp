// loraxs::_prepare, _run_prepared, _forget: fused calls of which everything but x and the slots is known before.
//
// A server repeats such calls for every token. By the time it comes back to a layer, streaming the weights of the
// others has driven the half a dozen tensor objects of this one out of the caches; here it is one record.
#include <torch/csrc/stable/ops.h>

#include <deque>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <type_traits>
#include <utility>
#include <vector>

#include "glue/base.h"
#include "glue/dispatch.h"

namespace loraxs {
namespace {

// Layers that read one x.
class Prepared {
 public:
  virtual ~Prepared() = default;
  // y of every layer; none where `linear` would not fuse either.
  virtual std::vector<Tensor> run(const Problem& g, const Tensor& x, const int32_t* slots) const = 0;

  int64_t K = 0, S = 0;
  ScalarType dtype{};
  std::vector<Tensor> kept;  // what the addresses point into
};

template <class T, class P>
class PreparedFor final : public Prepared {
 public:
  std::vector<Tensor> run(const Problem& g, const Tensor& x, const int32_t* slots) const override {
    std::vector<cpu::FusedLayer<T, P>> calls = layers;
    std::vector<Tensor> ys;
    ys.reserve(calls.size());
    for (cpu::FusedLayer<T, P>& layer : calls) {
      auto& call = layer.g;
      if (!cpu::has_fused<T>(call.r)) return {};
      ys.push_back(empty_rows(x, call.N, dtype));
      call.M = g.M.size, call.x = data<T>(x), call.slots = slots, call.out = mutable_data<T>(ys.back());
    }
    if (g.M.size > 0) cpu::fused(calls.data(), int64_t(calls.size()));
    return ys;
  }

  std::vector<cpu::FusedLayer<T, P>> layers;
};

// What is prepared, by number. Numbers are not given twice.
class Registry {
 public:
  int64_t add(std::shared_ptr<const Prepared> prepared) {
    const std::unique_lock lock(mutex_);
    while (!records_.empty() && records_.front() == nullptr) records_.pop_front(), ++first_;
    records_.push_back(std::move(prepared));
    return first_ + int64_t(records_.size()) - 1;
  }
  void remove(int64_t id) {
    const std::unique_lock lock(mutex_);
    if (has(id)) records_[size_t(id - first_)] = nullptr;
  }
  std::shared_ptr<const Prepared> find(int64_t id) {
    const std::shared_lock lock(mutex_);
    if (!has(id)) fail("_run_prepared", "id", "one of _prepare", std::to_string(id));
    return records_[size_t(id - first_)];
  }

 private:
  bool has(int64_t id) const {
    return id >= first_ && id < first_ + int64_t(records_.size()) && records_[size_t(id - first_)] != nullptr;
  }

  std::shared_mutex mutex_;
  std::deque<std::shared_ptr<const Prepared>> records_;  // neighbours are called one after the other
  int64_t first_ = 1;
};

Registry& registry() {
  // Never destroyed: Python may forget after static objects are gone.
  static Registry& instance = *new Registry;
  return instance;
}

// bias is empty where the layers have none. The result is 0 where they cannot be prepared.
int64_t prepare(const std::vector<Tensor>& weight, const std::vector<Tensor>& bias, const std::vector<Tensor>& a,
                const std::vector<Tensor>& b, const std::vector<Tensor>& pages, double scale) {
  const size_t count = weight.size();
  const auto expect_as_many = [&](const char* name, const std::vector<Tensor>& list) {
    if (list.size() != count)
      fail("_prepare", name, std::to_string(count) + " tensors, as many as weights", std::to_string(list.size()));
  };
  if (count == 0) fail("_prepare", "weight", "at least one tensor", "none");
  if (!bias.empty()) expect_as_many("bias", bias);
  expect_as_many("a", a), expect_as_many("b", b), expect_as_many("pages", pages);

  std::vector<Problem> problems;
  bool fits = true;
  for (size_t i = 0; i < count; ++i) {
    Problem g("_prepare");
    if (weight[i].dim() != 2)
      fail("_prepare", "weight", "shape [N, K]", std::to_string(weight[i].dim()) + " dimensions");
    g.rows("x", empty_cpu({0, weight[0].sizes()[1]}, weight[0].scalar_type()), g.K);
    g.plain("weight", weight[i], {&g.N, &g.K});
    if (!bias.empty()) g.plain("bias", bias[i], {&g.N});
    g.plain("a", a[i], {&g.r, &g.K});
    g.plain("b", b[i], {&g.N, &g.r});
    g.pages(pages[i]);
    const bool alike = i == 0 || (g.pages_dtype == problems[0].pages_dtype && g.S.size == problems[0].S.size);
    // A copy of anything would not follow what is written into the original.
    const bool in_place = weight[i].is_contiguous() && a[i].is_contiguous() &&
                          transposed_basis(b[i]).const_data_ptr() == b[i].const_data_ptr() &&
                          page_views(pages[i]).const_data_ptr() == pages[i].const_data_ptr() &&
                          (bias.empty() || bias[i].is_contiguous());
    fits &= alike && in_place && g.K.size > 0 && g.N.size > 0;
    problems.push_back(g);
  }
  int64_t id = 0;
  if (fits)
    visit_dtypes(problems[0], [&](auto types) {
      using T = typename decltype(types)::Element;
      using P = typename decltype(types)::Page;
      if constexpr (std::is_same_v<T, float> || std::is_same_v<T, cpu::bf16>) {
        for (const Problem& g : problems)
          if (!cpu::has_fused<T>(g.r.size)) return;
        auto prepared = std::make_shared<PreparedFor<T, P>>();
        prepared->K = problems[0].K.size, prepared->S = problems[0].S.size, prepared->dtype = problems[0].dtype;
        for (const auto* list : {&weight, &bias, &a, &b, &pages})
          prepared->kept.insert(prepared->kept.end(), list->begin(), list->end());
        for (size_t i = 0; i < count; ++i) {
          const Problem& g = problems[i];
          prepared->layers.push_back(
              {{0, g.K.size, g.N.size, g.r.size, nullptr, data<T>(a[i]), data<T>(b[i]), data<P>(pages[i]),
                pages[i].stride(0), nullptr, nullptr, nullptr, nullptr, scale, nullptr, 1.0},
               data<T>(weight[i]),
               bias.empty() ? nullptr : data<T>(bias[i])});
        }
        id = registry().add(std::move(prepared));
      }
    });
  return id;
}

std::vector<Tensor> run_prepared(const Tensor& x, const Tensor& slots, int64_t id) {
  const std::shared_ptr<const Prepared> prepared = registry().find(id);
  Problem g("_run_prepared");
  g.K.size = prepared->K, g.S.size = prepared->S;
  g.rows("x", x, g.K);
  if (g.dtype != prepared->dtype) fail("_run_prepared", "x", "the dtype of the weights", "another");
  const int32_t* s = g.slots(slots);
  if ((x.dim() != 2 && x.dim() != 3) || !x.is_contiguous()) return {};
  return prepared->run(g, x, s);
}

void forget(int64_t id) { registry().remove(id); }

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CPU, m) {
  m.impl("_prepare", TORCH_BOX(&prepare));
  m.impl("_run_prepared", TORCH_BOX(&run_prepared));
}

STABLE_TORCH_LIBRARY_IMPL(loraxs, CompositeExplicitAutograd, m) { m.impl("_forget", TORCH_BOX(&forget)); }

}  // namespace loraxs
