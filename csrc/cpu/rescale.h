// y = g z + bias and its gradients: streams, limited by memory. Included once per ISA.
#pragma once
#include <cstring>

#include "cpu/project.h"

namespace loraxs::cpu {
namespace {

// One row; whichever of g and bias is null is left out.
template <bool kScaled, bool kBiased, class T, class P>
void rescale_row(const T* z, const P* g, const T* bias, T* y, int64_t N) {
  using V = Vec<acc_t<T>>;
  int64_t n = 0;
  for (; n + V::lanes <= N; n += V::lanes) {
    V v = V::load(z + n);
    if constexpr (kScaled && kBiased)
      v = V::load(bias + n).fma(V::load(g + n), v);
    else if constexpr (kScaled)
      v = V::load(g + n) * v;
    else
      v = V::load(bias + n) + v;
    v.store(y + n);
  }
  if (n == N) return;
  const int left = int(N - n);
  V v = V::load_n(z + n, left);
  if constexpr (kScaled) v = V::load_n(g + n, left) * v;
  if constexpr (kBiased) v = V::load_n(bias + n, left) + v;
  v.store_n(y + n, left);
}

template <class T, class P>
void rescale(const Rescale<T, P>& r) {
  for (int64_t m = 0; m < r.M; ++m) {
    const int64_t slot = r.slots ? r.slots[m] : 0;
    const T* z = r.z + m * r.N;
    const P* g = r.g + slot * r.N;
    T* y = r.y + m * r.N;
    if (slot < 0 && r.bias)
      rescale_row<false, true, T, P>(z, nullptr, r.bias, y, r.N);
    else if (slot < 0)
      std::memcpy(y, z, size_t(r.N) * sizeof(T));
    else if (r.bias)
      rescale_row<true, true>(z, g, r.bias, y, r.N);
    else
      rescale_row<true, false>(z, g, r.bias, y, r.N);
  }
}

// R rows together: a quarter of the traffic with the sums for R = 4.
template <int R, class T, class P>
void rescale_rows_back(const RescaleBack<T, P>& b, int64_t t) {
  using V = Vec<acc_t<T>>;
  int64_t at[R];
  for (int i = 0; i < R; ++i) at[i] = (b.rows ? b.rows[t + i] : b.first + t + i) * b.N;
  for (int64_t n = 0; n < b.N; n += V::lanes) {
    const int left = int(least(V::lanes, b.N - n));
    const bool whole = left == V::lanes;
    V sum = t == 0 ? V::zero() : whole ? V::load(b.sum + n) : V::load_n(b.sum + n, left);
    const V g = whole ? V::load(b.g + n) : V::load_n(b.g + n, left);
    for (int i = 0; i < R; ++i) {
      const V dy = whole ? V::load(b.dy + at[i] + n) : V::load_n(b.dy + at[i] + n, left);
      sum = sum.fma(dy, whole ? V::load(b.z + at[i] + n) : V::load_n(b.z + at[i] + n, left));
      if (b.dz == nullptr) continue;
      if (whole)
        (g * dy).store(b.dz + at[i] + n);
      else
        (g * dy).store_n(b.dz + at[i] + n, left);
    }
    if (whole)
      sum.store(b.sum + n);
    else
      sum.store_n(b.sum + n, left);
  }
}

template <class T, class P>
void rescale_back(const RescaleBack<T, P>& b) {
  int64_t t = 0;
  for (; t + 4 <= b.count; t += 4) rescale_rows_back<4>(b, t);
  for (; t < b.count; ++t) rescale_rows_back<1>(b, t);
}

template <class A, class P>
void total(const Total<A, P>& s) {
  using V = Vec<A>;
  for (int64_t n = 0; n < s.N; n += V::lanes) {
    const int left = int(least(V::lanes, s.N - n));
    V sum = V::zero();
    for (int64_t i = 0; i < s.pieces; ++i) sum = sum + V::load_n(s.sums + i * s.N + n, left);
    sum.store_n(s.d + n, left);
  }
}

}  // namespace
}  // namespace loraxs::cpu
