// AVX-512 F/BW/DQ/VL, with BF16 where the file is compiled for it: 16 fp32 lanes. See simd_portable.h for the contract.
#pragma once
#include <immintrin.h>

#include "cpu/lowrank.h"

namespace loraxs::cpu {
namespace {

constexpr int kRows = 6;         // 6 x 4 sums, 4 + 1 operands: 29 of 32 registers
constexpr int kExpandVecs = 4;   // the same block in expand
constexpr int kOuterVecs = 4;    // 4 x 4 sums of a gradient
constexpr int kSingleRanks = 8;  // one row: 8 independent chains cover the FMA latency; more streams slow memory down

template <class A>
struct Vec;
template <>
struct Vec<float> {
  static constexpr int lanes = 16;
  __m512 v;

  static __mmask16 first(int n) { return __mmask16((1u << n) - 1); }
  static Vec zero() { return {_mm512_setzero_ps()}; }
  static Vec splat(float x) { return {_mm512_set1_ps(x)}; }
  static Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static Vec load(const bf16* p) { return from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static Vec load(const f16* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
  static Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
  static Vec load_n(const bf16* p, int n) { return from_bf16(_mm256_maskz_loadu_epi16(first(n), p)); }
  static Vec load_n(const f16* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p))}; }
  void store(float* p) const { _mm512_storeu_ps(p, v); }
  void store(bf16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bf16()); }
  void store(f16* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0)); }
  void store_n(float* p, int n) const { _mm512_mask_storeu_ps(p, first(n), v); }
  void store_n(bf16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), to_bf16()); }
  void store_n(f16* p, int n) const { _mm256_mask_storeu_epi16(p, first(n), _mm512_cvtps_ph(v, 0)); }
  Vec fma(Vec a, Vec b) const { return {_mm512_fmadd_ps(a.v, b.v, v)}; }
  Vec operator+(Vec o) const { return {_mm512_add_ps(v, o.v)}; }
  Vec operator*(Vec o) const { return {_mm512_mul_ps(v, o.v)}; }
  Vec inverse_root() const {
    const __mmask16 positive = _mm512_cmp_ps_mask(v, _mm512_setzero_ps(), _CMP_GT_OQ);
    return {_mm512_maskz_div_ps(positive, _mm512_set1_ps(1), _mm512_sqrt_ps(v))};
  }
  Vec keep_lanes(uint32_t bits) const { return {_mm512_maskz_mov_ps(__mmask16(bits), v)}; }
  // Element i of every 128-bit lane: the sum of that lane of the i-th vector.
  static __m512 sum_lanes(Vec a, Vec b, Vec c, Vec d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  }
  static void sum4(Vec a, Vec b, Vec c, Vec d, float alpha, bool fresh, float out[4]) {
    const __m512 t = sum_lanes(a, b, c, d);
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(t), _mm512_extractf32x8_ps(t, 1));
    const __m128 s = _mm_mul_ps(_mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1)), _mm_set1_ps(alpha));
    _mm_storeu_ps(out, fresh ? s : _mm_add_ps(_mm_loadu_ps(out), s));
  }

 private:
  static Vec from_bf16(__m256i h) { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))}; }
  __m256i to_bf16() const {
#if defined(__AVX512BF16__)
    return (__m256i)_mm512_cvtneps_pbh(v);
#else
    // Round to nearest even; NaN stays NaN.
    const __m512i u = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    const __m512i r = _mm512_mask_or_epi32(rounded, nan, u, _mm512_set1_epi32(0x400000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
#endif
  }
};

// (hi, lo) words of a 32 x 32 bit product in every lane.
inline void mul_wide(__m512i a, __m512i b, __m512i* hi, __m512i* lo) {
  const __m512i even = _mm512_mul_epu32(a, b), odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), b);
  *lo = _mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
  *hi = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
}

// Bit c of out[w] says whether column 64 * (w0 + w) + c of row m is kept.
inline void keep_words(const Dropout& d, uint32_t m, uint32_t w0, uint64_t* out, int words) {
  const __m512i mul0 = _mm512_set1_epi32(int(kPhiloxMul0)), mul1 = _mm512_set1_epi32(int(kPhiloxMul1));
  const __m512i cutoff = _mm512_set1_epi32(int(d.cutoff));
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int w = 0; w < words; ++w) {
    __m512i c0 = _mm512_add_epi32(_mm512_set1_epi32(int((w0 + w) * 16)), lane), c1 = _mm512_set1_epi32(int(m));
    __m512i c2 = _mm512_set1_epi32(int(d.offset[0])), c3 = _mm512_set1_epi32(int(d.offset[1]));
    uint32_t k0 = d.seed[0], k1 = d.seed[1];
    for (int round = 0; round < 10; ++round) {
      __m512i hi0, lo0, hi1, lo1;
      mul_wide(c0, mul0, &hi0, &lo0);
      mul_wide(c2, mul1, &hi1, &lo1);
      c0 = _mm512_ternarylogic_epi32(hi1, c1, _mm512_set1_epi32(int(k0)), 0x96);
      c2 = _mm512_ternarylogic_epi32(hi0, c3, _mm512_set1_epi32(int(k1)), 0x96);
      c1 = lo1, c3 = lo0;
      k0 += kPhiloxWeyl0, k1 += kPhiloxWeyl1;
    }
    constexpr uint64_t every4 = 0x1111111111111111ull;
    out[w] = _pdep_u64(_mm512_cmpgt_epu32_mask(c0, cutoff), every4) |
             _pdep_u64(_mm512_cmpgt_epu32_mask(c1, cutoff), every4 << 1) |
             _pdep_u64(_mm512_cmpgt_epu32_mask(c2, cutoff), every4 << 2) |
             _pdep_u64(_mm512_cmpgt_epu32_mask(c3, cutoff), every4 << 3);
  }
}

}  // namespace
}  // namespace loraxs::cpu
