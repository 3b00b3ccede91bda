#define LORAXS_SIMD "cpu/simd_avx512.h"
#include "cpu/level.h"
#include "cpu/tiles.h"

namespace loraxs::cpu {

constinit const Kernels amx_bf16_kernels = level({project_tiles, expand_tiles});

}  // namespace loraxs::cpu
