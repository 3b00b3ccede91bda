#define LORAXS_SIMD "cpu/simd_avx512.h"
#include "cpu/expand.h"
#include "cpu/paged.h"
#include "cpu/project.h"

namespace loraxs::cpu {

const Kernels avx512_bf16_kernels = {
    {project<float>, expand<float>},
    {project<bf16>, expand<bf16>},
    {project<f16>, expand<f16>},
    {rotate<float, float>, outer<float, float>},
    {rotate<float, bf16>, outer<float, bf16>},
    {rotate<float, f16>, outer<float, f16>},
};

}  // namespace loraxs::cpu
