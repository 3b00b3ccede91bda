// The r x r step: every row gathers its own R (rotate), every slot sums its own gradient (outer). Included once per
// ISA.
//
// A row costs the same whichever page it reads, and sorting rows by page is slower. Only consecutive rows of one page
// (one adapter, or the prompt of one request) share the work of reading it.
#pragma once
#include <cstdlib>

#include "cpu/expand.h"
#if defined(__AVX512F__)
#include "cpu/rotate_pairs.h"
#endif

namespace loraxs::cpu {
namespace {

// q[i] = alpha * sum_j R[i, j] p[j], four outputs at a time. If kAsks, what lies in the same places of the page `next`
// is asked for meanwhile.
template <bool kAsks, class A, class P>
void rotate_row(const A* p, const P* page, const P* next, A* q, int64_t r, A alpha) {
  using V = Vec<A>;
  for (int64_t i = 0; i < r; i += 4) {
    const P* row[4];
    V sum[4];
    for (int c = 0; c < 4; ++c) row[c] = page + least(i + c, r - 1) * r, sum[c] = V::zero();
    int64_t j = 0;
    for (; j + V::lanes <= r; j += V::lanes) {
      const V tp = V::load(p + j);
      for (int c = 0; c < 4; ++c) {
        sum[c] = sum[c].fma(tp, V::load(row[c] + j));
        if (kAsks) __builtin_prefetch(row[c] + j + (next - page), 0, kIntoL2);
      }
    }
    if (j < r) {
      const int n = int(r - j);
      const V tp = V::load_n(p + j, n);
      for (int c = 0; c < 4; ++c) sum[c] = sum[c].fma(tp, V::load_n(row[c] + j, n));
    }
    if (r - i >= 4) {
      V::sum4(sum[0], sum[1], sum[2], sum[3], alpha, true, q + i);
    } else {
      A s[4];
      V::sum4(sum[0], sum[1], sum[2], sum[3], alpha, true, s);
      for (int64_t c = 0; c < r - i; ++c) q[i + c] = s[c];
    }
  }
}

// q[j] = alpha * sum_i p[i] R[i, j], C vectors of j at a time.
template <bool kAsks, int C, class A, class P>
void rotate_back(const A* p, const P* page, const P* next, A* q, int64_t r, int64_t j, int left, A alpha) {
  using V = Vec<A>;
  V sum[C];
  for (int c = 0; c < C; ++c) sum[c] = V::zero();
  for (int64_t i = 0; i < r; ++i) {
    const V tp = V::splat(p[i]);
    const P* row = page + i * r + j;
    for (int c = 0; c < C; ++c) {
      sum[c] = sum[c].fma(tp, C == 1 && left < V::lanes ? V::load_n(row, left) : V::load(row + c * V::lanes));
      if (kAsks) __builtin_prefetch(row + c * V::lanes + (next - page), 0, kIntoL2);
    }
  }
  for (int c = 0; c < C; ++c) {
    const V v = sum[c] * V::splat(alpha);
    if (C == 1 && left < V::lanes)
      v.store_n(q + j, left);
    else
      v.store(q + j + c * V::lanes);
  }
}

template <bool kAsks, class A, class P>
void rotate_one(const Rotate<A, P>& g, int64_t m, const P* page, const P* next) {
  constexpr int lanes = Vec<A>::lanes;
  const A* p = g.p + m * g.r;
  A* q = g.q + m * g.r;
#if defined(__AVX512F__)
  if constexpr (same<P, bf16>)
    if (rotate_pairs<kAsks>(p, page, next, q, g.r, g.alpha, g.transposed)) return;
#endif
  if (!g.transposed) return rotate_row<kAsks>(p, page, next, q, g.r, g.alpha);
  int64_t j = 0;
  for (; j + 4 * lanes <= g.r; j += 4 * lanes) rotate_back<kAsks, 4>(p, page, next, q, g.r, j, lanes, g.alpha);
  for (; j < g.r; j += lanes) rotate_back<kAsks, 1>(p, page, next, q, g.r, j, int(least(lanes, g.r - j)), g.alpha);
}

// From this many rows on, turning the page around costs less than the horizontal sums that it saves.
constexpr int64_t kLongRun = 64;

// Rows m .. m + count of one page: scale and widen it once, then it is a small project or expand.
template <class A, class P>
bool rotate_run(const Rotate<A, P>& g, int64_t m, int64_t count, const P* page) {
  const int64_t size = g.r * g.r;
  A* wide = static_cast<A*>(std::malloc(size_t(2 * size) * sizeof(A)));
  if (wide == nullptr) return false;
  using V = Vec<A>;
  for (int64_t i = 0; i < size; i += V::lanes) {
    const int left = int(least(V::lanes, size - i));
    (V::load_n(page + i, left) * V::splat(g.alpha)).store_n(wide + i, left);
  }
  const A *p = g.p + m * g.r, *rows = wide;
  A* q = g.q + m * g.r;
  if (!g.transposed && count >= kLongRun) {
    for (int64_t j = 0; j < g.r; ++j)
      for (int64_t i = 0; i < g.r; ++i) wide[size + j * g.r + i] = wide[i * g.r + j];
    rows = wide + size;
  }
  if (g.transposed || rows != wide)
    expand<A>({nullptr, q, p, rows, g.r, g.r, g.r, count, g.r, g.r, nullptr, nullptr, 0, 0, false});
  else
    project<A>({p, wide, q, g.r, g.r, g.r, count, g.r, g.r, A(1), nullptr, 0, false});
  std::free(wide);
  return true;
}

// From this many rows on, a run beats row by row, or is as good (Sapphire Rapids, r = 4 to 64).
constexpr int64_t kRun = 32;

// Pages of different slots are as far apart as rows of a slab, and each begins with a miss: so much of them is asked
// for ahead. A page is asked for line by line while another is read, for a burst of requests would have to wait for
// itself; but short rows are less than a line.
constexpr int64_t kBytesAhead = 8 << 10, kRowsAhead = 8, kLine = 64;

// The page of row m, or null.
template <class A, class P>
const P* page_of(const Rotate<A, P>& g, int64_t m) {
  return g.slots && m < g.M && g.slots[m] >= 0 ? g.pages + g.slots[m] * g.page_stride : nullptr;
}

template <class A, class P>
void ask_for_page(const Rotate<A, P>& g, int64_t m) {
  constexpr int64_t line = kLine / int64_t(sizeof(P));
  if (const P* page = page_of(g, m))
    for (int64_t i = 0; i < g.r * g.r; i += line) __builtin_prefetch(page + i);
}

template <class A, class P>
void rotate(const Rotate<A, P>& g) {
  const bool short_rows = g.r < Vec<A>::lanes;
  const int64_t ahead = short_rows ? kRowsAhead : kBytesAhead / (g.r * g.r * int64_t(sizeof(P))) + 1;
  if (short_rows)
    for (int64_t m = 0; m < ahead; ++m) ask_for_page(g, m);
  for (int64_t m = 0, end = 0; m < g.M; m = end) {
    const int64_t slot = g.slots ? g.slots[m] : 0;
    for (end = g.slots ? m + 1 : g.M; end < g.M && g.slots[end] == slot;) ++end;
    if (slot < 0) {
      for (int64_t i = m * g.r; i < end * g.r; ++i) g.q[i] = 0;
      continue;
    }
    const P* page = g.pages + slot * g.page_stride;
    if (end - m >= kRun && rotate_run(g, m, end - m, page)) continue;
    for (int64_t i = m; i < end; ++i) {
      if (short_rows) ask_for_page(g, i + ahead);
      const P* next = short_rows ? nullptr : page_of(g, i + ahead);
      const bool asks = next != nullptr && next != page;
      asks ? rotate_one<true>(g, i, page, next) : rotate_one<false>(g, i, page, page);
    }
  }
}

// Rows are summed in pieces of this many, and the pieces in order: the rounding error of a long sum grows with the
// piece, and the result depends on nothing but the slot's own rows.
constexpr int64_t kOuterPiece = 128;

// d[i .. i + 4, j .. j + C vectors) of one slot.
template <int C, class A, class P>
void outer_block(const Outer<A, P>& g, int64_t i, int64_t j, int left) {
  using V = Vec<A>;
  int64_t row[4];
  V total[4][C];
  for (int k = 0; k < 4; ++k) {
    row[k] = least(i + k, g.i1 - 1);
    for (int c = 0; c < C; ++c) total[k][c] = V::zero();
  }
  for (int64_t t0 = 0; t0 < g.count; t0 += kOuterPiece) {
    V sum[4][C];
    for (int k = 0; k < 4; ++k)
      for (int c = 0; c < C; ++c) sum[k][c] = V::zero();
    for (int64_t t = t0; t < least(t0 + kOuterPiece, g.count); ++t) {
      const int64_t m = g.rows ? g.rows[t] : t;
      V tp[C];
      for (int c = 0; c < C; ++c) {
        const A* p = g.p + m * g.r + j + c * V::lanes;
        tp[c] = C == 1 && left < V::lanes ? V::load_n(p, left) : V::load(p);
      }
      for (int k = 0; k < 4; ++k) {
        const V dq = V::splat(g.dq[m * g.r + row[k]]);
        for (int c = 0; c < C; ++c) sum[k][c] = sum[k][c].fma(dq, tp[c]);
      }
    }
    for (int k = 0; k < 4; ++k)
      for (int c = 0; c < C; ++c) total[k][c] = total[k][c] + sum[k][c];
  }
  for (int64_t k = 0; k < least(4, g.i1 - i); ++k)
    for (int c = 0; c < C; ++c) {
      P* d = g.d + (i + k) * g.r + j + c * V::lanes;
      if (C == 1 && left < V::lanes)
        total[k][c].store_n(d, left);
      else
        total[k][c].store(d);
    }
}

// One row: d[i, j] = dq[i] p[j], C vectors of j at a time, written in order.
template <int C, class A, class P>
void outer_row(const Outer<A, P>& g, const A* dq, const A* p, int64_t j, int left) {
  using V = Vec<A>;
  V tp[C];
  for (int c = 0; c < C; ++c)
    tp[c] = C == 1 && left < V::lanes ? V::load_n(p + j, left) : V::load(p + j + c * V::lanes);
  for (int64_t i = g.i0; i < g.i1; ++i)
    for (int c = 0; c < C; ++c) {
      const V d = V::splat(dq[i]) * tp[c];
      P* out = g.d + i * g.r + j + c * V::lanes;
      if (C == 1 && left < V::lanes)
        d.store_n(out, left);
      else
        d.store(out);
    }
}

template <class A, class P>
void outer(const Outer<A, P>& g) {
  constexpr int64_t lanes = Vec<A>::lanes;
  if (g.count == 1) {
    const int64_t at = g.rows ? *g.rows * g.r : 0;
    int64_t j = 0;
    for (; j + 4 * lanes <= g.r; j += 4 * lanes) outer_row<4>(g, g.dq + at, g.p + at, j, int(lanes));
    for (; j < g.r; j += lanes) outer_row<1>(g, g.dq + at, g.p + at, j, int(least(lanes, g.r - j)));
    return;
  }
  for (int64_t i = g.i0; i < g.i1; i += 4) {
    int64_t j = 0;
    for (; j + kOuterVecs * lanes <= g.r; j += kOuterVecs * lanes) outer_block<kOuterVecs>(g, i, j, int(lanes));
    for (; j < g.r; j += lanes) outer_block<1>(g, i, j, int(least(lanes, g.r - j)));
  }
}

}  // namespace
}  // namespace loraxs::cpu
