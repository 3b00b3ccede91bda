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

namespace loraxs {

// What one memory instruction moves: 16 bytes of a 16-bit type, or two times 16 of fp32.
template <class T>
struct alignas(16) Eight {
  T v[8];
};
template <class T>
struct alignas(4 * sizeof(T)) Four {
  T v[4];
};
// Eight 16-bit numbers as the registers of an MMA operand.
struct alignas(16) Pairs {
  uint32_t v[4];
};

template <class A>
__device__ __forceinline__ A warp_sum(A v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  return v;
}

// Slot of token m; the device stops on a value outside [-1, S) before anything is read with it.
__device__ __forceinline__ int64_t slot_of(const int32_t* slots, int64_t m, int64_t S) {
  const int64_t slot = slots != nullptr ? slots[m] : 0;
  if (slot < -1 || slot >= S) stop();
  return slot;
}

}  // namespace loraxs
