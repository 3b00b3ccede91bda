// p = x aᵀ and q = s R_slot p for few tokens and ranks up to 128: the first of two kernels; linear_decode adds q bᵀ.
//
// A cluster of 8 blocks has 8 tokens. Each block forms p over an eighth of K; then each takes one token, adds its
// eighths in the order of K and applies its R. The next kernel may start at once: it streams W and waits before it
// reads q.
#pragma once
#include "kernels/async.cuh"

namespace loraxs::project {

constexpr int kBlocks = 8;  // per cluster
constexpr int kTokens = 8;
constexpr int kWarps = 8, kThreads = kWarps * 32;

// The tokens' parts of p, and the whole p of one.
constexpr size_t shared_bytes(int r) { return size_t(kTokens + 1) * r * sizeof(float); }

template <class T>
struct Args {
  float *p, *q;       // [M, r]
  const T *x, *a;     // [M, K], [r, K]: K a multiple of 8, addresses of 16 bytes
  const void* pages;  // [S, r, r] of float if wide_pages, else of T; page_stride numbers from one to the next
  int64_t page_stride;
  const int32_t* slots;  // [M] with values in [-1, S), or null: slot 0
  int M, K, r;
  int64_t S;
  float scale;
  bool wide_pages;
};

// p of 8 tokens and 16 ranks over steps [begin, end) of 32 columns. Operands come straight from global memory: a lane
// takes 8 neighbours of a row, and as a and x use the same order within a step, it need not be the order of the MMA.
template <class T>
__device__ __forceinline__ void project(const Args<T>& g, int m0, int i0, int begin, int end, float (&sum)[4]) {
  const int lane = int(threadIdx.x) % 32;
  const T* a_low = g.a + int64_t(min(i0 + lane / 4, g.r - 1)) * g.K;
  const T* a_high = g.a + int64_t(min(i0 + lane / 4 + 8, g.r - 1)) * g.K;
  const T* x = g.x + int64_t(min(m0 + lane / 4, g.M - 1)) * g.K;
#pragma unroll 4
  for (int step = begin; step < end; ++step) {
    const int k = step * 32 + lane % 4 * 8;
    Pairs low{}, high{}, tx{};
    if (k < g.K) {
      low = *reinterpret_cast<const Pairs*>(a_low + k);
      high = *reinterpret_cast<const Pairs*>(a_high + k);
      tx = *reinterpret_cast<const Pairs*>(x + k);
    }
    for (int half = 0; half < 4; half += 2) {
      const uint32_t a[4] = {low.v[half], high.v[half], low.v[half + 1], high.v[half + 1]};
      mma<T>(sum, a, tx.v[half], tx.v[half + 1]);
    }
  }
}

// q of token m by all warps, a row of R each; sp [r].
template <class T, class P>
__device__ __forceinline__ void apply_page(const Args<T>& g, int m, int64_t slot, const P* pages, const float* sp) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  for (int i = warp; i < g.r; i += kWarps) {
    float sum = 0;
    for (int j = lane; slot >= 0 && j < g.r; j += 32) {
      float tr;
      widen(pages[slot * g.page_stride + i * g.r + j], tr);
      sum += tr * sp[j];
    }
    sum = warp_sum(sum);
    if (lane == 0) g.q[int64_t(m) * g.r + i] = g.scale * sum;
  }
}

// Grid (8, ceil(M / 8)) in clusters of 8.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) linear_project_kernel(Args<T> g) {
  if constexpr (kHasHopperCode) {
    // In this order: the next kernel counts on everything before this one being finished.
    wait_for_previous_kernel();
    allow_next_kernel();

    LORAXS_DYNAMIC_SHARED(float, sp);  // [kTokens, r], then [r]
    const int part = int(blockIdx.x), m0 = int(blockIdx.y) * kTokens, m = m0 + part;
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    const int steps = (g.K + 31) / 32;
    for (int i0 = warp * 16; i0 < g.r; i0 += kWarps * 16) {
      float sum[4] = {};
      project(g, m0, i0, steps * part / kBlocks, steps * (part + 1) / kBlocks, sum);
      for (int c = 0; c < 4; ++c) {
        const int i = i0 + lane / 4 + c / 2 * 8;
        if (i < g.r) sp[(lane % 4 * 2 + c % 2) * g.r + i] = sum[c];
      }
    }
    cluster_sync();

    float* total = sp + kTokens * g.r;
    if (m < g.M) {
      for (int i = int(threadIdx.x); i < g.r; i += kThreads) {
        float sum = 0;
        for (int from = 0; from < kBlocks; ++from) sum += cluster_shared(sp, unsigned(from))[part * g.r + i];
        total[i] = sum;
        g.p[int64_t(m) * g.r + i] = sum;
      }
      __syncthreads();
      const int64_t slot = slot_of(g.slots, m, g.S);
      if (g.wide_pages)
        apply_page(g, m, slot, static_cast<const float*>(g.pages), total);
      else
        apply_page(g, m, slot, static_cast<const T*>(g.pages), total);
    }
    cluster_sync();  // nobody leaves while its shared memory is read
  }
}

}  // namespace loraxs::project
