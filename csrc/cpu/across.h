// dx = dy W + dp a for a few rows: rows of W, each times a number, are added up. Included once per ISA.
//
// A block of rows of W goes by as it lies, a strip of columns at a time; the sums of the strip stay in L1.
#pragma once
#include "cpu/project.h"

namespace loraxs::cpu {
namespace {

constexpr int64_t kAcrossRows = 8, kAcrossSums = 6144;

// Sums along K are taken in pieces of this many: the rounding error of a sum grows with its length.
constexpr int64_t kAcrossPiece = 256;

// The columns of a strip, and what is summed for them.
struct Strip {
  int64_t M, ld, columns;  // sums are [M, ld]
};

// sum[m, c] += x[m, k] w[k, c] for k < depth; x [M, kAcrossPiece]. The first `ahead` rows of w are asked for a block
// early.
template <class T>
void add_multiples(const Strip& strip, const acc_t<T>* x, const T* w, int64_t ldw, int64_t depth, int64_t ahead,
                   acc_t<T>* sum) {
  using V = Vec<acc_t<T>>;
  for (int64_t k = 0; k < depth; k += kAcrossRows, x += kAcrossRows, w += kAcrossRows * ldw) {
    const bool asks = k + 2 * kAcrossRows <= ahead;
    for (int64_t c = 0; c < strip.columns; c += V::lanes) {
      const int left = int(least(V::lanes, strip.columns - c));
      V row[kAcrossRows];
      for (int64_t j = 0; j < kAcrossRows; ++j) {
        const T* at = w + j * ldw + c;
        row[j] = k + j >= depth ? V::zero() : left == V::lanes ? V::load(at) : V::load_n(at, left);
        if (asks) __builtin_prefetch(at + kAcrossRows * ldw, 0, kIntoL2);
      }
      for (int64_t m = 0; m < strip.M; ++m) {
        V s = V::load(sum + m * strip.ld + c);
        for (int64_t j = 0; j < kAcrossRows; ++j) s = s.fma(V::splat(x[m * kAcrossPiece + j]), row[j]);
        s.store(sum + m * strip.ld + c);
      }
    }
  }
}

// Adds x w to the sums `total`.
template <class T, class X>
void add_product(const Strip& strip, const X* x, int64_t ldx, const T* w, int64_t ldw, int64_t K, bool far,
                 acc_t<T>* total) {
  using V = Vec<acc_t<T>>;
  alignas(64) acc_t<T> sum[kAcrossSums], stage[kFewRows * kAcrossPiece];
  const int64_t sums = strip.M * strip.ld;
  for (int64_t k = 0; k < K; k += kAcrossPiece) {
    const int64_t depth = least(kAcrossPiece, K - k), padded = (depth + kAcrossRows - 1) / kAcrossRows * kAcrossRows;
    for (int64_t m = 0; m < strip.M; ++m) {
      copy_row(stage + m * kAcrossPiece, x + m * ldx + k, depth, nullptr);
      for (int64_t j = depth; j < padded; ++j) stage[m * kAcrossPiece + j] = 0;
    }
    std::memset(sum, 0, size_t(sums) * sizeof(acc_t<T>));
    add_multiples<T>(strip, stage, w + k * ldw, ldw, depth, far ? K - k : 0, sum);
    for (int64_t i = 0; i < sums; i += V::lanes) (V::load(total + i) + V::load(sum + i)).store(total + i);
  }
}

template <class T>
void across(const Across<T>& g) {
  alignas(64) acc_t<T> total[kAcrossSums];
  constexpr int64_t kGrain = 64;
  const int64_t fit = kAcrossSums / g.M / kGrain * kGrain, ld = least(fit, (g.N + kGrain - 1) / kGrain * kGrain);
  for (int64_t n = 0; n < g.N; n += ld) {
    const Strip strip{g.M, ld, least(ld, g.N - n)};
    std::memset(total, 0, size_t(g.M * ld) * sizeof(acc_t<T>));
    add_product(strip, g.x, g.ldx, g.w + n, g.ldw, g.K, true, total);
    add_product(strip, g.q, g.ldq, g.b + n, g.ldb, g.r, false, total);
    for (int64_t m = 0; m < g.M; ++m) copy_row(g.out + m * g.ldo + n, total + m * ld, strip.columns, nullptr);
  }
}

}  // namespace
}  // namespace loraxs::cpu
