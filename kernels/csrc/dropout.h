// Random 16-bit integers by Philox-4x32-10 (Salmon et al. 2011), as reference.random_halves defines
// them: one counter for eight channels of a pixel, whatever the layout in memory.
#pragma once

#include "simd.h"

namespace ddb_fast::DDB_LEVEL {

// The product of the low 32 bits of each lane.
inline VL multiply_low(VL a, uint32_t factor) {
#if defined(__AVX512F__)
  return (VL)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(factor));
#elif defined(__AVX2__)
  return (VL)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(factor));
#elif defined(__SSE2__)
  return (VL)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(factor));
#else
  return (a & 0xffffffff) * factor;
#endif
}

// Four words for each 64-bit counter, in the low halves of the lanes; the high ones are arbitrary.
inline void philox(VL counter, uint64_t seed, VL (&word)[4]) {
  VL c0 = counter, c1 = counter >> 32, c2 = {}, c3 = {};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const VL a = multiply_low(c0, 0xD2511F53), b = multiply_low(c2, 0xCD9E8D57);
    c0 = (b >> 32) ^ c1 ^ k0;
    c1 = b;
    c2 = (a >> 32) ^ c3 ^ k1;
    c3 = a;
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

inline VL counters(uint64_t first, uint64_t step) {
  VL counter;
  for (int i = 0; i < lanes<uint64_t>; ++i) counter[i] = first + i * step;
  return counter;
}

// out[8 * i + j] is channel j of the block with counter first + i. Writes whole vectors: up to
// 8 * (lanes<uint64_t> - 1) elements more.
inline void draw_blocks(uint64_t seed, uint64_t first, int64_t count, uint16_t* out) {
  constexpr int width = lanes<uint64_t>;
  VL counter = counters(first, 1), word[4];
  for (int64_t i = 0; i < count; i += width, counter += width) {
    philox(counter, seed, word);
    VL low = {}, high = {};
    for (int j = 0; j < 4; ++j) {
      low |= (word[j] & 0xffff) << (16 * j);
      high |= (word[j] >> 16 & 0xffff) << (16 * j);
    }
    for (int k = 0; k < width; ++k) {
      const uint64_t halves[2] = {low[k], high[k]};
      std::memcpy(out + 8 * (i + k), halves, sizeof halves);
    }
  }
}

// out[j * row + i] is channel j of the block with counter first + i * step; `row` is a multiple of
// lanes<uint64_t> and at least `count`.
inline void draw_pixels(
    uint64_t seed, uint64_t first, uint64_t step, int64_t count, uint16_t* out, int64_t row) {
  constexpr int width = lanes<uint64_t>;
  typedef uint16_t Narrow __attribute__((vector_size(2 * width)));
  VL counter = counters(first, step), word[4];
  for (int64_t i = 0; i < count; i += width, counter += width * step) {
    philox(counter, seed, word);
    for (int j = 0; j < 8; ++j) {
      const Narrow half = __builtin_convertvector(word[j % 4] >> (16 * (j / 4)), Narrow);
      std::memcpy(out + j * row + i, &half, sizeof half);
    }
  }
}

// x * scale where the draw is not below the threshold, else 0.
inline VF keep(const uint16_t* halves, VF x, uint32_t threshold, double scale) {
  VS narrow;
  std::memcpy(&narrow, halves, sizeof narrow);
  return __builtin_convertvector(narrow, VU) >= threshold ? x * float(scale) : VF{};
}

inline VD keep(const uint16_t* halves, VD x, uint32_t threshold, double scale) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = halves[i] >= threshold ? x[i] * scale : 0.0;
  return x;
}

}  // namespace ddb_fast::DDB_LEVEL
