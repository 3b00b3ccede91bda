// The kernels of one instruction-set level as a table. Included once per level, after LORAXS_SIMD named its vectors.
// Tables are constinit: nothing of a level may run before the CPU is known to have it.
#pragma once
#if defined(__AVX512F__)
#include "cpu/across.h"
#endif
#include "cpu/expand.h"
#include "cpu/paged.h"
#include "cpu/project.h"
#include "cpu/rescale.h"
#include "cpu/row_scale.h"

namespace loraxs::cpu {
namespace {

#if defined(__AVX512F__)
template <class T>
constexpr Dense<T> dense = {project<T>, expand<T>, across<T>};
#else
template <class T>
constexpr Dense<T> dense = {project<T>, expand<T>, nullptr};
#endif

template <class T, class P>
constexpr Scaled<T, P> scaled = {rescale<T, P>, rescale_back<T, P>, total<acc_t<T>, P>};

constexpr Kernels level(Dense<bf16> half = dense<bf16>, Fused<float> fused_single = {}, Fused<bf16> fused_half = {},
                        Many<bf16> many = {}) {
  return {
      dense<float>,
      half,
      dense<f16>,
      {rotate<float, float>, outer<float, float>},
      {rotate<float, bf16>, outer<float, bf16>},
      {rotate<float, f16>, outer<float, f16>},
      scaled<float, float>,
      scaled<bf16, bf16>,
      scaled<bf16, float>,
      scaled<f16, f16>,
      scaled<f16, float>,
      {row_scale<float>},
      {row_scale<bf16>},
      {row_scale<f16>},
      fused_single,
      fused_half,
      many,
  };
}

}  // namespace
}  // namespace loraxs::cpu
