// p = x aᵀ as dot products: both operands are contiguous along K, so no packing. Included once per ISA, which
// names its vectors by the macro LORAXS_SIMD.
//
// A block of R rows times J ranks keeps R * J sums in registers; K runs in pieces of kDepth so that the rows of x stay
// in L1 while a streams by. Every p[m, i] adds its products in the same order whatever block it falls into.
#pragma once
#include <cstring>

#include "cpu/lowrank.h"
#include LORAXS_SIMD

namespace loraxs::cpu {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Whether the next block of `left` rows has kRows of them: 8 rows are better off as 4 + 4 than as 6 + 2, because a
// block of 2 loads more than it multiplies.
inline bool takes_whole_block(int64_t left) { return left >= kRows && left != 8; }

// How a vector of products is formed. Generic: widen both sides to the accumulation type; x is staged in that type.
template <class T>
struct Dot {
  using Acc = acc_t<T>;
  using Staged = Acc;
  using V = Vec<Acc>;
  using Operand = V;
  static constexpr int step = V::lanes;
  template <class S>
  static V load(const S* p) {
    return V::load(p);
  }
  template <class S>
  static V load_n(const S* p, int n) {
    return V::load_n(p, n);
  }
  static V madd(V sum, V x, V a) { return sum.fma(x, a); }
};

#if defined(__AVX512BF16__)
// bf16 pairs: exact products, fp32 sums, 32 elements per instruction, and x needs no staging.
template <>
struct Dot<bf16> {
  using Acc = float;
  using Staged = bf16;
  using V = Vec<float>;
  using Operand = __m512bh;
  static constexpr int step = 32;
  static Operand load(const bf16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand load_n(const bf16* p, int n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(__mmask32((uint64_t(1) << n) - 1), p);
  }
  static V madd(V sum, Operand x, Operand a) { return {_mm512_dpbf16_ps(sum.v, x, a)}; }
};
#endif

constexpr int kIntoL2 = 2;  // the locality of a prefetch

constexpr int64_t kDepth = 1024;  // 6 fp32 rows of it are 24 KiB, half an L1

// p[m, i] += alpha * x[m] . a[i] over k < depth for R rows and all ranks; `fresh` overwrites instead of adding. The J
// rows of a that come next are asked for meanwhile, as long as they are among the first `ahead`.
template <class T, int R, int J>
void dot_block(const typename Dot<T>::Staged* x, int64_t ldx, const T* a, int64_t lda, int64_t depth, int64_t r,
               acc_t<T>* p, int64_t ldp, acc_t<T> alpha, bool fresh, int64_t ahead) {
  using D = Dot<T>;
  using V = typename D::V;
  static_assert(J % 4 == 0);
  for (int64_t i = 0; i < r; i += J) {
    const T* rank[J];
    for (int j = 0; j < J; ++j) rank[j] = a + least(i + j, r - 1) * lda;  // past the end: repeat, do not store
    V sum[R][J];
    for (int m = 0; m < R; ++m)
      for (int j = 0; j < J; ++j) sum[m][j] = V::zero();
    int64_t k = 0;
    for (; k + D::step <= depth; k += D::step) {
      typename D::Operand ta[J];
      for (int j = 0; j < J; ++j) ta[j] = D::load(rank[j] + k);
      if (i + 2 * J <= ahead)
        for (int j = 0; j < J; ++j) __builtin_prefetch(a + (i + J + j) * lda + k, 0, kIntoL2);
      for (int m = 0; m < R; ++m) {
        const typename D::Operand tx = D::load(x + m * ldx + k);
        for (int j = 0; j < J; ++j) sum[m][j] = D::madd(sum[m][j], tx, ta[j]);
      }
    }
    if (k < depth) {
      const int n = int(depth - k);
      typename D::Operand ta[J];
      for (int j = 0; j < J; ++j) ta[j] = D::load_n(rank[j] + k, n);
      for (int m = 0; m < R; ++m) {
        const typename D::Operand tx = D::load_n(x + m * ldx + k, n);
        for (int j = 0; j < J; ++j) sum[m][j] = D::madd(sum[m][j], tx, ta[j]);
      }
    }
    for (int m = 0; m < R; ++m) {
      acc_t<T>* out = p + m * ldp + i;
      for (int j = 0; j < J && i + j < r; j += 4) {
        const auto* four = sum[m] + j;
        if (r - i - j >= 4) {
          V::sum4(four[0], four[1], four[2], four[3], alpha, fresh, out + j);
        } else {
          acc_t<T> s[4];
          V::sum4(four[0], four[1], four[2], four[3], alpha, true, s);
          for (int64_t c = 0; c < r - i - j; ++c) out[j + c] = fresh ? s[c] : out[j + c] + s[c];
        }
      }
    }
  }
}

template <class S, class T>
void copy_row(S* out, const T* in, int64_t n, const uint64_t* keep) {
  using V = Vec<acc_t<T>>;
  for (int64_t k = 0; k < n; k += V::lanes) {
    const int left = int(least(V::lanes, n - k));
    V v = left == V::lanes ? V::load(in + k) : V::load_n(in + k, left);
    if (keep) v = v.keep_lanes(uint32_t(keep[k / 64] >> (k % 64)));
    if (left == V::lanes)
      v.store(out + k);
    else
      v.store_n(out + k, left);
  }
}

template <class T, class U>
constexpr bool same = false;
template <class T>
constexpr bool same<T, T> = true;

// R rows from m: stage x where it needs widening or dropout, then dot.
template <class T, int R, int J>
void project_rows(const Project<T>& g, int64_t m) {
  using Staged = typename Dot<T>::Staged;
  alignas(64) Staged stage[R * kDepth];
  uint64_t keep[kDepth / 64];
  for (int64_t k = 0; k < g.K; k += kDepth) {
    const int64_t depth = least(kDepth, g.K - k);
    const Staged* x = nullptr;
    int64_t ldx = kDepth;
    if constexpr (same<T, Staged>)
      if (!g.dropout) x = g.x + m * g.ldx + k, ldx = g.ldx;
    if (x == nullptr) {
      for (int i = 0; i < R; ++i) {
        if (g.dropout) keep_words(*g.dropout, uint32_t(g.row0 + m + i), uint32_t(k / 64), keep, int((depth + 63) / 64));
        copy_row(stage + i * kDepth, g.x + (m + i) * g.ldx + k, depth, g.dropout ? keep : nullptr);
      }
      x = stage;
    }
    dot_block<T, R, J>(x, ldx, g.a + k, g.lda, depth, g.r, g.p + m * g.ldp, g.ldp, g.alpha, k == 0, g.ahead);
  }
}

template <class T>
void project(const Project<T>& g) {
  int64_t m = 0;
  if constexpr (kRows > 4)
    for (; takes_whole_block(g.M - m); m += kRows) project_rows<T, kRows, 4>(g, m);
  if constexpr (kRows >= 4)
    for (; m + 4 <= g.M; m += 4) project_rows<T, 4, 4>(g, m);
  for (; m + 2 <= g.M; m += 2) project_rows<T, 2, 4>(g, m);
  for (; m < g.M; ++m) {
    if (g.r > 4)
      project_rows<T, 1, kSingleRanks>(g, m);
    else
      project_rows<T, 1, 4>(g, m);
  }
}

}  // namespace
}  // namespace loraxs::cpu
