// Tensor-core operations for simt.h; the names of kernels/mma.cuh. Products are exact, sums run in fp32 in the order of
// k.
#pragma once
#include "testing/simt.h"

namespace loraxs {

template <size_t kMatrices>
inline void load_matrices(uint32_t (&out)[kMatrices], const void* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) simt::fail("ldmatrix: a row is not at a multiple of 16 bytes");
  const auto rows = simt::gather(row);
  const unsigned lane = simt::lane();
  for (size_t i = 0; i < kMatrices; ++i)
    std::memcpy(&out[i], static_cast<const unsigned char*>(rows[i * 8 + lane / 4]) + lane % 4 * 4, 4);
}

template <class T>
float part_of_pair(uint32_t pair, unsigned which) {
  T x[2];
  std::memcpy(x, &pair, 4);
  float v;
  widen(x[which], v);
  return v;
}

struct MmaOperands {
  uint32_t a[4], b[2];
};

template <class T>
inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto all = simt::gather(MmaOperands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned g = simt::lane() / 4, t = simt::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t pa = all[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2],
                     pb = all[column * 4 + k % 8 / 2].b[k / 8];
      d[i] += part_of_pair<T>(pa, k % 2) * part_of_pair<T>(pb, k % 2);
    }
  }
}

struct Tf32Operands {
  float a[4], b[2];
};

inline float round_to_tf32(float x) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  u &= 0xffffe000u;
  std::memcpy(&x, &u, 4);
  return x;
}

inline void mma_tf32(float (&d)[4], const float (&a)[4], float b0, float b1) {
  for (const float v : {a[0], a[1], a[2], a[3], b0, b1})
    if (v == v && round_to_tf32(v) != v) simt::fail("mma_tf32: an operand has more than 10 bits of fraction");
  const auto all = simt::gather(Tf32Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const unsigned g = simt::lane() / 4, t = simt::lane() % 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
    for (unsigned k = 0; k < 8; ++k)
      d[i] += all[row % 8 * 4 + k % 4].a[row / 8 + k / 4 * 2] * all[column * 4 + k % 4].b[k / 4];
  }
}

}  // namespace loraxs
