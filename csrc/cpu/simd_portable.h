// Plain C++ vectors: 16 bytes' worth of a loop that any compiler can vectorise. Also the only fp64 path.
//
// Each simd_*.h offers the same names: Vec<acc> with load/store (whole and first-n) from every element type, fma, sum4,
// inverse_root, keep_lanes, plus keep_words, and the register-block sizes that suit the instruction set. Everything is
// in an anonymous namespace: the files that include this are compiled for different CPUs, and the linker must not merge
// their copies.
#pragma once
#include <cmath>
#include <cstring>

#include "cpu/lowrank.h"

namespace loraxs::cpu {
namespace {

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) {
  const uint32_t u = uint32_t(x.bits) << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline float widen(f16 x) {
  // A half's exponent and mantissa in a float's place is the value times 2^-112; scaling back also settles subnormals.
  const uint32_t magnitude = uint32_t(x.bits & 0x7fff) << 13, sign = uint32_t(x.bits & 0x8000) << 16;
  float f;
  if (magnitude >= 0x0f800000u) {  // infinity and NaN
    const uint32_t u = magnitude | 0x7f800000u;
    std::memcpy(&f, &u, 4);
  } else {
    std::memcpy(&f, &magnitude, 4);
    f *= 0x1p112f;
  }
  uint32_t u;
  std::memcpy(&u, &f, 4);
  u |= sign;
  std::memcpy(&f, &u, 4);
  return f;
}

inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(double x, float* out) { *out = float(x); }
inline void narrow(float x, bf16* out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const bool nan = (u & 0x7fffffffu) > 0x7f800000u;
  out->bits = nan ? uint16_t(u >> 16 | 0x40) : uint16_t((u + 0x7fffu + (u >> 16 & 1)) >> 16);
}
inline void narrow(float x, f16* out) {
  uint32_t u;
  std::memcpy(&u, &x, 4);
  const uint16_t sign = uint16_t(u >> 16 & 0x8000);
  const uint32_t magnitude = u & 0x7fffffffu;
  if (magnitude > 0x7f800000u) {
    out->bits = sign | 0x7e00;
  } else if (magnitude >= 0x477ff000u) {  // rounds to 65520 or more
    out->bits = sign | 0x7c00;
  } else if (magnitude < 0x38800000u) {  // subnormal half: let a float addition round at 2^-24
    float f;
    std::memcpy(&f, &magnitude, 4);
    f += 0.5f;
    uint32_t v;
    std::memcpy(&v, &f, 4);
    out->bits = uint16_t(sign | (v - 0x3f000000u));
  } else {
    out->bits = uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1)) >> 13));
  }
}

constexpr int kRows = 2;         // rows per register block
constexpr int kExpandVecs = 2;   // vectors per register block of expand
constexpr int kOuterVecs = 1;    // vectors per register block of a gradient, beside 4 rows
constexpr int kSingleRanks = 4;  // ranks per block when there is only one row

template <class A>
struct Vec {
  static constexpr int lanes = 16 / sizeof(A);
  A v[lanes];

  static Vec splat(A x) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = x;
    return r;
  }
  static Vec zero() { return splat(A(0)); }
  template <class T>
  static Vec load(const T* p) {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  template <class T>
  static Vec load_n(const T* p, int n) {
    Vec r = zero();
    for (int i = 0; i < n; ++i) r.v[i] = widen(p[i]);
    return r;
  }
  template <class T>
  void store(T* p) const {
    for (int i = 0; i < lanes; ++i) narrow(v[i], p + i);
  }
  template <class T>
  void store_n(T* p, int n) const {
    for (int i = 0; i < n; ++i) narrow(v[i], p + i);
  }
  // this + a * b
  Vec fma(const Vec& a, const Vec& b) const {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = v[i] + a.v[i] * b.v[i];
    return r;
  }
  Vec operator+(const Vec& o) const {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = v[i] + o.v[i];
    return r;
  }
  Vec operator*(const Vec& o) const {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = v[i] * o.v[i];
    return r;
  }
  // 1 / √v, and zero where v is not positive.
  Vec inverse_root() const {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = v[i] > 0 ? 1 / std::sqrt(v[i]) : A(0);
    return r;
  }
  // Lanes whose bit is 0 become zero.
  Vec keep_lanes(uint32_t bits) const {
    Vec r;
    for (int i = 0; i < lanes; ++i) r.v[i] = bits >> i & 1 ? v[i] : A(0);
    return r;
  }
  // out[i] = (fresh ? 0 : out[i]) + alpha * (sum of the lanes of the i-th vector)
  static void sum4(const Vec& a, const Vec& b, const Vec& c, const Vec& d, A alpha, bool fresh, A out[4]) {
    A s[4] = {};
    for (int i = 0; i < lanes; ++i) s[0] += a.v[i], s[1] += b.v[i], s[2] += c.v[i], s[3] += d.v[i];
    for (int i = 0; i < 4; ++i) out[i] = fresh ? alpha * s[i] : out[i] + alpha * s[i];
  }
};

// Bit c of out[w] says whether column 64 * (w0 + w) + c of row m is kept.
inline void keep_words(const Dropout& d, uint32_t m, uint32_t w0, uint64_t* out, int words) {
  for (int w = 0; w < words; ++w) {
    uint64_t bits = 0;
    for (uint32_t block = 0; block < 16; ++block) {
      uint32_t u[4];
      philox4x32((w0 + w) * 16 + block, m, d, u);
      for (int i = 0; i < 4; ++i) bits |= uint64_t(u[i] > d.cutoff) << (block * 4 + i);
    }
    out[w] = bits;
  }
}

}  // namespace
}  // namespace loraxs::cpu
