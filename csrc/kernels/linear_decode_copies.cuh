// How the rows of W, of a and of x reach shared memory in linear_decode: chunks of K through a ring of stages.
//
// A stage holds 128 rows of W, the rows of a, then those of x, each one chunk long. What limits the kernel is the
// number of bytes under way: an H100 needs about 3.35 TB/s x 0.8 us / 132 = 20 KB of W per SM (model); each scheme says
// how many it keeps.
#pragma once
#include "kernels/async.cuh"
#include "kernels/linear_decode_plan.h"

namespace loraxs::decode {

constexpr int kWarps = 4, kThreads = kWarps * 32;

template <class T>
struct Operands {
  const T *x, *w, *a;
  int M, N, K, r;
};

template <int kTokenTiles, int kRankTiles>
struct Rows {
  static constexpr int kX = kRows + kRankTiles * 16;
  static constexpr int kCount = kX + kTokenTiles * 8;
};

// Row of a stage in global memory, `block` the multiple of 16 or 8 below it. Rows past the end of an operand are its
// last row again: their results go nowhere, and they are finite if the operand is.
template <int kTokenTiles, int kRankTiles, class T>
__device__ __forceinline__ const T* source_row(const Operands<T>& g, int n0, int row) {
  using Layout = Rows<kTokenTiles, kRankTiles>;
  if (row < kRows) return g.w + int64_t(min(n0 + row, g.N - 1)) * g.K;
  if (row < Layout::kX) return g.a + int64_t(min(row - kRows, g.r - 1)) * g.K;
  return g.x + int64_t(min(row - Layout::kX, g.M - 1)) * g.K;
}

// cp.async: any K that is a multiple of 8. 16-byte pieces change places within 128 bytes, so that ldmatrix meets no
// bank twice. Under way per block: (stages - 1) x 16 KB of W, 32 to 48 KB; an SM has room for two blocks.
struct ThreadCopies {
  static constexpr int kChunk = 64, kBlocksPerSm = 2;

  static __device__ __forceinline__ const unsigned char* at(const unsigned char* stage, int row, int piece) {
    return stage + row * 128 + ((piece ^ (row & 7)) << 4);
  }

  template <class T, int kTokenTiles, int kRankTiles>
  struct Pipe {
    static constexpr int kRowsPerPass = kThreads / 8;
    static constexpr int kCount = Rows<kTokenTiles, kRankTiles>::kCount;
    // As many stages as leave room for two blocks in the 164 KB of an A100; 256 rows come only in the 228 KB of sm_90.
    static constexpr int kStages = kCount <= 160 ? 4 : 3;
    static constexpr int kStage = kCount * 128, kBytes = kStages * kStage;
    static_assert(kBlocksPerSm * (kBytes + 1024) <= (kCount < 256 ? 164 : 228) * 1024);

    __device__ __forceinline__ Pipe(unsigned char* shared, const Operands<T>& operands, int n0, int begin, int end)
        : chunks((end - begin + kChunk - 1) / kChunk), shared_(shared), g_(operands), n0_(n0), begin_(begin) {
      for (int chunk = 0; chunk < kStages - 1; ++chunk) start(chunk);
    }

    __device__ __forceinline__ const unsigned char* wait_for(int chunk) {
      wait_copies<kStages - 2>();
      __syncthreads();  // everyone's pieces are there, and nobody reads the stage that is filled next
      start(chunk + kStages - 1);
      return shared_ + chunk % kStages * kStage;
    }
    __device__ __forceinline__ void release(int) {}
    __device__ __forceinline__ void finish() {
      wait_copies<0>();
      __syncthreads();
    }

    int chunks;

   private:
    __device__ __forceinline__ void start(int chunk) {
      if (chunk < chunks) {
        unsigned char* stage = shared_ + chunk % kStages * kStage;
        const int piece = int(threadIdx.x) % 8, k = begin_ + chunk * kChunk + piece * 8;
        const bool valid = k < g_.K;
#pragma unroll
        for (int pass = 0; pass < (kCount + kRowsPerPass - 1) / kRowsPerPass; ++pass) {
          const int row = pass * kRowsPerPass + int(threadIdx.x) / 8;
          if (kCount % kRowsPerPass != 0 && row >= kCount) break;
          const T* source = source_row<kTokenTiles, kRankTiles>(g_, n0_, row);
          copy16(const_cast<unsigned char*>(at(stage, row, piece)), source + (valid ? k : 0), valid);
        }
      }
      commit_copies();  // also an empty group: wait_for counts them
    }

    unsigned char* shared_;
    const Operands<T>& g_;
    int n0_, begin_;
  };
};

// The bulk-copy engine of sm_90: K a multiple of 256. One copy brings 512 bytes of a row, which costs no registers and
// a fraction of the issue slots; shorter pieces would cost more slots than cp.async, so the chunk is long and this is
// for 16 tokens at most. Rows lie 16 bytes apart from a multiple of 128, so that ldmatrix meets no bank twice. Under
// way per block: 64 to 128 KB of W, one block per SM.
struct BulkCopies {
  static constexpr int kChunk = 256, kBlocksPerSm = 1;
  static constexpr int kStride = kChunk * 2 + 16;

  static __device__ __forceinline__ const unsigned char* at(const unsigned char* stage, int row, int piece) {
    return stage + row * kStride + piece * 16;
  }

  template <class T, int kTokenTiles, int kRankTiles>
  struct Pipe {
    static constexpr int kStages = 2;
    static constexpr int kCount = Rows<kTokenTiles, kRankTiles>::kCount;
    static constexpr int kStage = kCount * kStride, kBytes = kStages * kStage + kStages * int(sizeof(uint64_t));
    static_assert(kBytes <= 227 * 1024 && kCount % kWarps == 0 && kSplitUnit % kChunk == 0);

    __device__ __forceinline__ Pipe(unsigned char* shared, const Operands<T>& operands, int n0, int begin, int end)
        : chunks((end - begin) / kChunk),
          shared_(shared),
          full_(reinterpret_cast<uint64_t*>(shared + kStages * kStage)),
          g_(operands),
          n0_(n0),
          begin_(begin) {
      if (threadIdx.x == 0) {
        for (int stage = 0; stage < kStages; ++stage) barrier_init(full_ + stage, kWarps);
        barrier_init_done();
      }
      __syncthreads();
      for (int chunk = 0; chunk < kStages; ++chunk) start(chunk);
    }

    __device__ __forceinline__ const unsigned char* wait_for(int chunk) {
      barrier_wait(full_ + chunk % kStages, unsigned(chunk / kStages % 2));
      __syncwarp();  // with the lane that issued copies
      return shared_ + chunk % kStages * kStage;
    }
    __device__ __forceinline__ void release(int chunk) {
      __syncthreads();
      start(chunk + kStages);
    }
    __device__ __forceinline__ void finish() {}  // the last release was a barrier already

    int chunks;

   private:
    __device__ __forceinline__ void start(int chunk) {
      if (chunk >= chunks || threadIdx.x % 32 != 0) return;
      unsigned char* stage = shared_ + chunk % kStages * kStage;
      uint64_t* full = full_ + chunk % kStages;
      barrier_arrive_expecting(full, kCount / kWarps * kChunk * 2);
      for (int row = int(threadIdx.x) / 32; row < kCount; row += kWarps)
        bulk_copy(const_cast<unsigned char*>(at(stage, row, 0)),
                  source_row<kTokenTiles, kRankTiles>(g_, n0_, row) + begin_ + chunk * kChunk, kChunk * 2, full);
    }

    unsigned char* shared_;
    uint64_t* full_;
    const Operands<T>& g_;
    int n0_, begin_;
  };
};

}  // namespace loraxs::decode
