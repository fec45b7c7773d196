// Vectors of the instruction set this file is compiled for: loads and stores with conversion, and
// the logistic function. Everything lies in the namespace DDB_LEVEL, see group_norm.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "formats.h"

namespace ddb_fast::DDB_LEVEL {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <class R>
constexpr int lanes = vector_bytes / sizeof(R);

typedef float VF __attribute__((vector_size(vector_bytes)));
typedef double VD __attribute__((vector_size(vector_bytes)));
typedef uint32_t VU __attribute__((vector_size(vector_bytes)));
typedef int32_t VI __attribute__((vector_size(vector_bytes)));
typedef uint64_t VL __attribute__((vector_size(vector_bytes)));
typedef uint16_t VS __attribute__((vector_size(vector_bytes / 2)));

// What a stored type is computed in.
template <class T>
struct Compute {
  using Real = float;
  using Vector = VF;
};
template <>
struct Compute<double> {
  using Real = double;
  using Vector = VD;
};
template <class T>
using Real = typename Compute<T>::Real;
template <class T>
using Vector = typename Compute<T>::Vector;

// How much of a vector is there.
struct All {
  static constexpr int count = 0;
};
struct Some {
  int count;
};

inline VF load(const float* p, All) {
  VF x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline VD load(const double* p, All) {
  VD x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline VF load(const BFloat16* p, All) {
#if defined(__AVX512F__)
  const VU bits = (VU)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__AVX2__)
  const VU bits = (VU)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  VS narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  const VU bits = __builtin_convertvector(narrow, VU);
#endif
  return (VF)(bits << 16);
}

inline VF load(const Half* p, All) {
#if defined(__AVX512F__)
  return (VF)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
  return (VF)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  VS bits;
  std::memcpy(&bits, p, sizeof bits);
  const VU x = __builtin_convertvector(bits, VU);
  // The exponent moves from bias 15 to 127 by a multiplication, which normalises subnormals too.
  const VF magnitude = (VF)((x & 0x7fff) << 13) * 0x1p112f;
  const VU special = (VU)((x & 0x7c00) == 0x7c00) & 0x7f800000;
  return (VF)((VU)magnitude | special | (x & 0x8000) << 16);
#endif
}

inline void store(float* p, VF x, All) { std::memcpy(p, &x, sizeof x); }
inline void store(double* p, VD x, All) { std::memcpy(p, &x, sizeof x); }

inline void store(BFloat16* p, VF x, All) {
#if defined(__AVX512BF16__)
  // Takes subnormals, which are below 1.2e-38, as zeros.
  const auto bits = _mm512_cvtneps_pbh((__m512)x);
#else
  const VU u = (VU)x;
  const VU nearest_even = u + 0x7fff + (u >> 16 & 1);
  const VU is_nan = (VU)(x != x);
  const VS bits = __builtin_convertvector((nearest_even & ~is_nan | is_nan & 0x7fc00000) >> 16, VS);
#endif
  std::memcpy(p, &bits, sizeof bits);
}

inline void store(Half* p, VF x, All) {
#if defined(__AVX512F__)
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT));
#else
  const VU sign = (VU)x & 0x80000000;
  const VU u = (VU)x ^ sign;
  // Adding 2^-1 to a subnormal leaves its rounded bits in the lowest places of the sum.
  const VU subnormal = (VU)((VF)u + 0.5f) - 0x3f000000;
  const VU normal = (u - 0x38000000 + 0xfff + (u >> 13 & 1)) >> 13;
  const VU is_small = (VU)(u < 0x38800000), is_huge = (VU)(u >= 0x47800000);
  const VU is_nan = (VU)(u > 0x7f800000);
  VU bits = subnormal & is_small | normal & ~is_small;
  bits = bits & ~is_huge | 0x7c00 & is_huge | 0x200 & is_nan;
  const VS narrow = __builtin_convertvector(bits | sign >> 16, VS);
  std::memcpy(p, &narrow, sizeof narrow);
#endif
}

template <class I, int... lane>
inline I numbered(std::integer_sequence<int, lane...>) {
  return I{lane...};
}

// x where something is, else `other`.
inline VF only(VF x, All, VF = VF{}) { return x; }
inline VD only(VD x, All, VD = VD{}) { return x; }

inline VF only(VF x, Some some, VF other = VF{}) {
  return numbered<VI>(std::make_integer_sequence<int, lanes<float>>()) < some.count ? x : other;
}

inline VD only(VD x, Some some, VD other = VD{}) {
  const auto number = numbered<VL>(std::make_integer_sequence<int, lanes<double>>());
  return number < uint64_t(some.count) ? x : other;
}

#if defined(__AVX512F__)
inline __mmask16 mask(Some some) { return __mmask16((1u << some.count) - 1); }

inline VF load(const float* p, Some some) { return (VF)_mm512_maskz_loadu_ps(mask(some), p); }

inline VD load(const double* p, Some some) {
  return (VD)_mm512_maskz_loadu_pd(__mmask8(mask(some)), p);
}

inline void store(float* p, VF x, Some some) { _mm512_mask_storeu_ps(p, mask(some), (__m512)x); }

inline void store(double* p, VD x, Some some) {
  _mm512_mask_storeu_pd(p, __mmask8(mask(some)), (__m512d)x);
}

// The 16-bit formats. What is stored and loaded in one piece does not wait for the memory between.
template <class T>
inline VF load(const T* p, Some some) {
  T whole[lanes<float>];
  _mm256_storeu_si256((__m256i*)whole, _mm256_maskz_loadu_epi16(mask(some), p));
  return load(whole, All());
}

template <class T>
inline void store(T* p, VF x, Some some) {
  T whole[lanes<float>];
  store(whole, x, All());
  _mm256_mask_storeu_epi16(p, mask(some), _mm256_loadu_si256((const __m256i*)whole));
}
#else
template <class T>
inline Vector<T> load(const T* p, Some some) {
  T whole[lanes<Real<T>>] = {};
  for (int i = 0; i < some.count; ++i) whole[i] = p[i];
  return load(whole, All());
}

template <class T>
inline void store(T* p, Vector<T> x, Some some) {
  T whole[lanes<Real<T>>];
  store(whole, x, All());
  for (int i = 0; i < some.count; ++i) p[i] = whole[i];
}
#endif

// Calls body(i, All()) for each whole vector in 0..count and body(i, Some{...}) for what is left.
template <class R, class Body>
inline void each_vector(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + lanes<R> <= count; i += lanes<R>) body(i, All());
  if (i < count) body(i, Some{int(count - i)});
}

// Where x is NaN both return it.
inline VF at_most(VF x, float limit) {
#if defined(__AVX512F__)
  return (VF)_mm512_min_ps(_mm512_set1_ps(limit), (__m512)x);
#elif defined(__AVX__)
  return (VF)_mm256_min_ps(_mm256_set1_ps(limit), (__m256)x);
#elif defined(__SSE2__)
  return (VF)_mm_min_ps(_mm_set1_ps(limit), (__m128)x);
#else
  return x > limit ? limit : x;
#endif
}

inline VF at_least(VF x, float limit) { return -at_most(-x, -limit); }

#if defined(__AVX512F__)
struct Roots {  // 2^(i / 32)
  alignas(64) float at[32];
  constexpr Roots() : at{} {
    double power = 1;
    for (float& root : at) {
      root = float(power);
      power *= 1.0218971486541166;
    }
  }
};
constexpr Roots roots;
#endif

// 2^(x * factor) = scale * rest, scale the power of the nearest multiple of 1/32, or integer where a
// vector cannot hold the table of its fractions, rest a polynomial for what is left, minimax for the
// relative error: 1e-7 and what the product is rounded by, or 1e-4 where `rough`.
template <bool rough>
struct Power {
  VF scale, rest;

  inline Power(VF x, float factor) {
#if defined(__AVX512F__)
    // Adding rounds, to 1/32 here; what it rounded to is counted in the lowest bits.
    const VF shifted = x * factor + 0x1.8p18f, n = shifted - 0x1.8p18f, r = x * factor - n;
    const VF root = (VF)_mm512_permutex2var_ps(_mm512_load_ps(roots.at), (__m512i)shifted,
                                               _mm512_load_ps(roots.at + 16));
    scale = (VF)_mm512_scalef_ps((__m512)root, (__m512)n);  // by 2^floor(n)
    if constexpr (rough)
      rest = 0.693147181f * r + 1.00002933f;
    else
      rest = (0.240226507f * r + 0.693157343f) * r + 1.0f;
#else
    const VF shifted = x * factor + 0x1.8p23f, r = x * factor - (shifted - 0x1.8p23f);
    scale = (VF)(((VU)shifted << 23) + 0x3f800000);
    if constexpr (rough) {
      rest = ((0.0551716691f * r + 0.242611122f) * r + 0.693260986f) * r + 0.999928074f;
    } else {
      const VF p = (0.00132764722f * r + 0.00967554133f) * r + 0.0555071327f;
      rest = ((p * r + 0.240221197f) * r + 0.693146967f) * r + 1.00000007f;
    }
#endif
  }
};

// 1 + exp(-z).
template <bool rough>
inline VF one_plus_exp_of_minus(VF z) {
  z = at_most(z, 80.0f);
#if !defined(__AVX512F__)
  z = at_least(z, -80.0f);  // AVX-512 overflows to an infinite scale there, whatever the rest
#endif
  const Power<rough> power(z, -1.44269504f);
  return power.scale * power.rest + 1.0f;
}

// 2^x for x <= 0; 0 or next to nothing below -126.
inline VF exp2_below_zero(VF x) {
  const Power<false> power(at_least(x, -126.0f), 1.0f);
  return power.scale * power.rest;
}

template <bool rough>
inline VF quotient(VF x, VF d) {
#if defined(__AVX512F__)
  if constexpr (rough) return x * (VF)_mm512_rcp14_ps((__m512)d);
#endif
  return x / d;
}

template <bool rough>
inline VD one_plus_exp_of_minus(VD z) {
  for (int i = 0; i < lanes<double>; ++i) z[i] = 1.0 + __builtin_exp(-z[i]);
  return z;
}

template <bool rough>
inline VD quotient(VD x, VD d) {
  return x / d;
}

template <int step, int... lane>
inline VF exchanged(VF x, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(x, x, (lane ^ step)...);
}

// All lanes combined in pairs, lanes / 2 apart first.
template <int step = lanes<float> / 2, class Combine>
inline float reduced(VF x, const Combine& combine) {
  if constexpr (step == 0) {
    return x[0];
  } else {
    const VF other = exchanged<step>(x, std::make_integer_sequence<int, lanes<float>>());
    return reduced<step / 2>(combine(x, other), combine);
  }
}

inline float sum(VF x) {
  return reduced(x, [](VF a, VF b) { return a + b; });
}

inline double sum(VD x) {
  double total = 0;
  for (int i = 0; i < lanes<double>; ++i) total += x[i];
  return total;
}

}  // namespace ddb_fast::DDB_LEVEL
