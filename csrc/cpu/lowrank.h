// The CPU side's primitives: what one instruction-set level has to provide, and the table that holds them.
#pragma once
#include <cstdint>

#include "kernels/philox.h"

namespace loraxs::cpu {

// Storage-only element types: arithmetic on them lives in the per-ISA files.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// Half types accumulate in fp32, fp64 in fp64.
template <class T>
struct acc_of {
  using type = float;
};
template <>
struct acc_of<double> {
  using type = double;
};
template <class T>
using acc_t = typename acc_of<T>::type;

// p[m, i] = alpha * sum_k keep(row0 + m, k) x[m, k] a[i, k];  x, a contiguous along k.
template <class T>
struct Project {
  const T *x, *a;
  acc_t<T>* p;
  int64_t ldx, lda, ldp, M, K, r;
  acc_t<T> alpha;
  const Dropout* dropout;  // null: keep everything
  int64_t row0;            // absolute row of x[0], the dropout counter
  bool wide;               // enough rows in the whole problem for matrix tiles; not a property of this call's share
  int64_t ahead = 0;       // how many rows from a on are to be asked for a block early, because they come from memory
};

// out[m, n] = in[m, n] + keep(row0 + m, col0 + n) * sum_i q[m, i] b[i, n];  b contiguous along n.
// Rows whose slot is negative are copied bit for bit (or left alone when in == out). in == null stands for zeros.
template <class T>
struct Expand {
  const T* in;
  T* out;
  const acc_t<T>* q;
  const T* b;
  int64_t ldio, ldq, ldb, M, N, r;
  const int32_t* slots;  // null: every row is live
  const Dropout* dropout;
  int64_t row0, col0;  // col0 is a multiple of 64
  bool wide;
};

// q[m] = alpha * R p[m], or alpha * Rᵀ p[m] when `transposed`, with R = pages[slots[m]]; zero for negative slots.
template <class A, class P>
struct Rotate {
  const A* p;
  const P* pages;
  int64_t page_stride;   // from one page to the next; a page itself is contiguous
  const int32_t* slots;  // null: page 0
  A* q;
  int64_t M, r;
  A alpha;
  bool transposed;
};

// d[i, j] = sum_t dq[rows[t], i] p[rows[t], j] for i in [i0, i1): one slot's gradient, rows summed in list order.
template <class A, class P>
struct Outer {
  const A *dq, *p;
  const int32_t* rows;  // null: 0, 1, 2, …
  int64_t count, r, i0, i1;
  P* d;
};

// out[m, n] = sum_k x[m, k] w[k, n] + sum_i q[m, i] b[i, n], rounded once, for at most kFewRows rows of x; w and b are
// contiguous along n, and w is read once where it lies.
constexpr int64_t kFewRows = 12;
template <class T>
struct Across {
  const T *x, *w;
  const acc_t<T>* q;
  const T* b;
  T* out;
  int64_t ldx, ldw, ldq, ldb, ldo, M, K, N, r;
};

template <class T>
struct Dense {
  void (*project)(const Project<T>&);
  void (*expand)(const Expand<T>&);
  void (*across)(const Across<T>&);  // null: torch's own product is faster
};
template <class A, class P>
struct Paged {
  void (*rotate)(const Rotate<A, P>&);
  void (*outer)(const Outer<A, P>&);
};

// y[m, n] = g[slots[m], n] * z[m, n] + bias[n]; a factor of 1 where the slot is negative.
template <class T, class P>
struct Rescale {
  const T* z;
  const P* g;
  const int32_t* slots;  // null: row 0 of g
  const T* bias;         // null: none
  T* y;
  int64_t M, N;
};

// One piece of one slot: dz[m] = g * dy[m] and sum[n] = sum_m dy[m, n] z[m, n] over the rows of the piece, in order.
template <class T, class P>
struct RescaleBack {
  const T *dy, *z;
  const P* g;           // the factors of the slot
  const int32_t* rows;  // null: first, first + 1, …
  int64_t first, count, N;
  T* dz;  // null: not needed
  acc_t<T>* sum;
};

// d[n] = sum of the pieces' sums, in order.
template <class A, class P>
struct Total {
  const A* sums;
  int64_t pieces, N;
  P* d;
};

template <class T, class P>
struct Scaled {
  void (*rescale)(const Rescale<T, P>&);
  void (*back)(const RescaleBack<T, P>&);
  void (*total)(const Total<acc_t<T>, P>&);
};

// inverse = 1 / ‖·‖ and g = m * inverse with ‖·‖² = rho + sum_j t_j², t_j = (c_j + s sum_k b_k core[k, j]) sigma_j, for
// the rows n0 .. n1 of W and one slot. b, c are contiguous along N.
template <class T>
struct RowScale {
  const T* bt;            // [r, N]
  const acc_t<T>* ct;     // [r, N]; null: b in the place of c
  const acc_t<T>* core;   // [r, r], R L
  const acc_t<T>* sigma;  // null: 1
  const acc_t<T>*rho, *m;
  acc_t<T>*g, *inverse;
  int64_t N, r, n0, n1;
  acc_t<T> scale;
};

template <class T>
struct Lengths {
  void (*row_scale)(const RowScale<T>&);
};

// Tokens in the layout that a level's product wants to find them in, zeros in the place of tokens that do not exist.
template <class T, class In>
struct Pack {
  const In* rows;  // [M, depth], contiguous along the depth
  int64_t ld, M, depth;
  int64_t tokens;  // of a panel
  T* panel;
};

// y[m, n] = x[m] . w[n] + bias[n] + q[m] . b[:, n] for n in [n0, n1): one pass over w, where it lies.
template <class T>
struct Product {
  const T* x;      // packed tokens
  int64_t tokens;  // of a panel
  const T* w;      // [N, K], contiguous along K
  int64_t ldw, M, K, n0, n1;
  const T* bias;  // null: none
  const T* q;     // packed rows of q, or null: no low-rank part
  const T* b;     // [r, N], contiguous along N
  int64_t ldb, r;
  T* y;      // [M, N], or null:
  float* p;  // the same numbers unrounded
  int64_t ldy;
  bool more = false;  // the sum goes on from what is there; only where Fused::piece allows it
};

// The base product fused with the low-rank part, at the levels where that beats torch's own product.
template <class T>
struct Fused {
  int64_t tokens;                                       // of a panel at most: what is packed together
  int64_t (*depth)(int64_t K), (*rank_depth)(int64_t);  // elements that a token takes in its panels
  int64_t piece;                                        // a sum may stop after a multiple of these; 0: it may not
  void (*pack)(const Pack<T, T>&);
  void (*pack_ranks)(const Pack<T, float>&);
  void (*product)(const Product<T>&);
};

// Columns n0 .. n1 of w and b in panels of kPanelColumns.
constexpr int64_t kPanelColumns = 32;
template <class T>
struct PackColumns {
  const T* w;  // [N, K], contiguous along K; or, if `across`, [K, N], contiguous along N
  int64_t ldw, K;
  bool across;
  const T* b;  // [r, N], contiguous along N; r = 0: none
  int64_t ldb, r;
  int64_t n0, n1;  // n0 is the first column of a panel
  T* out;
};

// y[m, n] = x[m] . w[n] + bias[n] + q[m] . b[:, n] for n in [n0, n1), from panels.
template <class T>
struct PanelProduct {
  const T* x;  // can be read up to a multiple of 16 tokens, and of each Many::depth elements
  int64_t ldx, M, K;
  const T* panels;
  int64_t n0, n1;
  const T* bias;  // null: none
  const T* q;     // packed rows of q, or null: no low-rank part
  int64_t r;      // 0: none
  T* y;           // [M, N], or null:
  float* p;       // the same numbers unrounded, times alpha
  int64_t ldy;
  float alpha;
};

// The same for so many tokens that it pays to bring all of W into another order first; null where it never does.
template <class T>
struct Many {
  int64_t (*depth)(int64_t K), (*rank_depth)(int64_t);  // elements that a token takes of x, and of its packed q
  int64_t (*panel_size)(int64_t K, int64_t r);
  void (*pack)(const PackColumns<T>&);
  void (*pack_ranks)(const Pack<T, float>&);
  void (*product)(const PanelProduct<T>&);
};

// One instruction-set level. Inheritance only so that a template can pick its entry by type.
struct Kernels : Dense<float>,
                 Dense<bf16>,
                 Dense<f16>,
                 Paged<float, float>,
                 Paged<float, bf16>,
                 Paged<float, f16>,
                 Scaled<float, float>,
                 Scaled<bf16, bf16>,
                 Scaled<bf16, float>,
                 Scaled<f16, f16>,
                 Scaled<f16, float>,
                 Lengths<float>,
                 Lengths<bf16>,
                 Lengths<f16>,
                 Fused<float>,
                 Fused<bf16>,
                 Many<bf16> {};
struct Kernels64 : Dense<double>,
                   Paged<double, double>,
                   Paged<double, float>,
                   Scaled<double, double>,
                   Scaled<double, float>,
                   Lengths<double> {};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels, amx_bf16_kernels;
extern const Kernels64 portable_kernels64;

}  // namespace loraxs::cpu
