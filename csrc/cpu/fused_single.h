// The fused product in fp32 by AVX-512: lanes are tokens, elements of W are broadcast. Included once per level.
//
// A block of R rows of W times V vectors of tokens keeps R * V sums in registers. W is read where it lies, 16 steps of
// the depth out of every line, and needs no packing; tokens are packed once, so that the inner loop reads them in
// order. The low-rank part is a few more steps of the same sum.
#pragma once
#include "cpu/project.h"
#include "cpu/transpose.h"

namespace loraxs::cpu {
namespace {

constexpr int64_t kLanes = 16, kPanelVecs = 3, kPanelTokens = kPanelVecs * kLanes;

// Sums along K are taken in pieces of this many: the rounding error of a sum grows with its length, and a piece of a
// panel (24 KiB) stays in L1 while rows of W go by.
constexpr int64_t kSumPiece = 128;

// Panels come from L2 and are asked for this many steps early.
constexpr int kAheadSteps = 16;

inline int64_t same_depth(int64_t K) { return K; }

// Panels of g.tokens tokens, each [depth][tokens rounded up to 16].
inline void pack_single(const Pack<float, float>& g) {
  for (int64_t m0 = 0; m0 < g.M; m0 += g.tokens) {
    const int64_t tokens = least(g.tokens, g.M - m0), vecs = (tokens + kLanes - 1) / kLanes;
    float* panel = g.panel + m0 * g.depth;
    for (int64_t v = 0; v < vecs; ++v)
      for (int64_t k = 0; k < g.depth; k += kLanes) {
        const int64_t width = least(kLanes, g.depth - k);
        const __mmask16 mask = Vec<float>::first(int(width));
        __m512i in[16], out[16];
        for (int64_t i = 0; i < kLanes; ++i) {
          const int64_t m = m0 + v * kLanes + i;
          in[i] = m < g.M ? _mm512_maskz_loadu_epi32(mask, g.rows + m * g.ld + k) : _mm512_setzero_si512();
        }
        transpose_words(in, out);
        for (int64_t i = 0; i < width; ++i) _mm512_store_si512(panel + ((k + i) * vecs + v) * kLanes, out[i]);
      }
  }
}

// sum[i][v] += panel[k][v] * w[i][k * step] for k < depth. The R rows at `next`, if any, are asked for meanwhile, a
// line of one of them at a time.
template <int R, int V>
[[gnu::always_inline]] inline void add_products(__m512 (&sum)[R][V], const float* panel, const float* const (&w)[R],
                                                int64_t step, int64_t depth, const float* next, int64_t ldnext) {
  for (int64_t k = 0; k < depth; ++k, panel += V * kLanes) {
    if (next && k % (kLanes / R) == 0)
      __builtin_prefetch(next + k / (kLanes / R) % R * ldnext + k / kLanes * kLanes, 0, kIntoL2);
    __m512 x[V];
    for (int v = 0; v < V; ++v) {
      x[v] = _mm512_load_ps(panel + v * kLanes);
      _mm_prefetch(reinterpret_cast<const char*>(panel + (kAheadSteps * V + v) * kLanes), _MM_HINT_T0);
    }
    for (int i = 0; i < R; ++i) {
      const __m512 tw = _mm512_set1_ps(w[i][k * step]);
      for (int v = 0; v < V; ++v) sum[i][v] = _mm512_fmadd_ps(x[v], tw, sum[i][v]);
    }
  }
}

// Columns n .. n + rows of y for the tokens m .. m + 16 V, as sums with tokens in lanes; `out` is where a sum goes on.
template <int R, int V>
void sum_block(const Product<float>& g, int64_t m, int64_t n, int64_t rows, __m512 (*out)[V]) {
  const float *w[R], *b[R];
  for (int i = 0; i < R; ++i) {
    const int64_t column = n + least(i, rows - 1);  // past the end: repeat, do not store
    w[i] = g.w + column * g.ldw;
    b[i] = g.b + column;
  }
  const float* x = g.x + m * g.K;
  const float* next = m == 0 && n + 2 * R <= g.n1 ? g.w + (n + R) * g.ldw : nullptr;
  __m512 total[R][V];
  if (g.more)
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) total[i][v] = out[i][v];
  for (int64_t k = 0; k < g.K; k += kSumPiece) {
    const int64_t depth = least(kSumPiece, g.K - k);
    __m512 sum[R][V];
    for (int i = 0; i < R; ++i)
      for (int v = 0; v < V; ++v) sum[i][v] = _mm512_setzero_ps();
    add_products<R, V>(sum, x + k * V * kLanes, w, 1, depth, next ? next + k : nullptr, g.ldw);
    for (int i = 0; i < R; ++i) {
      w[i] += depth;
      for (int v = 0; v < V; ++v) total[i][v] = k == 0 && !g.more ? sum[i][v] : _mm512_add_ps(total[i][v], sum[i][v]);
    }
  }
  if (g.q) add_products<R, V>(total, g.q + m * g.r, b, g.ldb, g.r, nullptr, 0);
  for (int i = 0; i < R; ++i) {
    const __m512 bias = _mm512_set1_ps(g.bias ? g.bias[n + least(i, rows - 1)] : 0);
    for (int v = 0; v < V; ++v) out[i][v] = g.bias ? _mm512_add_ps(total[i][v], bias) : total[i][v];
  }
}

// A whole line of y for each of the tokens m .. m + 16 V: half a line now and the other half when the panels have been
// through once more would fetch it twice.
template <int R, int V>
void product_block(const Product<float>& g, int64_t m, int64_t n) {
  __m512 sum[kLanes][V];
  const int64_t rows = least(kLanes, g.n1 - n);
  const __mmask16 mask = Vec<float>::first(int(rows));
  for (int v = 0; g.more && v < V; ++v) {
    __m512i in[16], out[16];
    for (int64_t i = 0; i < kLanes; ++i) {
      const int64_t row = m + v * kLanes + i;
      in[i] = row < g.M ? _mm512_maskz_loadu_epi32(mask, (g.y ? g.y : g.p) + row * g.ldy + n) : _mm512_setzero_si512();
    }
    transpose_words(in, out);
    for (int i = 0; i < 16; ++i) sum[i][v] = _mm512_castsi512_ps(out[i]);
  }
  for (int64_t i = 0; i < rows; i += R) sum_block<R, V>(g, m, n + i, least(R, rows - i), sum + i);
  for (int v = 0; v < V; ++v) {
    __m512i in[16], out[16];
    for (int i = 0; i < 16; ++i) in[i] = i < rows ? _mm512_castps_si512(sum[i][v]) : _mm512_setzero_si512();
    transpose_words(in, out);
    const int64_t m0 = m + v * kLanes, count = least(kLanes, g.M - m0);
    for (int64_t i = 0; i < count; ++i)
      _mm512_mask_storeu_epi32((g.y ? g.y : g.p) + (m0 + i) * g.ldy + n, mask, out[i]);
  }
}

inline void product_single(const Product<float>& g) {
  for (int64_t n = g.n0; n < g.n1; n += kLanes)
    for (int64_t m = 0; m < g.M; m += g.tokens) {
      const int64_t left = least(g.tokens, g.M - m);
      // Few tokens: more rows instead, as independent sums hide the latency of a multiply-add.
      if (g.M <= kLanes)
        product_block<16, 1>(g, m, n);
      else if (left > 2 * kLanes)
        product_block<8, 3>(g, m, n);
      else if (left > kLanes)
        product_block<8, 2>(g, m, n);
      else
        product_block<8, 1>(g, m, n);
    }
}

constexpr Fused<float> fused_single{kPanelTokens, same_depth,  same_depth,    kSumPiece,
                                    pack_single,  pack_single, product_single};

}  // namespace
}  // namespace loraxs::cpu
