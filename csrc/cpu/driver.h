// The low-rank part of the ops on raw pointers: scratch, threads and the order of the primitives.
#pragma once
#include "cpu/lowrank.h"

namespace loraxs::cpu {

// out = in + keep-masked s * (p R_slotᵀ) bt with p = drop(x) aᵀ.
template <class T, class P>
struct Forward {
  int64_t M, K, N, r;
  const T *x, *a, *bt;
  const P* pages;
  int64_t page_stride;
  const int32_t* slots;
  const T* in;
  T* out;
  acc_t<T>* p;  // [M, r], written
  double scale;
  const Dropout* dropout;
  double keep_scale;  // 1 / (1 - p_drop)
};
template <class T, class P>
void forward(const Forward<T, P>&);

// Whether this CPU has a fused product for M tokens and rank r that beats torch's own; there is none with dropout.
template <class T>
bool has_fused(int64_t M, int64_t r);

// out = x weightᵀ + bias + the same low-rank part, in one pass over the weight; `in` is not read, `p` may be null.
template <class T, class P>
struct FusedLayer {
  Forward<T, P> g;
  const T *weight, *bias;   // bias null: none
  bool transposed = false;  // of a gradient: the weight is [K, N], and every R is transposed; many_tokens only
};
// Several layers of the same M and K. For few tokens, threads are started and waited for once for all of them.
template <class T, class P>
void fused(const FusedLayer<T, P>* layers, int64_t count);

// The same for many tokens in bf16, where the CPU has such kernels: all of W is brought into another order first.
template <class P>
void many_tokens(const FusedLayer<bf16, P>&);

// Whether dx is better formed in one pass over the weight [N, K] than after a product by torch. There is no such pass
// with dropout.
template <class T>
bool has_one_pass(int64_t M, int64_t N, int64_t K, int64_t r);

// dq = s * dy btᵀ;  dpages[i] = sum over slot i of dqᵀ p;  dx = in + mask * keep_scale * (dq R_slot) a.
template <class T, class P>
struct Backward {
  int64_t M, K, N, r, S;
  const T *dy, *a, *bt;
  const P* pages;
  int64_t page_stride;
  const int32_t* slots;
  const acc_t<T>* p;
  const T* weight;  // [N, K]: dx is formed in one pass over it, and `in` is not read; null: no such product
  const T* in;      // dy W, or null for zeros
  T* dx;            // null: not needed
  P* dpages;        // [S, r, r], or null: not needed
  double scale;
  const Dropout* dropout;
  double keep_scale;
};
template <class T, class P>
void backward(const Backward<T, P>&);

// y = g_slot z + bias, as in lowrank.h.
template <class T, class P>
void rescale(const Rescale<T, P>&);

// dz[m] = g_slot * dy[m];  dg[i] = sum over slot i of dy * z.
template <class T, class P>
struct RescaleGradients {
  int64_t M, N, S;
  const T *dy, *z;  // z null: dg is not needed
  const P* g;
  const int32_t* slots;
  T* dz;  // null: not needed
  P* dg;
};
template <class T, class P>
void rescale_backward(const RescaleGradients<T, P>&);

// inverse = 1 / ‖·‖ and g = m / ‖·‖ with ‖·‖² = rho + |t|², t = (c + s b R L) sigma, for every slot's R; 0 where ‖·‖
// is.
template <class T>
struct RowScales {
  int64_t N, r, S;
  const T* bt;                  // [r, N]
  const acc_t<T>* ct;           // [r, N]; null: b in the place of c
  const acc_t<T>*pages, *root;  // [S, r, r], [r, r]; root null: L = 1
  int64_t page_stride;
  const acc_t<T>*sigma, *rho, *m;  // [r] or null for 1, [N], [S, N]
  acc_t<T>*g, *inverse;            // [S, N]
  double scale;
};
template <class T>
void row_scale(const RowScales<T>&);

// out = (x wᵀ) w in one pass over w: x, out [l, n]; w [m, n]; all contiguous.
struct GramProduct {
  int64_t l, m, n;
  const float *x, *w;
  float* out;
};
void gram_product(const GramProduct&);

// Orthonormal rows q [k, n] of rows y by one Cholesky factorisation of their Gram matrix in fp64, and the smallest
// squared pivot relative to the squared length of its row; NaN, or not positive, where that failed.
double cholesky_qr(const float* y, int64_t k, int64_t n, float* q);

}  // namespace loraxs::cpu
