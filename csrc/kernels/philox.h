// Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), for CPU and CUDA alike.
#pragma once
#include <cstdint>

#if defined(__CUDACC__)
#define LORAXS_HD __host__ __device__ __forceinline__
#else
#define LORAXS_HD inline
#endif

namespace loraxs {

constexpr uint32_t kPhiloxMul0 = 0xD2511F53u, kPhiloxMul1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;

// Dropout of element (m, k): kept iff lane k % 4 of philox(counter = (k / 4, m, offset), key = seed) exceeds `cutoff`.
// Strictly above round(p * 2^32) - 1 is the contract's "at least round(p * 2^32)" without needing a 33rd bit.
struct Dropout {
  uint32_t seed[2], offset[2];
  uint32_t cutoff;
};

// One block of four random words for row `m`, columns 4 * `block` .. 4 * `block` + 3. Internal linkage on purpose:
// files built for different instruction sets include this, and the linker must not merge their copies.
static LORAXS_HD void philox4x32(uint32_t block, uint32_t m, const Dropout& d, uint32_t out[4]) {
  uint32_t c0 = block, c1 = m, c2 = d.offset[0], c3 = d.offset[1], k0 = d.seed[0], k1 = d.seed[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t lo = uint64_t(kPhiloxMul0) * c0, hi = uint64_t(kPhiloxMul1) * c2;
    const uint32_t n0 = uint32_t(hi >> 32) ^ c1 ^ k0, n2 = uint32_t(lo >> 32) ^ c3 ^ k1;
    c1 = uint32_t(hi), c3 = uint32_t(lo), c0 = n0, c2 = n2;
    k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
  }
  out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

}  // namespace loraxs
