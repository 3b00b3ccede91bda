#define LORAXS_SIMD "cpu/simd_avx2.h"
#include "cpu/level.h"

namespace loraxs::cpu {

constinit const Kernels avx2_kernels = level();

}  // namespace loraxs::cpu
