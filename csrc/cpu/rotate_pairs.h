// The r x r step for one row and a page in bf16, by AVX-512, for the commonest ranks. Included once per such level.
//
// A register of the page is taken apart into its even and its odd elements, two instructions for 32 numbers; to widen
// them in order would be four. The other factor, or the result, is brought into that order once a row.
#pragma once
#include "cpu/project.h"

namespace loraxs::cpu {
namespace {

using Single = Vec<float>;

constexpr int kPair = 2 * Single::lanes;  // numbers of bf16 in a register

// Elements 0, 2, … 30 of a register and elements 1, 3, … 31, widened.
struct Pairs {
  Single even, odd;

  static Pairs load(const bf16* p) {
    const __m512i both = _mm512_loadu_si512(p);
    return {{_mm512_castsi512_ps(_mm512_slli_epi32(both, 16))},
            {_mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int(0xffff0000))))}};
  }
};

inline __m512i evens() { return _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30); }

// The same of 32 numbers in fp32.
inline Pairs apart(Single low, Single high) {
  const __m512i odds = _mm512_add_epi32(evens(), _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(low.v, evens(), high.v)}, {_mm512_permutex2var_ps(low.v, odds, high.v)}};
}

// q = alpha * R p for r = 32 C, four outputs at a time.
template <bool kAsks, int C>
void rotate_pair_rows(const float* p, const bf16* page, const bf16* next, float* q, float alpha) {
  Pairs tp[C];
  for (int c = 0; c < C; ++c) tp[c] = apart(Single::load(p + c * kPair), Single::load(p + c * kPair + Single::lanes));
  for (int64_t i = 0; i < C * kPair; i += 4) {
    Single sum[4];
    for (int k = 0; k < 4; ++k)
      for (int c = 0; c < C; ++c) {
        const bf16* at = page + (i + k) * C * kPair + c * kPair;
        const Pairs row = Pairs::load(at);
        sum[k] = (c == 0 ? row.even * tp[c].even : sum[k].fma(row.even, tp[c].even)).fma(row.odd, tp[c].odd);
        if (kAsks) __builtin_prefetch(at + (next - page), 0, kIntoL2);
      }
    Single::sum4(sum[0], sum[1], sum[2], sum[3], alpha, true, q + i);
  }
}

// q = alpha * R^T p for r = 32 C. Even and odd rows have sums of their own, as there are too few to hide the latency of
// a multiply-add.
template <bool kAsks, int C>
void rotate_pair_columns(const float* p, const bf16* page, const bf16* next, float* q, float alpha) {
  Pairs sum[2][C];
  for (int k = 0; k < 2; ++k)
    for (int c = 0; c < C; ++c) sum[k][c] = {Single::zero(), Single::zero()};
  for (int64_t i = 0; i < C * kPair; i += 2)
    for (int k = 0; k < 2; ++k) {
      const Single tp = Single::splat(p[i + k]);
      for (int c = 0; c < C; ++c) {
        const bf16* at = page + (i + k) * C * kPair + c * kPair;
        const Pairs row = Pairs::load(at);
        sum[k][c] = {sum[k][c].even.fma(row.even, tp), sum[k][c].odd.fma(row.odd, tp)};
        if (kAsks) __builtin_prefetch(at + (next - page), 0, kIntoL2);
      }
    }
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const Single scale = Single::splat(alpha);
  for (int c = 0; c < C; ++c) {
    const Single even = (sum[0][c].even + sum[1][c].even) * scale, odd = (sum[0][c].odd + sum[1][c].odd) * scale;
    Single{_mm512_permutex2var_ps(even.v, low, odd.v)}.store(q + c * kPair);
    Single{_mm512_permutex2var_ps(even.v, high, odd.v)}.store(q + c * kPair + Single::lanes);
  }
}

// q = alpha * R p for r = 16: two rows in a register, and all sums at once.
template <bool kAsks>
void rotate_pair_sixteen(const float* p, const bf16* page, const bf16* next, float* q, float alpha) {
  const Single all = Single::load(p);
  const Pairs tp = apart(all, all);
  Single sum[8];
  for (int i = 0; i < 8; ++i) {
    const Pairs rows = Pairs::load(page + i * kPair);
    sum[i] = (rows.even * tp.even).fma(rows.odd, tp.odd);
    if (kAsks) __builtin_prefetch(next + i * kPair, 0, kIntoL2);
  }
  const __m512 first = Single::sum_lanes(sum[0], sum[1], sum[2], sum[3]);
  const __m512 second = Single::sum_lanes(sum[4], sum[5], sum[6], sum[7]);
  const __m512 sums =
      _mm512_add_ps(_mm512_shuffle_f32x4(first, second, 0x88), _mm512_shuffle_f32x4(first, second, 0xdd));
  const __m512i order = _mm512_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  (Single{_mm512_permutexvar_ps(order, sums)} * Single::splat(alpha)).store(q);
}

// False for ranks that have no such path.
template <bool kAsks>
bool rotate_pairs(const float* p, const bf16* page, const bf16* next, float* q, int64_t r, float alpha,
                  bool transposed) {
  if (r == 2 * kPair)
    transposed ? rotate_pair_columns<kAsks, 2>(p, page, next, q, alpha)
               : rotate_pair_rows<kAsks, 2>(p, page, next, q, alpha);
  else if (r == kPair)
    transposed ? rotate_pair_columns<kAsks, 1>(p, page, next, q, alpha)
               : rotate_pair_rows<kAsks, 1>(p, page, next, q, alpha);
  else if (r == Single::lanes && !transposed)
    rotate_pair_sixteen<kAsks>(p, page, next, q, alpha);
  else
    return false;
  return true;
}

}  // namespace
}  // namespace loraxs::cpu
