#define LORAXS_SIMD "cpu/simd_portable.h"
#include "cpu/level.h"

namespace loraxs::cpu {

constinit const Kernels portable_kernels = level();

const Kernels64 portable_kernels64 = {
    {project<double>, expand<double>, nullptr},
    {rotate<double, double>, outer<double, double>},
    {rotate<double, float>, outer<double, float>},
    scaled<double, double>,
    scaled<double, float>,
    {row_scale<double>},
};

}  // namespace loraxs::cpu
