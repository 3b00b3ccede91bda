#define LORAXS_SIMD "cpu/simd_avx512.h"
#include "cpu/fused_panels.h"
#include "cpu/fused_single.h"
#include "cpu/fused_tiles.h"
#include "cpu/level.h"

namespace loraxs::cpu {

constinit const Kernels amx_bf16_kernels =
    level({project_tiles, expand_tiles, across<bf16>}, fused_single, fused_tiles, fused_panels);

}  // namespace loraxs::cpu
