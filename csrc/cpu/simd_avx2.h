// AVX2 + FMA + F16C: 8 fp32 lanes. See simd_portable.h for the contract.
#pragma once
#include <immintrin.h>

#include "cpu/lowrank.h"

namespace loraxs::cpu {
namespace {

constexpr int kRows = 2;         // 2 x 4 sums, 4 + 1 operands: 13 of 16 registers
constexpr int kExpandVecs = 4;   // 2 x 4 sums, 4 + 1 operands
constexpr int kOuterVecs = 2;    // 4 x 2 sums of a gradient, 2 + 1 operands
constexpr int kSingleRanks = 8;  // one row: 8 independent chains cover the FMA latency

template <class A>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int lanes = 8;
  __m256 v;

  static __m256i first(int n) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  static Vec zero() { return {_mm256_setzero_ps()}; }
  static Vec splat(float x) { return {_mm256_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static Vec load(const f16* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
  static Vec load_n(const float* p, int n) { return {_mm256_maskload_ps(p, first(n))}; }
  // AVX2 has no 16-bit masked load: go through memory.
  static Vec load_n(const bf16* p, int n) { return load(Half<bf16>(p, n).part); }
  static Vec load_n(const f16* p, int n) { return load(Half<f16>(p, n).part); }
  void store(float* p) const { _mm256_storeu_ps(p, v); }
  void store(bf16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bf16()); }
  void store(f16* p) const { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0)); }
  void store_n(float* p, int n) const { _mm256_maskstore_ps(p, first(n), v); }
  template <class T>
  void store_n(T* p, int n) const {
    Half<T> h;
    store(h.part);
    for (int i = 0; i < n; ++i) p[i] = h.part[i];
  }
  Vec fma(Vec a, Vec b) const { return {_mm256_fmadd_ps(a.v, b.v, v)}; }
  Vec operator+(Vec o) const { return {_mm256_add_ps(v, o.v)}; }
  Vec operator*(Vec o) const { return {_mm256_mul_ps(v, o.v)}; }
  Vec inverse_root() const {
    const __m256 positive = _mm256_cmp_ps(v, _mm256_setzero_ps(), _CMP_GT_OQ);
    return {_mm256_and_ps(positive, _mm256_div_ps(_mm256_set1_ps(1), _mm256_sqrt_ps(v)))};
  }
  Vec keep_lanes(uint32_t bits) const {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(bits)), lane), lane);
    return {_mm256_and_ps(v, _mm256_castsi256_ps(on))};
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float alpha, bool fresh, float out[4]) {
    const __m256 t = _mm256_hadd_ps(_mm256_hadd_ps(a.v, b.v), _mm256_hadd_ps(c.v, d.v));
    const __m128 s = _mm_mul_ps(_mm_add_ps(_mm256_castps256_ps128(t), _mm256_extractf128_ps(t, 1)), _mm_set1_ps(alpha));
    _mm_storeu_ps(out, fresh ? s : _mm_add_ps(_mm_loadu_ps(out), s));
  }

 private:
  template <class T>
  struct Half {
    T part[8];
    Half() = default;
    Half(const T* p, int n) : part{} {
      for (int i = 0; i < n; ++i) part[i] = p[i];
    }
  };
  static Vec from_bf16(__m128i h) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))}; }
  // Round to nearest even; NaN stays NaN.
  __m128i to_bf16() const {
    const __m256i u = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), one);
    const __m256i rounded = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
    const __m256i r = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan)), 16);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0x08);
    return _mm256_castsi256_si128(packed);
  }
};

// (hi, lo) words of a 32 x 32 bit product in every lane.
inline void mul_wide(__m256i a, __m256i b, __m256i* hi, __m256i* lo) {
  const __m256i even = _mm256_mul_epu32(a, b), odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), b);
  *lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
  *hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
}

// Bit c of out[w] says whether column 64 * (w0 + w) + c of row m is kept.
inline void keep_words(const Dropout& d, uint32_t m, uint32_t w0, uint64_t* out, int words) {
  const __m256i mul0 = _mm256_set1_epi32(int(kPhiloxMul0)), mul1 = _mm256_set1_epi32(int(kPhiloxMul1));
  const __m256i bias = _mm256_set1_epi32(INT32_MIN);
  const __m256i cutoff = _mm256_xor_si256(_mm256_set1_epi32(int(d.cutoff)), bias);  // unsigned order by signed compare
  for (int half = 0; half < 2 * words; ++half) {
    __m256i c0 =
        _mm256_add_epi32(_mm256_set1_epi32(int(w0 * 16 + half * 8)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i c1 = _mm256_set1_epi32(int(m)), c2 = _mm256_set1_epi32(int(d.offset[0]));
    __m256i c3 = _mm256_set1_epi32(int(d.offset[1]));
    uint32_t k0 = d.seed[0], k1 = d.seed[1];
    for (int round = 0; round < 10; ++round) {
      __m256i hi0, lo0, hi1, lo1;
      mul_wide(c0, mul0, &hi0, &lo0);
      mul_wide(c2, mul1, &hi1, &lo1);
      c0 = _mm256_xor_si256(_mm256_xor_si256(hi1, c1), _mm256_set1_epi32(int(k0)));
      c2 = _mm256_xor_si256(_mm256_xor_si256(hi0, c3), _mm256_set1_epi32(int(k1)));
      c1 = lo1, c3 = lo0;
      k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
    }
    uint64_t bits = 0;
    const __m256i c[4] = {c0, c1, c2, c3};
    for (int i = 0; i < 4; ++i) {
      const __m256i above = _mm256_cmpgt_epi32(_mm256_xor_si256(c[i], bias), cutoff);
      bits |= _pdep_u64(uint64_t(_mm256_movemask_ps(_mm256_castsi256_ps(above))), 0x11111111ull << i);
    }
    if (half % 2 == 0)
      out[half / 2] = bits;
    else
      out[half / 2] |= bits << 32;
  }
}

}  // namespace
}  // namespace loraxs::cpu
