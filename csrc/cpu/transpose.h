// 16 x 16 words of 32 bits transposed in registers. Included once per AVX-512 level.
#pragma once
#include <immintrin.h>

namespace loraxs::cpu {
namespace {

inline void transpose_words(const __m512i in[16], __m512i out[16]) {
  __m512i t[16], u[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(in[i], in[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(in[i], in[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    u[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    u[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    u[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    u[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // u[4 g + c] holds, in its 128-bit lane l, word 4 l + c of rows 4 g .. 4 g + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i a = _mm512_shuffle_i32x4(u[c], u[c + 4], 0x88), b = _mm512_shuffle_i32x4(u[c], u[c + 4], 0xdd);
    const __m512i d = _mm512_shuffle_i32x4(u[c + 8], u[c + 12], 0x88);
    const __m512i e = _mm512_shuffle_i32x4(u[c + 8], u[c + 12], 0xdd);
    out[0 + c] = _mm512_shuffle_i32x4(a, d, 0x88);
    out[4 + c] = _mm512_shuffle_i32x4(b, e, 0x88);
    out[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
    out[12 + c] = _mm512_shuffle_i32x4(b, e, 0xdd);
  }
}

}  // namespace
}  // namespace loraxs::cpu
