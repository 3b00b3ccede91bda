// Copies that run beside the arithmetic, and waiting for what others do: warps, blocks of a cluster, the kernel before.
#pragma once
#include "kernels/device.h"
#include "kernels/mma.cuh"

#if defined(__CUDACC__)
namespace loraxs {

// Clusters, bulk copies and dependent launches exist from sm_90 on; kernels that need them compile to nothing below.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasHopperCode = false;
#define LORAXS_SM90_ASM(...) __trap()
#else
constexpr bool kHasHopperCode = true;
#define LORAXS_SM90_ASM(...) asm volatile(__VA_ARGS__)
#endif

// 16 bytes from global to shared memory, or 16 zero bytes; both addresses are multiples of 16.
__device__ __forceinline__ void copy16(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// All of this thread's commits but the latest `kPending` have landed.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ void prefetch(const void* global) { asm volatile("prefetch.global.L2 [%0];" ::"l"(global)); }

// A read that may not be served by the read-only cache: another kernel wrote it while this one was running.
__device__ __forceinline__ float load_fresh(const float* global) {
  float v;
  asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(global) : "memory");
  return v;
}

// A barrier in shared memory that completes a phase when `arrivals` threads and all the bytes they expect have come.
__device__ __forceinline__ void barrier_init(uint64_t* bar, unsigned arrivals) {
  LORAXS_SM90_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(bar)), "r"(arrivals) : "memory");
}
// After barrier_init and before the block's next barrier: bulk copies see the initial value.
__device__ __forceinline__ void barrier_init_done() {
  LORAXS_SM90_ASM("fence.mbarrier_init.release.cluster;" :: : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(uint64_t* bar, unsigned bytes) {
  LORAXS_SM90_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(bar)),
                  "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* bar, unsigned parity) {
  LORAXS_SM90_ASM(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(bar)),
      "r"(parity) : "memory");
}
// `bytes` contiguous bytes, by the copy engine; addresses and size are multiples of 16.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes, uint64_t* bar) {
  LORAXS_SM90_ASM("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                      shared_address(shared)),
                  "l"(global), "r"(bytes), "r"(shared_address(bar)) : "memory");
}

// Every thread of every block of the cluster arrives, and sees what the others wrote before.
__device__ __forceinline__ void cluster_sync() {
  LORAXS_SM90_ASM(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" :: : "memory");
}
// The address of what lies at `p` in this block's shared memory in that of block `rank` of the cluster.
template <class T>
__device__ __forceinline__ const T* cluster_shared(const T* p, unsigned rank) {
  const T* there = nullptr;
  LORAXS_SM90_ASM("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(p), "r"(rank));
  return there;
}

// Launched early, a kernel waits here until the one before it has finished and its writes are visible.
__device__ __forceinline__ void wait_for_previous_kernel() { LORAXS_SM90_ASM("griddepcontrol.wait;" :: : "memory"); }
__device__ __forceinline__ void allow_next_kernel() { LORAXS_SM90_ASM("griddepcontrol.launch_dependents;"); }

}  // namespace loraxs
#else
#include "testing/simt_async.h"
#endif
