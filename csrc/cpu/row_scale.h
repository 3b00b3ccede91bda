// 1 / ‖·‖ and g = m / ‖·‖ for the rows of W, one row a lane: b, c and t are read along N. Included once per ISA.
//
// A block of kCoordinates columns of t times C vectors of rows stays in registers; t is squared there and never stored.
#pragma once
#include "cpu/project.h"

namespace loraxs::cpu {
namespace {

constexpr int kCoordinates = kRows < 4 ? kRows : 4;

// C vectors of rows of W from n; `left` lanes of the last vector count (C > 1 only with whole vectors).
template <int C, class T>
void row_scale_block(const RowScale<T>& s, int64_t n, int left) {
  using A = acc_t<T>;
  using V = Vec<A>;
  const auto load = [left](const auto* p, int c) {
    return C == 1 && left < V::lanes ? V::load_n(p, left) : V::load(p + c * V::lanes);
  };
  V squares[C];
  for (int c = 0; c < C; ++c) squares[c] = V::zero();
  for (int64_t j = 0; j < s.r; j += kCoordinates) {
    V sum[kCoordinates][C];
    int64_t column[kCoordinates];
    for (int i = 0; i < kCoordinates; ++i) {
      column[i] = least(j + i, s.r - 1);  // past the end: repeat, do not count
      for (int c = 0; c < C; ++c) sum[i][c] = V::zero();
    }
    const T* b = s.bt + n;
    const A* core = s.core;
    for (int64_t k = 0; k < s.r; ++k, b += s.N, core += s.r) {
      V tb[C];
      for (int c = 0; c < C; ++c) tb[c] = load(b, c);
      for (int i = 0; i < kCoordinates; ++i) {
        const V tr = V::splat(core[column[i]]);
        for (int c = 0; c < C; ++c) sum[i][c] = sum[i][c].fma(tr, tb[c]);
      }
    }
    V block[C];
    for (int c = 0; c < C; ++c) block[c] = V::zero();
    for (int i = 0; i < kCoordinates && j + i < s.r; ++i)
      for (int c = 0; c < C; ++c) {
        const int64_t at = (j + i) * s.N + n;
        V t = (s.ct ? load(s.ct + at, c) : load(s.bt + at, c)).fma(V::splat(s.scale), sum[i][c]);
        if (s.sigma) t = t * V::splat(s.sigma[j + i]);
        block[c] = block[c].fma(t, t);
      }
    for (int c = 0; c < C; ++c) squares[c] = squares[c] + block[c];
  }
  for (int c = 0; c < C; ++c) {
    const V inverse = (load(s.rho + n, c) + squares[c]).inverse_root(), g = load(s.m + n, c) * inverse;
    const int64_t at = n + c * V::lanes;
    if (C == 1 && left < V::lanes) {
      inverse.store_n(s.inverse + at, left);
      g.store_n(s.g + at, left);
    } else {
      inverse.store(s.inverse + at);
      g.store(s.g + at);
    }
  }
}

template <class T>
void row_scale(const RowScale<T>& s) {
  constexpr int lanes = Vec<acc_t<T>>::lanes, wide = kExpandVecs * lanes;
  int64_t n = s.n0;
  for (; n + wide <= s.n1; n += wide) row_scale_block<kExpandVecs>(s, n, lanes);
  for (; n < s.n1; n += lanes) row_scale_block<1>(s, n, int(least(lanes, s.n1 - n)));
}

}  // namespace
}  // namespace loraxs::cpu
