// out = in + q b as rank-1 updates of register blocks: b is contiguous along N. Included once per ISA.
//
// A panel of b narrow enough for L1 serves all rows before the next; the sum over ranks stays in registers and in fp32,
// so out is read once and rounded once.
#pragma once
#include "cpu/project.h"

namespace loraxs::cpu {
namespace {

template <class T>
bool live(const Expand<T>& g, int64_t m) {
  return g.slots == nullptr || g.slots[m] >= 0;
}

// One finished vector of row m at column n (`left` of its lanes count): add, round, store.
template <class T>
[[gnu::always_inline]] inline void store_sum(const Expand<T>& g, int64_t m, int64_t n, int left, Vec<acc_t<T>> sum,
                                             const uint64_t* keep) {
  using V = Vec<acc_t<T>>;
  T* out = g.out + m * g.ldio + n;
  if (keep) sum = sum.keep_lanes(uint32_t(keep[n / 64] >> (n % 64)));
  if (left == V::lanes) {
    if (g.in) sum = V::load(g.in + m * g.ldio + n) + sum;
    sum.store(out);
  } else {
    if (g.in) sum = V::load_n(g.in + m * g.ldio + n, left) + sum;
    sum.store_n(out, left);
  }
}

// R rows from m, C vectors from column n; `left` lanes of the last vector count (C > 1 only with whole vectors).
// `keep` holds `stride` words per row, indexed from word 0 of g's columns.
template <class T, int R, int C>
void expand_block(const Expand<T>& g, int64_t m, int64_t n, int left, const uint64_t* keep, int64_t stride) {
  using V = Vec<acc_t<T>>;
  V sum[R][C];
  for (int i = 0; i < R; ++i)
    for (int c = 0; c < C; ++c) sum[i][c] = V::zero();
  const acc_t<T>* q = g.q + m * g.ldq;
  const T* b = g.b + n;
  for (int64_t j = 0; j < g.r; ++j, b += g.ldb) {
    V tb[C];
    for (int c = 0; c < C; ++c) tb[c] = C == 1 && left < V::lanes ? V::load_n(b, left) : V::load(b + c * V::lanes);
    for (int i = 0; i < R; ++i) {
      const V tq = V::splat(q[i * g.ldq + j]);
      for (int c = 0; c < C; ++c) sum[i][c] = sum[i][c].fma(tq, tb[c]);
    }
  }
  for (int i = 0; i < R; ++i) {
    if (!live(g, m + i)) continue;
    for (int c = 0; c < C; ++c)
      store_sum(g, m + i, n + c * V::lanes, C == 1 ? left : V::lanes, sum[i][c], keep ? keep + i * stride : nullptr);
  }
}

constexpr int64_t kPanelBytes = 24 << 10, kPanelMax = 2048;

// R rows from m, columns n0 to n1 (a panel).
template <class T, int R>
void expand_rows(const Expand<T>& g, int64_t m, int64_t n0, int64_t n1) {
  constexpr int lanes = Vec<acc_t<T>>::lanes, wide = kExpandVecs * lanes;
  uint64_t words[R * (kPanelMax / 64)];
  const int count = int((n1 - n0 + 63) / 64);
  const uint64_t* keep = nullptr;
  if (g.dropout) {
    for (int i = 0; i < R; ++i)
      keep_words(*g.dropout, uint32_t(g.row0 + m + i), uint32_t((g.col0 + n0) / 64), words + i * count, count);
    keep = words - n0 / 64;
  }
  int64_t n = n0;
  for (; n + wide <= n1; n += wide) expand_block<T, R, kExpandVecs>(g, m, n, lanes, keep, count);
  for (; n < n1; n += lanes) expand_block<T, R, 1>(g, m, n, int(least(lanes, n1 - n)), keep, count);
}

template <class T>
void copy_dead_rows(const Expand<T>& g) {
  if (g.slots == nullptr || g.in == g.out) return;
  for (int64_t m = 0; m < g.M; ++m) {
    if (g.slots[m] >= 0) continue;
    if (g.in)
      std::memcpy(g.out + m * g.ldio, g.in + m * g.ldio, size_t(g.N) * sizeof(T));
    else
      std::memset(g.out + m * g.ldio, 0, size_t(g.N) * sizeof(T));
  }
}

template <class T>
void expand(const Expand<T>& g) {
  copy_dead_rows(g);
  const int64_t fit = kPanelBytes / int64_t(sizeof(T)) / g.r / 64 * 64, panel = fit < 64 ? 64 : least(fit, kPanelMax);
  for (int64_t n = 0; n < g.N; n += panel) {
    const int64_t end = least(n + panel, g.N);
    int64_t m = 0;
    if constexpr (kRows > 4)
      for (; takes_whole_block(g.M - m); m += kRows) expand_rows<T, kRows>(g, m, n, end);
    if constexpr (kRows >= 4)
      for (; m + 4 <= g.M; m += 4) expand_rows<T, 4>(g, m, n, end);
    for (; m + 2 <= g.M; m += 2) expand_rows<T, 2>(g, m, n, end);
    for (; m < g.M; ++m) expand_rows<T, 1>(g, m, n, end);
  }
}

}  // namespace
}  // namespace loraxs::cpu
