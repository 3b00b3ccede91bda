// The kernels of one instruction-set level as a table. Included once per level, after LORAXS_SIMD named its vectors.
// Tables are constinit: nothing of a level may run before the CPU is known to have it.
#pragma once
#include "cpu/expand.h"
#include "cpu/paged.h"
#include "cpu/project.h"

namespace loraxs::cpu {
namespace {

constexpr Kernels level(Dense<bf16> half = {project<bf16>, expand<bf16>}, Fused<float> fused_single = {},
                        Fused<bf16> fused_half = {}) {
  return {
      {project<float>, expand<float>},
      half,
      {project<f16>, expand<f16>},
      {rotate<float, float>, outer<float, float>},
      {rotate<float, bf16>, outer<float, bf16>},
      {rotate<float, f16>, outer<float, f16>},
      fused_single,
      fused_half,
  };
}

}  // namespace
}  // namespace loraxs::cpu
