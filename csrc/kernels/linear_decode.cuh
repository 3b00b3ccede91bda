// y = x Wᵀ + bias + s (p R_slotᵀ) bᵀ with p = x aᵀ for few tokens: W streams through tensor cores once, in one launch.
//
// Rows of W are the M side of the MMA and tokens its N side, so that 1 to 128 tokens waste little. A block owns 128
// rows of W and one part of K; the rows of a ride in the same copies, and as everything after p is linear, each block
// applies R and b to its own part of p. The parts are then added in the order of K, whoever comes last. A token's sums
// depend on K, N and r alone: a row of a batch has the same bits as the row by itself, in this kernel.
//
// Why mma.sync on Hopper too: at 64 tokens the products keep its tensor cores busy for about 40 % of the time that the
// bytes of W take (model); wgmma would shorten what already hides.
#pragma once
#include "kernels/linear_decode_copies.cuh"

namespace loraxs::decode {

// x [M, K], w [N, K], a [r, K]: K a multiple of 8, addresses of 16 bytes.
template <class T>
struct Args {
  T* y;           // [M, N]
  float* p;       // [M, r]
  const T* bias;  // [N] or null
  Operands<T> in;
  const T* bt;        // [r, N]
  const void* pages;  // [S, r, r] of float if wide_pages, else of T; page_stride numbers from one to the next
  int64_t page_stride;
  const int32_t* slots;  // [M] with values in [-1, S), or null: slot 0
  const float* q;        // [M, r] = s R p from linear_project, where this kernel does not project itself
  float* parts;          // [tiles, splits, part_floats]: sums to be added through global memory, or null
  unsigned* counters;    // [tiles], zero: blocks that wrote theirs, where `parts` is used
  int64_t S;
  int splits;
  float scale;
  bool wide_pages;
  bool whole_pieces;  // every row of a page is whole pieces of 16 bytes, at addresses of 16 bytes
};

template <int kTokenTiles, int kRankTiles>
constexpr int kPartFloats = part_floats(kTokenTiles, kRankTiles);

template <class T, int kTokenTiles, int kRankTiles>
struct Sums {
  // Each of the 4 warps has 32 rows of W. The tiles of p go round the warps.
  static constexpr int kProjections = (kTokenTiles * kRankTiles + kWarps - 1) / kWarps;
  float y[2][kTokenTiles][4] = {};
  float p[kProjections > 0 ? kProjections : 1][4] = {};
};

template <class T, int kTokenTiles, int kRankTiles, class Copies>
__device__ __forceinline__ void multiply(Sums<T, kTokenTiles, kRankTiles>& sums, const unsigned char* stage) {
  using Layout = Rows<kTokenTiles, kRankTiles>;
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
#pragma unroll(kTokenTiles > 8 ? 1 : 4)
  for (int step = 0; step < Copies::kChunk / 16; ++step) {
    uint32_t w[2][4];
    for (int i = 0; i < 2; ++i)
      load_matrices(w[i], Copies::at(stage, warp * 32 + i * 16 + lane % 16, 2 * step + lane / 16));
    if constexpr (kTokenTiles == 1) {
      uint32_t x[2];
      load_matrices(x, Copies::at(stage, Layout::kX + lane % 8, 2 * step + lane / 8 % 2));
      for (int i = 0; i < 2; ++i) mma<T>(sums.y[i][0], w[i], x[0], x[1]);
    }
#pragma unroll
    for (int tile = 0; tile + 1 < kTokenTiles; tile += 2) {
      uint32_t x[4];
      load_matrices(x, Copies::at(stage, Layout::kX + (tile + lane / 16) * 8 + lane % 8, 2 * step + lane / 8 % 2));
      for (int i = 0; i < 2; ++i) {
        mma<T>(sums.y[i][tile], w[i], x[0], x[1]);
        mma<T>(sums.y[i][tile + 1], w[i], x[2], x[3]);
      }
    }
#pragma unroll
    for (int j = 0; j * kWarps < kTokenTiles * kRankTiles; ++j) {
      const int unit = warp + j * kWarps;
      if (unit >= kTokenTiles * kRankTiles) break;
      uint32_t a[4], x[2];
      load_matrices(a, Copies::at(stage, kRows + unit / kTokenTiles * 16 + lane % 16, 2 * step + lane / 16));
      load_matrices(x, Copies::at(stage, Layout::kX + unit % kTokenTiles * 8 + lane % 8, 2 * step + lane / 8 % 2));
      mma<T>(sums.p[j], a, x[0], x[1]);
    }
  }
}

// b of this warp's rows for 8 * kSteps ranks from `first` on, as A operands; zero outside.
template <class T, int kSteps>
struct Basis {
  T b[kSteps][2][4];

  __device__ __forceinline__ void load(const Args<T>& g, int n0, int first) {
    const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
    for (int step = 0; step < kSteps; ++step)
      for (int i = 0; i < 2; ++i)
        for (int c = 0; c < 4; ++c) {
          const int rank = first + step * 8 + lane % 4 + c / 2 * 4, n = n0 + warp * 32 + i * 16 + lane / 4 + c % 2 * 8;
          narrow(0.0f, b[step][i][c]);
          if (rank < g.in.r && n < g.in.N) b[step][i][c] = g.bt[int64_t(rank) * g.in.N + n];
        }
  }
};

// y += q bᵀ for 8 * kSteps ranks; sq [tokens, 8 * kSteps + 4]. q goes in as two TF32 numbers, so that it keeps 21 bits.
template <class T, int kTokenTiles, int kRankTiles, int kSteps>
__device__ __forceinline__ void expand(const Args<T>& g, Sums<T, kTokenTiles, kRankTiles>& sums,
                                       const Basis<T, kSteps>& basis, const float* sq) {
  const int lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile) {
    float add[2][4] = {};
    for (int step = 0; step < kSteps; ++step) {
      float high[2], low[2];
      for (int c = 0; c < 2; ++c) {
        const float q = sq[(tile * 8 + lane / 4) * (kSteps * 8 + 4) + step * 8 + lane % 4 + c * 4];
        high[c] = round_to_tf32(q), low[c] = round_to_tf32(q - high[c]);
      }
      for (int i = 0; i < 2; ++i) {
        float b[4];
        for (int c = 0; c < 4; ++c) widen(basis.b[step][i][c], b[c]);
        mma_tf32(add[i], b, low[0], low[1]);
        mma_tf32(add[i], b, high[0], high[1]);
      }
    }
    for (int c = 0; c < 2; ++c) {
      // A base row is left alone: adding zero could still change it where b is not finite.
      const int m = tile * 8 + lane % 4 * 2 + c;
      if (m >= g.in.M || (g.slots != nullptr && g.slots[m] < 0)) continue;
      for (int i = 0; i < 2; ++i) sums.y[i][tile][c] += add[i][c], sums.y[i][tile][c + 2] += add[i][c + 2];
    }
  }
}

template <class P>
__device__ __forceinline__ float dot(const P* page_row, const float* p, int r, bool whole_pieces) {
  float sum = 0;
  int j = 0;
  if (whole_pieces) {
    for (; j < r; j += 8) {
      const Eight<P> row = *reinterpret_cast<const Eight<P>*>(page_row + j);
      for (int c = 0; c < 8; ++c) {
        float v;
        widen(row.v[c], v);
        sum += v * p[j + c];
      }
    }
  }
  for (; j < r; ++j) {
    float v;
    widen(page_row[j], v);
    sum += v * p[j];
  }
  return sum;
}

// sq = s R_slot p for all tokens and kRankTiles * 16 ranks; zero outside, and for base rows. sp and sq have one stride.
template <class T, int kTokenTiles, int kRankTiles>
__device__ __forceinline__ void apply_pages(const Args<T>& g, const float* sp, float* sq) {
  constexpr int kRanks = kRankTiles * 16, kStride = kRanks + 4;
  for (int t = int(threadIdx.x); t < kTokenTiles * 8 * kRanks; t += kThreads) {
    const int m = t / kRanks, i = t % kRanks, r = g.in.r;
    float q = 0;
    if (m < g.in.M && i < r) {
      const int64_t slot = slot_of(g.slots, m, g.S), row = slot * g.page_stride + i * r;
      const float* p = sp + m * kStride;
      if (slot >= 0)
        q = g.scale * (g.wide_pages ? dot(static_cast<const float*>(g.pages) + row, p, r, g.whole_pieces)
                                    : dot(static_cast<const T*>(g.pages) + row, p, r, g.whole_pieces));
    }
    sq[m * kStride + i] = q;
  }
}

// Brings the R of every token near before it is needed; a slot out of range is found out later.
template <class T>
__device__ __forceinline__ void prefetch_pages(const Args<T>& g) {
  const int64_t element = int64_t(g.wide_pages ? sizeof(float) : sizeof(T));
  const int lines = int((g.in.r * g.in.r * element + 127) / 128);
  for (int t = int(threadIdx.x); t < g.in.M * lines; t += kThreads) {
    const int64_t slot = g.slots != nullptr ? g.slots[t / lines] : 0;
    if (slot >= 0 && slot < g.S)
      prefetch(static_cast<const unsigned char*>(g.pages) + slot * g.page_stride * element + t % lines * int64_t(128));
  }
}

template <class T, int kTokenTiles, int kRankTiles>
__device__ __forceinline__ void store_part(const Sums<T, kTokenTiles, kRankTiles>& sums, float* part) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32, row = lane / 4, token = lane % 4 * 2;
#pragma unroll
  for (int tile = 0; tile < kTokenTiles; ++tile)
    for (int i = 0; i < 2; ++i)
      for (int c = 0; c < 4; ++c)
        part[(tile * 8 + token + c % 2) * kPartRows + warp * 32 + i * 16 + row + c / 2 * 8] = sums.y[i][tile][c];
}

template <class T, int kTokenTiles, int kRankTiles>
__device__ __forceinline__ void store_projection(const Sums<T, kTokenTiles, kRankTiles>& sums, float* sp) {
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j * kWarps < kTokenTiles * kRankTiles; ++j) {
    const int unit = warp + j * kWarps;
    if (unit >= kTokenTiles * kRankTiles) break;
    const int i = unit / kTokenTiles * 16 + lane / 4, m = unit % kTokenTiles * 8 + lane % 4 * 2;
    for (int c = 0; c < 4; ++c) sp[(m + c % 2) * (kRankTiles * 16 + 4) + i + c / 2 * 8] = sums.p[j][c];
  }
}

// y and p from all parts of a tile, rows [first, first + count) of it. `part_of(split)` points at that split's part.
template <class T, int kTokenTiles, int kRankTiles, class PartOf>
__device__ __forceinline__ void add_parts(const Args<T>& g, int n0, int first, int count, bool with_p,
                                          const PartOf& part_of) {
  const int N = g.in.N;
  for (int t = int(threadIdx.x); t < g.in.M * (count / 4); t += kThreads) {
    const int m = t / (count / 4), row = first + t % (count / 4) * 4, n = n0 + row;
    if (n >= N) continue;
    Four<float> sum = {};
    for (int split = 0; split < g.splits; ++split) {
      const auto part = *reinterpret_cast<const Four<float>*>(part_of(split) + m * kPartRows + row);
      for (int c = 0; c < 4; ++c) sum.v[c] += part.v[c];
    }
    Four<T> out;
    for (int c = 0; c < 4; ++c) {
      float bias = 0;
      if (g.bias != nullptr && n + c < N) widen(g.bias[n + c], bias);
      narrow(sum.v[c] + bias, out.v[c]);
    }
    T* y = g.y + int64_t(m) * N + n;
    if (N % 4 == 0)
      *reinterpret_cast<Four<T>*>(y) = out;
    else
      for (int c = 0; c < 4 && n + c < N; ++c) y[c] = out.v[c];
  }
  if (!with_p) return;
  constexpr int kP = kTokenTiles * 8 * kPartRows, kStride = kRankTiles * 16 + 4;
  for (int t = int(threadIdx.x); t < g.in.M * g.in.r; t += kThreads) {
    float sum = 0;
    for (int split = 0; split < g.splits; ++split) sum += part_of(split)[kP + t / g.in.r * kStride + t % g.in.r];
    g.p[t] = sum;
  }
}

// True in the block that writes its part last. Leaves the counter as it was found, at zero.
__device__ __forceinline__ bool arrives_last(unsigned* counter, unsigned splits, unsigned* s_order) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *s_order = atomicInc(counter, splits - 1);
  __syncthreads();
  __threadfence();
  return *s_order == splits - 1;
}

// Grid (splits, ceil(N / 128)) of kThreads. With kCluster, the splits of a tile form a cluster and add their parts
// through each other's shared memory, a share of the rows each; otherwise the last to come adds them from global
// memory. kRankTiles is ceil(r / 16), or 0 if q comes from linear_project, which may run on while W streams.
template <class T, int kTokenTiles, int kRankTiles, class Copies, bool kCluster>
__global__ void __launch_bounds__(kThreads, Copies::kBlocksPerSm) linear_decode_kernel(Args<T> g) {
  if constexpr (kHasHopperCode || !kCluster) {
    constexpr bool kProjects = kRankTiles > 0;
    constexpr int kRanks = kProjects ? kRankTiles * 16 : 32, kStride = kRanks + 4;  // of one step of the expansion
    using Pipe = typename Copies::template Pipe<T, kTokenTiles, kRankTiles>;
    constexpr int kPart = kPartFloats<kTokenTiles, kRankTiles>;
    static_assert((kPart + kTokenTiles * 8 * kStride) * 4 <= Pipe::kBytes);

    LORAXS_DYNAMIC_SHARED(unsigned char, shared);
    const int split = int(blockIdx.x), tile = int(blockIdx.y), n0 = tile * kRows;
    const int units = (g.in.K + kSplitUnit - 1) / kSplitUnit;
    const int begin = units * split / g.splits * kSplitUnit;
    const int end = min(g.in.K, units * (split + 1) / g.splits * kSplitUnit);

    // Stream W.
    Pipe pipe(shared, g.in, n0, begin, end);
    Basis<T, kRanks / 8> basis;
    if constexpr (kProjects) {
      basis.load(g, n0, 0);
      prefetch_pages(g);
    }
    Sums<T, kTokenTiles, kRankTiles> sums;
    for (int chunk = 0; chunk < pipe.chunks; ++chunk) {
      const unsigned char* stage = pipe.wait_for(chunk);
      multiply<T, kTokenTiles, kRankTiles, Copies>(sums, stage);
      pipe.release(chunk);
    }
    pipe.finish();

    // Add the low-rank part. The stages are free now; a part that the cluster reads takes their place.
    const bool in_shared = kCluster || g.splits == 1;
    float* shared_floats = reinterpret_cast<float*>(shared);
    float* sq = shared_floats + kPart;
    float* part = in_shared ? shared_floats : g.parts + (int64_t(tile) * g.splits + split) * kPart;
    if constexpr (kProjects) {
      float* sp = shared_floats + kTokenTiles * 8 * kPartRows;
      store_projection(sums, sp);
      __syncthreads();
      apply_pages<T, kTokenTiles, kRankTiles>(g, sp, sq);
      if (!in_shared)
        for (int t = int(threadIdx.x); t < kTokenTiles * 8 * kStride; t += kThreads)
          part[kTokenTiles * 8 * kPartRows + t] = sp[t];
      __syncthreads();
      expand(g, sums, basis, sq);
    } else {
      // Each split takes its share of the ranks, 32 at a time.
      basis.load(g, n0, split * kRanks);
      wait_for_previous_kernel();
      for (int first = split * kRanks; first < g.in.r;) {
        for (int t = int(threadIdx.x); t < kTokenTiles * 8 * kRanks; t += kThreads) {
          const int m = t / kRanks, i = first + t % kRanks;
          const bool valid = m < g.in.M && i < g.in.r;
          sq[m * kStride + t % kRanks] = valid ? load_fresh(g.q + int64_t(m) * g.in.r + i) : 0.0f;
        }
        __syncthreads();
        expand(g, sums, basis, sq);
        __syncthreads();
        first += g.splits * kRanks;
        if (first < g.in.r) basis.load(g, n0, first);
      }
    }
    store_part(sums, part);

    // Add the parts.
    if constexpr (kCluster) {
      cluster_sync();
      const int count = kRows / g.splits;
      add_parts<T, kTokenTiles, kRankTiles>(g, n0, split * count, count, kProjects && tile == 0 && split == 0,
                                            [&](int s) { return cluster_shared(shared_floats, unsigned(s)); });
      cluster_sync();  // nobody leaves while its shared memory is read
    } else {
      if (in_shared)
        __syncthreads();
      else if (!arrives_last(g.counters + tile, unsigned(g.splits), reinterpret_cast<unsigned*>(sq)))
        return;
      const float* parts = in_shared ? part : g.parts + int64_t(tile) * g.splits * kPart;
      add_parts<T, kTokenTiles, kRankTiles>(g, n0, 0, kRows, kProjects && tile == 0,
                                            [&](int s) { return parts + int64_t(s) * kPart; });
    }
  }
}

// Calls launch.operator()<tokens, ranks, Copies, cluster>() for the kernel of a plan that fits.
template <class Launch>
auto choose(const Plan& plan, const Launch& launch) {
  const int tokens = plan.token_tiles;
  if (plan.two_kernels)
    return tokens == 2   ? launch.template operator()<2, 0, ThreadCopies, true>()
           : tokens == 8 ? launch.template operator()<8, 0, ThreadCopies, true>()
                         : launch.template operator()<16, 0, ThreadCopies, true>();
  if (plan.bulk)
    return plan.rank_tiles == 2 ? launch.template operator()<2, 2, BulkCopies, true>()
           : tokens == 1        ? launch.template operator()<1, 1, BulkCopies, true>()
                                : launch.template operator()<2, 1, BulkCopies, true>();
  if (plan.cluster)
    return tokens == 4 ? launch.template operator()<4, 1, ThreadCopies, true>()
                       : launch.template operator()<8, 1, ThreadCopies, true>();
  return plan.rank_tiles == 2 ? launch.template operator()<2, 2, ThreadCopies, false>()
         : tokens == 1        ? launch.template operator()<1, 1, ThreadCopies, false>()
         : tokens == 2        ? launch.template operator()<2, 1, ThreadCopies, false>()
         : tokens == 4        ? launch.template operator()<4, 1, ThreadCopies, false>()
                              : launch.template operator()<8, 1, ThreadCopies, false>();
}

}  // namespace loraxs::decode
