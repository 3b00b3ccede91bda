// The fused product in bf16 on AMX for many tokens: tokens are the first factor, as they lie in memory; W is the
// second, packed a panel of columns at a time.
//
// Where tokens are many times as many as the columns of W, packing W costs a fraction of packing them, and sums come
// out in the order of y. The low-rank part is a few more steps of the same sum, as in fused_tiles.h. Included by
// amx_bf16.cpp alone.
#pragma once
#include "cpu/fused_tiles.h"

namespace loraxs::cpu {
namespace {

// Columns n0 .. n1 of b as second factors, in the order of the steps of q.
inline void pack_b_tiles(const bf16* b, int64_t ldb, int64_t N, int64_t r, int64_t n0, int64_t n1, bf16* out) {
  const int64_t tiles = tile_steps(r), steps = rank_steps(r);
  const Expand<bf16> columns{nullptr, nullptr, nullptr, b, 0, 0, ldb, 0, N, r, nullptr, nullptr, 0, 0, true};
  for (int64_t n = n0; n < n1; n += kTile, out += steps * kTileElements) {
    std::memset(out, 0, size_t(tiles * kTileElements) * sizeof(bf16));
    pack_columns(columns, n, tiles, out);
    if (steps > tiles) std::memcpy(out + tiles * kTileElements, out, size_t(tiles * kTileElements) * sizeof(bf16));
  }
}

// Rows of q as first factors: high and low parts.
inline void pack_q_tiles(const float* q, int64_t M, int64_t r, bf16* out) {
  const int64_t tiles = tile_steps(r), steps = rank_steps(r);
  for (int64_t m = 0; m < M; m += kTile, out += steps * kTileElements) {
    std::memset(out, 0, size_t(steps * kTileElements) * sizeof(bf16));
    split_rows(q + m * r, r, least(kTile, M - m), r, tiles, out);
  }
}

// Sums [token][column] of a 2 x 2 block to y or p.
inline void finish_rows(const RowProduct<bf16>& g, const Sums& sums, int64_t m, int64_t n) {
  const int64_t rows = least(kBlock, g.M - m), columns = least(kBlock, g.n1 - n);
  const __mmask16 low = Vec<float>::first(int(least(kTile, columns)));
  const __mmask16 high = columns > kTile ? Vec<float>::first(int(columns - kTile)) : __mmask16(0);
  if (g.p) {
    for (int64_t i = 0; i < rows; ++i) {
      const float* s = sums[i / kTile * 2] + i % kTile * kTile;
      float* p = g.p + (m + i) * g.ldy + n;
      _mm512_mask_storeu_ps(p, low, _mm512_load_ps(s));
      _mm512_mask_storeu_ps(p + kTile, high, _mm512_load_ps(s + kTile * kTile));
    }
    return;
  }
  __m512 bias0 = _mm512_setzero_ps(), bias1 = bias0;
  if (g.bias) {
    bias0 = Vec<float>::load_n(g.bias + n, int(least(kTile, columns))).v;
    if (high) bias1 = Vec<float>::load_n(g.bias + n + kTile, int(columns - kTile)).v;
  }
  const __mmask32 mask = __mmask32(low) | __mmask32(high) << kTile;
  for (int64_t i = 0; i < rows; ++i) {
    const float* s = sums[i / kTile * 2] + i % kTile * kTile;
    const __m512 s0 = _mm512_load_ps(s), s1 = _mm512_load_ps(s + kTile * kTile);
    const __m512bh y =
        g.bias ? _mm512_cvtne2ps_pbh(_mm512_add_ps(s1, bias1), _mm512_add_ps(s0, bias0)) : _mm512_cvtne2ps_pbh(s1, s0);
    _mm512_mask_storeu_epi16(g.y + (m + i) * g.ldy + n, mask, (__m512i)y);
  }
}

inline void product_rows(const RowProduct<bf16>& g) {
  const Factor x{g.x, g.K, g.M, g.K, nullptr, 0};
  const int64_t steps = tile_steps(g.K), ranks = g.q ? rank_steps(g.r) : 0;
  alignas(64) Sums sums[2];
  const TileSession session;
  int64_t done_m = 0, done_n = -1, turn = 0;
  for (int64_t m = 0; m < g.M; m += kBlock) {
    const bool two_m = m + kTile < g.M;
    const bf16* q = g.q ? g.q + m / kTile * ranks * kTileElements : nullptr;
    for (int64_t n = g.n0; n < g.n1; n += kBlock) {
      const bool two_n = n + kTile < g.n1;
      const int64_t tile = (n - g.n0) / kTile;
      const bf16* w = g.w + tile * steps * kTileElements;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t s = 0; s < steps; ++s, w += kTileElements) {
        LORAXS_LOAD_FACTOR(4, x, m, s * kTileDepth);
        _tile_loadd(6, w, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_n) {
          _tile_loadd(7, w + steps * kTileElements, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (two_m) {
          LORAXS_LOAD_FACTOR(5, x, m + kTile, s * kTileDepth);
          _tile_dpbf16ps(2, 5, 6);
          if (two_n) _tile_dpbf16ps(3, 5, 7);
        }
      }
      const bf16* b = g.b + tile * ranks * kTileElements;
      for (int64_t s = 0; s < ranks; ++s, b += kTileElements) {
        _tile_loadd(4, q + s * kTileElements, 64);
        _tile_loadd(6, b, 64);
        _tile_dpbf16ps(0, 4, 6);
        if (two_n) {
          _tile_loadd(7, b + ranks * kTileElements, 64);
          _tile_dpbf16ps(1, 4, 7);
        }
        if (two_m) {
          _tile_loadd(5, q + (ranks + s) * kTileElements, 64);
          _tile_dpbf16ps(2, 5, 6);
          if (two_n) _tile_dpbf16ps(3, 5, 7);
        }
      }
      // The block before is finished while the tiles work on this one.
      if (done_n >= 0) finish_rows(g, sums[1 - turn], done_m, done_n);
      Sums& sum = sums[turn];
      _tile_stored(0, sum[0], 64);
      _tile_stored(1, sum[1], 64);
      _tile_stored(2, sum[2], 64);
      _tile_stored(3, sum[3], 64);
      TileSession::fence();
      done_m = m, done_n = n, turn = 1 - turn;
    }
  }
  if (done_n >= 0) finish_rows(g, sums[1 - turn], done_m, done_n);
}

constexpr Fused<bf16> fused_tiles{kBlock,
                                  tile_depth,
                                  rank_tile_depth,
                                  pack_tiles,
                                  pack_rank_tiles,
                                  product_tiles,
                                  {pack_b_tiles, pack_q_tiles, product_rows}};

}  // namespace
}  // namespace loraxs::cpu
