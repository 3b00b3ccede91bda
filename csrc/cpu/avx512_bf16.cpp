#define LORAXS_SIMD "cpu/simd_avx512.h"
#include "cpu/fused_single.h"
#include "cpu/level.h"

namespace loraxs::cpu {

constinit const Kernels avx512_bf16_kernels = level(dense<bf16>, fused_single);

}  // namespace loraxs::cpu
