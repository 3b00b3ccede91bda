// What device code needs beyond C++: shared memory, conversions, and a way to stop. nvcc and the CPU shim of
// csrc/testing/simt.h provide the same names, so that one kernel source runs on both.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define LORAXS_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char loraxs_dynamic_shared[]; \
  T* name = reinterpret_cast<T*>(loraxs_dynamic_shared)

namespace loraxs {

__device__ __forceinline__ void widen(float x, float& out) { out = x; }
__device__ __forceinline__ void widen(float x, double& out) { out = x; }
__device__ __forceinline__ void widen(double x, double& out) { out = x; }
__device__ __forceinline__ void widen(__half x, float& out) { out = __half2float(x); }
__device__ __forceinline__ void widen(__nv_bfloat16 x, float& out) { out = __bfloat162float(x); }
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void stop() { __trap(); }

}  // namespace loraxs
#else
#include "testing/simt.h"
#endif
