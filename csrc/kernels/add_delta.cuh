// y += s * (drop(x) aᵀ R_slotᵀ) b for a tile of tokens per block; the grid depends on M alone.
//
// Each warp forms p of one token from the whole row of x, then all threads turn p into q with the token's own R, then
// every thread adds one column for all tokens of the tile, so that bt is read once a tile and y once.
#pragma once
#include "kernels/device.h"
#include "kernels/philox.h"

namespace loraxs {

constexpr int kTokens = 8;  // tokens per block, one warp each
constexpr int kThreads = kTokens * 32;
constexpr int kRanks = 8;      // ranks that share one pass over x, and one recomputation of its mask
constexpr int kMaxRank = 384;  // p and q of a tile in fp64 fill the 48 KiB that every device grants

template <class T, class P>
struct AddDelta {
  T* y;            // [M, N]
  const T* x;      // [M, K]
  const T* a;      // [r, K]
  const T* bt;     // [r, N]
  const P* pages;  // [S, r, r], page_stride numbers from one to the next
  int64_t page_stride;
  const int32_t* slots;  // [M] with values in [-1, S), or null: slot 0
  const int64_t* rng;    // (seed, offset), or null: no dropout
  uint32_t cutoff;       // see Dropout
  int64_t M, K, N, S;
  int r;
  double scale, keep_scale;
};

// p[i] of token m for all ranks, by one warp; lanes take groups of four columns, as the random numbers come in fours.
template <class A, class T, class P>
__device__ void project_token(const AddDelta<T, P>& g, int64_t m, A* p) {
  const int lane = int(threadIdx.x) % 32;
  Dropout drop{};
  if (g.rng != nullptr) {
    const uint64_t seed = uint64_t(g.rng[0]), offset = uint64_t(g.rng[1]);
    drop = {{uint32_t(seed), uint32_t(seed >> 32)}, {uint32_t(offset), uint32_t(offset >> 32)}, g.cutoff};
  }
  for (int i0 = 0; i0 < g.r; i0 += kRanks) {
    A sum[kRanks] = {};
    for (int64_t k = lane * 4; k < g.K; k += 128) {
      uint32_t random[4];
      if (g.rng != nullptr) philox4x32(uint32_t(k / 4), uint32_t(m), drop, random);
      for (int c = 0; c < 4 && k + c < g.K; ++c) {
        if (g.rng != nullptr && random[c] <= drop.cutoff) continue;
        A tx;
        widen(g.x[m * g.K + k + c], tx);
        for (int i = 0; i < kRanks && i0 + i < g.r; ++i) {
          A ta;
          widen(g.a[(i0 + i) * g.K + k + c], ta);
          sum[i] += tx * ta;
        }
      }
    }
    for (int i = 0; i < kRanks; ++i) {
      const A total = warp_sum(sum[i]) * A(g.keep_scale);
      if (lane == 0 && i0 + i < g.r) p[i0 + i] = total;
    }
  }
}

template <class A, class T, class P>
__global__ void __launch_bounds__(kThreads, 2) add_delta_kernel(AddDelta<T, P> g) {
  LORAXS_DYNAMIC_SHARED(A, sp);  // [kTokens, r]
  A* sq = sp + kTokens * g.r;    // [kTokens, r]
  const int64_t m0 = int64_t(blockIdx.x) * kTokens;
  const int tokens = int(g.M - m0 < kTokens ? g.M - m0 : kTokens);

  const int warp = int(threadIdx.x) / 32;
  if (warp < tokens) project_token<A>(g, m0 + warp, sp + warp * g.r);
  __syncthreads();

  for (int t = int(threadIdx.x); t < tokens * g.r; t += kThreads) {
    const int token = t / g.r, i = t % g.r;
    const int64_t slot = slot_of(g.slots, m0 + token, g.S);
    A sum = 0;
    for (int j = 0; slot >= 0 && j < g.r; ++j) {
      A tr;
      widen(g.pages[slot * g.page_stride + i * g.r + j], tr);
      sum += tr * sp[token * g.r + j];
    }
    sq[t] = A(g.scale) * sum;
  }
  __syncthreads();

  for (int64_t n = threadIdx.x; n < g.N; n += kThreads) {
    A sum[kTokens] = {};
    for (int i = 0; i < g.r; ++i) {
      A tb;
      widen(g.bt[i * g.N + n], tb);
      // Unrolled over the whole tile, so that the sums stay in registers.
#pragma unroll
      for (int token = 0; token < kTokens; ++token)
        if (token < tokens) sum[token] += sq[token * g.r + i] * tb;
    }
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      if (token >= tokens) break;
      // A base row is left alone: adding zero could still change a bit.
      if (g.slots != nullptr && g.slots[m0 + token] < 0) continue;
      T& y = g.y[(m0 + token) * g.N + n];
      A ty;
      widen(y, ty);
      narrow(ty + sum[token], y);
    }
  }
}

}  // namespace loraxs
