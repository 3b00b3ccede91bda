// loraxs::_linear_decode on CUDA: `linear` for few tokens, where kernels/linear_decode_plan.h says that it fits.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <tuple>

#include "cuda/linear_decode.h"
#include "glue/cuda.h"

namespace loraxs {
namespace {

std::tuple<Tensor, Tensor> linear_decode(const Tensor& x, const Tensor& weight, const MaybeTensor& bias,
                                         const Tensor& a, const Tensor& b, const Tensor& pages,
                                         const MaybeTensor& slots, double scale, double p_drop,
                                         const MaybeTensor& rng) {
  Problem g("_linear_decode");
  g.rows("x", x, g.K);
  g.plain("weight", weight, {&g.N, &g.K});
  if (bias) g.plain("bias", *bias, {&g.N});
  g.plain("a", a, {&g.r, &g.K});
  g.plain("b", b, {&g.N, &g.r});
  g.pages(pages);
  const MaybeTensor slot_rows = g.device_slots(slots);
  g.device_dropout(p_drop, rng);
  const int32_t device = x.get_device_index();
  g.on_device(device, {{"x", &x},
                       {"weight", &weight},
                       {"bias", bias ? &*bias : nullptr},
                       {"a", &a},
                       {"b", &b},
                       {"pages", &pages},
                       {"slots", slots ? &*slots : nullptr}});
  const int major = capability_major(device);
  const decode::Plan plan = decode::plan(g.M.size, g.N.size, g.K.size, g.r.size, major);
  const bool half = g.dtype == ScalarType::BFloat16 || g.dtype == ScalarType::Half;
  if (!plan.fits || !half || p_drop != 0)
    fail(g.op, "x", "a call without dropout that linear_decode_fits",
         "M=" + std::to_string(g.M.size) + ", N=" + std::to_string(g.N.size) + ", K=" + std::to_string(g.K.size) +
             ", r=" + std::to_string(g.r.size) + " on compute capability " + std::to_string(major) + ".x");

  const NoGrad no_grad;
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor x_rows = aligned(x), w_rows = aligned(weight), a_rows = aligned(a), bt = transposed_basis(b),
               page_rows = page_views(pages);
  const MaybeTensor bias_row = bias ? MaybeTensor(dense(*bias)) : std::nullopt;
  const Tensor y = empty_rows(x, g.N.size, g.dtype, aoti_torch_device_type_cuda(), device);
  const int64_t p_sizes[] = {g.M.size, g.r.size}, scratch_size = plan.workspace(g.M.size, g.r.size);
  const Tensor p = empty_cuda(p_sizes, 2, ScalarType::Float, device);
  const Tensor scratch = empty_cuda(&scratch_size, 1, ScalarType::Float, device);
  expect_launched(
      g.op, cuda::linear_decode(
                {y.mutable_data_ptr(), static_cast<float*>(p.mutable_data_ptr()), x_rows.const_data_ptr(),
                 w_rows.const_data_ptr(), bias_row ? bias_row->const_data_ptr() : nullptr, a_rows.const_data_ptr(),
                 bt.const_data_ptr(), page_rows.const_data_ptr(), page_rows.stride(0),
                 slot_rows ? static_cast<const int32_t*>(slot_rows->const_data_ptr()) : nullptr, g.M.size, g.K.size,
                 g.N.size, g.S.size, int(g.r.size), scale, dtype_of(g.dtype), dtype_of(g.pages_dtype),
                 static_cast<float*>(scratch.mutable_data_ptr())},
                plan, current_stream(device)));
  return {y, p};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(loraxs, CUDA, m) { m.impl("_linear_decode", TORCH_BOX(&linear_decode)); }

}  // namespace loraxs
