#define LORAXS_SIMD "cpu/simd_avx512.h"
#include "cpu/level.h"

namespace loraxs::cpu {

constinit const Kernels avx512_kernels = level();

}  // namespace loraxs::cpu
