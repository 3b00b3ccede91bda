// Which calls linear_decode takes, and how it cuts them up: plain arithmetic, for the launcher, for Python and for
// tests.
#pragma once
#include <cstddef>
#include <cstdint>

namespace loraxs::decode {

constexpr int kRows = 128;       // of W per block: x is read N / 128 times from L2, half of W's bytes at 64 tokens
constexpr int kSplitUnit = 256;  // parts of K are multiples of this, a multiple of every chunk
constexpr int kPartRows = kRows + 4;

// What one block hands over: its part of y for 128 rows, and of p. The padding spreads fragments over the banks.
constexpr int part_floats(int token_tiles, int rank_tiles) {
  return token_tiles * 8 * (kPartRows + (rank_tiles > 0 ? rank_tiles * 16 + 4 : 0));
}

struct Plan {
  bool fits = false;
  bool two_kernels = false;  // linear_project first
  bool cluster = false;      // parts are added through the shared memory of a cluster, else through global memory
  bool bulk = false;         // W comes by the bulk-copy engine
  int token_tiles = 0;       // of 8 tokens
  int rank_tiles = 0;        // of 16 ranks, in the kernel that streams W; 0 with two kernels
  int tiles = 0;             // of 128 rows of W
  int splits = 0;            // of K

  constexpr bool parts_in_global() const { return !cluster && splits > 1; }
  constexpr int64_t parts() const { return int64_t(tiles) * splits * part_floats(token_tiles, rank_tiles); }
  // Scratch memory in floats: q, or the parts and a counter per tile. A function of shapes only.
  constexpr int64_t workspace(int64_t M, int64_t r) const {
    return two_kernels ? M * r : parts_in_global() ? parts() + tiles : 0;
  }
};

// For bf16 or fp16 without dropout, on a device of compute capability `major`.x (8, 9 or 10; anything else fits
// nothing).
//
// One kernel takes 64 tokens with r <= 16, or 16 tokens with r <= 32: their p costs 12 % (25 %) more products and no
// second read of anything. Two kernels take 128 tokens with r <= 128, on sm_90 and later, where the second starts while
// the first runs. K has to be a multiple of 8, so that rows start at 16 bytes; other widths belong to other owners.
constexpr Plan plan(int64_t M, int64_t N, int64_t K, int64_t r, int major) {
  constexpr int kMaxSplits = 8;  // blocks in a portable cluster
  // Blocks that fill an H100 (132 SMs) once; the same for every device, so that equal builds give equal bits.
  constexpr int kBlocks = 132;
  constexpr int64_t kMaxSize = int64_t(1) << 22;
  Plan plan;
  if (major != 8 && major != 9 && major != 10) return plan;
  if (M < 1 || N < 1 || K < 8 || r < 1 || M > 128 || N > kMaxSize || K > kMaxSize || K % 8 != 0) return plan;

  const bool one_kernel = (r <= 16 && M <= 64) || (r <= 32 && M <= 16);
  plan.two_kernels = !one_kernel;
  plan.cluster = major >= 9;
  plan.fits = one_kernel || (plan.cluster && r <= 128);
  if (one_kernel) {
    plan.rank_tiles = r <= 16 ? 1 : 2;
    plan.token_tiles = M <= 8 && r <= 16 ? 1 : M <= 16 ? 2 : M <= 32 ? 4 : 8;
    plan.bulk = plan.cluster && M <= 16 && K % kSplitUnit == 0;
    // Few tokens and an odd K: adding through global memory is cheap then, and spares a third kind of kernel.
    if (M <= 16 && !plan.bulk) plan.cluster = false;
  } else {
    plan.token_tiles = M <= 16 ? 2 : M <= 64 ? 8 : 16;
  }
  plan.tiles = int((N + kRows - 1) / kRows);
  const int units = int((K + kSplitUnit - 1) / kSplitUnit);
  plan.splits = 1;
  while (plan.splits < kMaxSplits && plan.tiles * plan.splits * 2 <= kBlocks && plan.splits * 2 <= units)
    plan.splits *= 2;
  return plan;
}

// Whether rows of pages, r numbers of `element` bytes each, can be read in eights.
inline bool whole_pieces(const void* pages, int64_t page_stride, int64_t r, size_t element) {
  return r % 8 == 0 && page_stride * element % 16 == 0 && reinterpret_cast<uintptr_t>(pages) % 16 == 0;
}

}  // namespace loraxs::decode
