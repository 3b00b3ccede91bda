// loraxs::add_delta_ on CUDA: check, find the stream, launch.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <cstdlib>
#include <cstring>

#include "cuda/add_delta.h"
#include "glue/cuda.h"

namespace loraxs {
namespace {

void add_delta_(Tensor y, const Tensor& x, const Tensor& a, const Tensor& b, const Tensor& pages,
                const MaybeTensor& slots, double scale, double p_drop, const MaybeTensor& rng) {
  Problem g("add_delta_");
  g.rows("x", x, g.K);
  g.rows("y", y, g.N);
  g.plain("a", a, {&g.r, &g.K});
  g.plain("b", b, {&g.N, &g.r});
  g.pages(pages);
  const MaybeTensor slot_rows = g.device_slots(slots), words = g.device_dropout(p_drop, rng);
  const int32_t device = x.get_device_index();
  g.on_device(device, {{"x", &x},
                       {"y", &y},
                       {"a", &a},
                       {"b", &b},
                       {"pages", &pages},
                       {"slots", slots ? &*slots : nullptr},
                       {"rng", rng ? &*rng : nullptr}});
  if (g.r.size > cuda::kMaxAddDeltaRank)
    fail(g.op, "a", "a rank of at most " + std::to_string(cuda::kMaxAddDeltaRank), std::to_string(g.r.size));
  if (g.empty()) return;

  const NoGrad no_grad;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor rows = dense(y), x_rows = dense(x), a_rows = dense(a), bt = transposed_basis(b),
               page_rows = page_views(pages);
  expect_launched(g.op, cuda::add_delta({rows.mutable_data_ptr(), x_rows.const_data_ptr(), a_rows.const_data_ptr(),
                                         bt.const_data_ptr(), page_rows.const_data_ptr(), page_rows.stride(0),
                                         slot_rows ? static_cast<const int32_t*>(slot_rows->const_data_ptr()) : nullptr,
                                         words ? static_cast<const int64_t*>(words->const_data_ptr()) : nullptr,
                                         g.cutoff(), g.M.size, g.K.size, g.N.size, g.S.size, int(g.r.size), scale,
                                         g.keep_scale, dtype_of(g.dtype), dtype_of(g.pages_dtype)},
                                        current_stream(device)));
  if (!y.is_contiguous()) torch::stable::copy_(y, rows);
}

// No GPU has measured this kernel yet, so it owns the op only where it is asked for (see loraxs_ext/ops/backends.py).
bool asked_for() {
  const char* backend = std::getenv("LORAXS_BACKEND");
  return backend != nullptr && std::strcmp(backend, "cuda") == 0;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CUDA, m) {
  if (asked_for()) m.impl("add_delta_", TORCH_BOX(&add_delta_));
}

}  // namespace loraxs
