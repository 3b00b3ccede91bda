// The fused product in bf16 on AMX for many tokens: they are the first factor and stay where they lie; W is the second
// and is brought into panels once.
//
// Against fused_tiles.h nothing is turned around for a token, neither x nor y, but all of W is; a W that is read across
// only has its rows interleaved. A block of sums is finished while the tiles work on the next one. Included by
// amx_bf16.cpp alone.
#pragma once
#include "cpu/fused_tiles.h"

namespace loraxs::cpu {
namespace {

static_assert(kPanelColumns == kBlock);

// Steps of b: the high and the low parts of q take the same ones.
inline int64_t basis_steps(int64_t r) { return r == 0 ? 0 : tile_steps(r); }

// A panel has two columns of tiles, each with all steps of w and then those of b.
inline int64_t column_size(int64_t K, int64_t r) { return (tile_steps(K) + basis_steps(r)) * kTileElements; }
inline int64_t panel_size(int64_t K, int64_t r) { return 2 * column_size(K, r); }

// Rows k .. k + 32 of a w that is read across, for the columns n .. n + 32: pairs of rows interleaved.
inline void interleave_rows(const PackColumns<bf16>& g, int64_t n, int64_t k, bf16* first, bf16* second) {
  alignas(64) static constexpr uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                    8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(kTile));
  const __mmask32 mask = __mmask32((uint64_t(1) << least(kBlock, g.n1 - n)) - 1);
  const auto row = [&](int64_t at) {
    return at < g.K ? _mm512_maskz_loadu_epi16(mask, g.w + at * g.ldw + n) : _mm512_setzero_si512();
  };
  for (int64_t i = 0; i < kTile; ++i) {
    const __m512i even = row(k + 2 * i), odd = row(k + 2 * i + 1);
    _mm512_store_si512(first + i * kTileDepth, _mm512_permutex2var_epi16(even, low, odd));
    _mm512_store_si512(second + i * kTileDepth, _mm512_permutex2var_epi16(even, high, odd));
  }
}

inline void pack_panels(const PackColumns<bf16>& g) {
  const int64_t steps = tile_steps(g.K), column = column_size(g.K, g.r);
  const auto tile = [&](int64_t n, int64_t step) { return g.out + (n - g.n0) / kTile * column + step * kTileElements; };
  if (g.across) {
    for (int64_t s = 0; s < steps; ++s)
      for (int64_t n = g.n0; n < g.n1; n += kBlock)
        interleave_rows(g, n, s * kTileDepth, tile(n, s), tile(n + kTile, s));
  } else {
    const Factor w{g.w, g.ldw, g.n1, g.K, nullptr, 0};
    for (int64_t n = g.n0; n < g.n1; n += kTile)
      for (int64_t s = 0; s < steps; ++s) {
        __m512i line[16];
        for (int64_t i = 0; i < kTile; ++i) line[i] = w.line(n + i, s * kTileDepth);
        transpose_pairs(line, tile(n, s));
      }
  }
  if (g.r == 0) return;
  const Expand<bf16> b{nullptr, nullptr, nullptr, g.b, 0, 0, g.ldb, 0, g.n1, g.r, nullptr, nullptr, 0, 0, true};
  for (int64_t n = g.n0; n < g.n1; n += kTile) pack_columns(b, n, basis_steps(g.r), tile(n, steps));
}

// Rows of q as first factors, for 16 tokens after the other.
inline void pack_rank_rows(const Pack<bf16, float>& g) {
  for (int64_t m = 0; m < g.M; m += kTile)
    split_rows(g.rows + m * g.ld, g.ld, least(kTile, g.M - m), g.depth, tile_steps(g.depth),
               g.panel + m * rank_tile_depth(g.depth));
}

// The rows of a block of sums on their way to y or p, some at every step of the block that comes next.
class Finish {
 public:
  Finish(const PanelProduct<bf16>& g, const Sums& sums)
      : g_(g), sums_(sums), share_((kBlock + tile_steps(g.K) - 1) / tile_steps(g.K)) {}

  // The sums are now those of the tokens from m and the columns from n.
  void begin(int64_t m, int64_t n) {
    const int64_t columns = least(kBlock, g_.n1 - n);
    row_ = 0, rows_ = least(kBlock, g_.M - m);
    mask_ = __mmask32((uint64_t(1) << columns) - 1);
    for (int64_t c = 0; c < 2; ++c)
      bias_[c] = g_.bias && c * kTile < columns
                     ? Vec<float>::load_n(g_.bias + n + c * kTile, int(least(kTile, columns - c * kTile)))
                     : Vec<float>::zero();
    at_ = m * g_.ldy + n;
  }
  void operator()(int64_t) { rows(share_); }
  void rest() { rows(kBlock); }

 private:
  [[gnu::always_inline]] void rows(int64_t count) {
    for (const int64_t end = least(row_ + count, rows_); row_ < end; ++row_, at_ += g_.ldy) {
      const float* sum = sums_[row_ / kTile * 2] + row_ % kTile * kTile;
      const __m512 low = _mm512_add_ps(_mm512_load_ps(sum), bias_[0].v);
      const __m512 high = _mm512_add_ps(_mm512_load_ps(sum + kTile * kTile), bias_[1].v);
      if (g_.p) {
        const __m512 alpha = _mm512_set1_ps(g_.alpha);
        _mm512_mask_storeu_ps(g_.p + at_, __mmask16(mask_), _mm512_mul_ps(low, alpha));
        _mm512_mask_storeu_ps(g_.p + at_ + kTile, __mmask16(mask_ >> kTile), _mm512_mul_ps(high, alpha));
      } else {
        _mm512_mask_storeu_epi16(g_.y + at_, mask_, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
    }
  }

  const PanelProduct<bf16>& g_;
  const Sums& sums_;
  const int64_t share_;
  int64_t row_ = 0, rows_ = 0, at_ = 0;
  __mmask32 mask_ = 0;
  Vec<float> bias_[2];
};

template <bool kTwoTokens, bool kTwoColumns>
void add_panel(const PanelProduct<bf16>& g, int64_t m, const bf16* w, Finish& finish) {
  const int64_t steps = tile_steps(g.K), column = column_size(g.K, g.r);
  const bf16* x = g.x + m * g.ldx;
  add_tiles<kTwoTokens, kTwoColumns, Passing::first>(x, x + kTile * g.ldx, kTileDepth, g.ldx * 2, w, w + column, steps,
                                                     finish);
  if (g.q == nullptr) return;
  const int64_t ranks = basis_steps(g.r), depth = rank_tile_depth(g.r);
  const bf16 *q = g.q + m * depth, *b = w + steps * kTileElements;
  for (const bf16* end = q + kTile * depth; q < end; q += ranks * kTileElements)
    add_tiles<kTwoTokens, kTwoColumns, Passing::none>(q, q + kTile * depth, kTileElements, 64, b, b + column, ranks,
                                                      finish);
}

inline void product_panels(const PanelProduct<bf16>& g) {
  alignas(64) Sums sums;
  Finish finish(g, sums);
  const TileSession session;
  for (int64_t n = g.n0; n < g.n1; n += kBlock) {
    const bf16* w = g.panels + (n - g.n0) / kBlock * panel_size(g.K, g.r);
    const bool two_columns = n + kTile < g.n1;
    for (int64_t m = 0; m < g.M; m += kBlock) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      if (m + kTile < g.M)
        two_columns ? add_panel<true, true>(g, m, w, finish) : add_panel<true, false>(g, m, w, finish);
      else
        two_columns ? add_panel<false, true>(g, m, w, finish) : add_panel<false, false>(g, m, w, finish);
      finish.rest();
      TileSession::fence();
      _tile_stored(0, sums[0], 64);
      _tile_stored(1, sums[1], 64);
      _tile_stored(2, sums[2], 64);
      _tile_stored(3, sums[3], 64);
      TileSession::fence();
      finish.begin(m, n);
    }
  }
  finish.rest();
}

constexpr Many<bf16> fused_panels{tile_depth, rank_tile_depth, panel_size, pack_panels, pack_rank_rows, product_panels};

}  // namespace
}  // namespace loraxs::cpu
