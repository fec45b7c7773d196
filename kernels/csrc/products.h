// Matrix products of what lies in a cache: c += a b in fp32, from fp32 or, where the processor has
// dot products of bf16, from bf16. a lies row by row; b in panels a few vectors wide, within which
// the rows follow one another (of bf16, pairs of rows with their elements interleaved).
#pragma once

#include "simd.h"

namespace ddb_fast::DDB_LEVEL {

// As many accumulators as leave registers for a row of b and an element of a.
constexpr int tile_rows = 6;
#if defined(__AVX512F__)
constexpr int panel_vectors = 4;
#else
constexpr int panel_vectors = 2;
#endif
constexpr int64_t panel = panel_vectors * lanes<float>;

// Elements of a row of a, or of a column of b, that one step of a product takes: a 32-bit word.
template <class P>
constexpr int64_t pair = sizeof(float) / sizeof(P);

// What a format is multiplied in.
template <class T>
struct Product {
  using Type = float;
};
#if defined(__AVX512BF16__)
template <>
struct Product<BFloat16> {
  using Type = BFloat16;
};
#endif

inline constexpr int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

template <class P>
inline VF multiply_add(VF a, VF b, VF c) {
#if defined(__AVX512BF16__)
  if constexpr (sizeof(P) == 2) return (VF)_mm512_dpbf16_ps((__m512)c, (__m512bh)a, (__m512bh)b);
#endif
  return a * b + c;
}

// R rows and V vectors of c (+)= a b over `words` words of k. Strides in elements.
template <class P, int R, int V, bool add>
inline void product_tile(const P* a, int64_t a_stride, const P* b, int64_t words, float* c,
                         int64_t c_stride) {
  constexpr int64_t step = lanes<float> * pair<P>;
  VF sums[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v)
      sums[r][v] = add ? load(c + r * c_stride + v * lanes<float>, All()) : VF{};
  for (int64_t k = 0; k < words; ++k) {
    VF row[V];
    for (int v = 0; v < V; ++v) std::memcpy(&row[v], b + (k * panel_vectors + v) * step, sizeof(VF));
    for (int r = 0; r < R; ++r) {
      float word;
      std::memcpy(&word, a + r * a_stride + k * pair<P>, sizeof word);
      const VF element = VF{} + word;
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add<P>(element, row[v], sums[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) store(c + r * c_stride + v * lanes<float>, sums[r][v], All());
}

template <class P, int V, bool add>
inline void product_panel(const P* a, int64_t a_stride, int64_t rows, const P* b, int64_t words,
                          float* c, int64_t c_stride) {
  int64_t r = 0;
  for (; r + tile_rows <= rows; r += tile_rows)
    product_tile<P, tile_rows, V, add>(a + r * a_stride, a_stride, b, words, c + r * c_stride,
                                       c_stride);
  a += r * a_stride;
  c += r * c_stride;
  switch (rows - r) {
    case 1: return product_tile<P, 1, V, add>(a, a_stride, b, words, c, c_stride);
    case 2: return product_tile<P, 2, V, add>(a, a_stride, b, words, c, c_stride);
    case 3: return product_tile<P, 3, V, add>(a, a_stride, b, words, c, c_stride);
    case 4: return product_tile<P, 4, V, add>(a, a_stride, b, words, c, c_stride);
    case 5: return product_tile<P, 5, V, add>(a, a_stride, b, words, c, c_stride);
  }
}

// c (rows, columns) = or += a (rows, k) b (k, columns). Panels of b are panel_stride elements apart;
// c is written up to the end of the last vector, and a and b are read up to the end of the last pair.
template <class P, bool add>
inline void product(const P* a, int64_t a_stride, int64_t rows, const P* b, int64_t panel_stride,
                    int64_t columns, int64_t k, float* c, int64_t c_stride) {
  const int64_t words = (k + pair<P> - 1) / pair<P>;
  for (int64_t at = 0; at < columns; at += panel, b += panel_stride, c += panel) {
    const int64_t vectors = (columns - at + lanes<float> - 1) / lanes<float>;
    if (vectors >= panel_vectors)
      product_panel<P, panel_vectors, add>(a, a_stride, rows, b, words, c, c_stride);
    else if (panel_vectors > 2 && vectors == 3)
      product_panel<P, panel_vectors - 1, add>(a, a_stride, rows, b, words, c, c_stride);
    else if (panel_vectors > 2 && vectors == 2)
      product_panel<P, panel_vectors / 2, add>(a, a_stride, rows, b, words, c, c_stride);
    else
      product_panel<P, 1, add>(a, a_stride, rows, b, words, c, c_stride);
  }
}

// A row of T as a row of P, zeros behind it up to `length`.
template <class P, class T>
inline void copy_row(const T* from, int64_t count, P* to, int64_t length) {
  if constexpr (sizeof(P) == sizeof(T)) {
    std::memcpy(to, from, count * sizeof(T));
  } else {
    each_vector<float>(count, [&](int64_t i, auto part) { store(to + i, load(from + i, part), part); });
  }
  std::memset(to + count, 0, (length - count) * sizeof(P));
}

// Rows of a product's a: (rows, k) with `stride` between rows to (rows, length), zeros behind k.
template <class P, class T>
inline void pack_rows(const T* from, int64_t stride, int64_t rows, int64_t k, P* to,
                      int64_t length) {
  for (int64_t r = 0; r < rows; ++r) copy_row(from + r * stride, k, to + r * length, length);
}

// Panels of a product's b (k, columns), whose rows lie `stride` apart; zeros behind the columns and
// behind k. `row` is scratch for two rows of all panels.
template <class P, class T>
inline void pack_panels(const T* from, int64_t stride, int64_t k, int64_t columns, P* to,
                        int64_t panel_stride, P* row) {
  const int64_t length = round_up(columns, panel);
  for (int64_t i = 0; i < k; i += pair<P>) {
    P* pieces[2] = {row, row + length};
    for (int64_t half = 0; half < pair<P>; ++half)
      copy_row(from + (i + half) * stride, i + half < k ? columns : 0, pieces[half], length);
    for (int64_t at = 0; at < length; at += panel) {
      P* out = to + at / panel * panel_stride + i * panel;
      if constexpr (sizeof(P) == sizeof(float)) {
        std::memcpy(out, row + at, panel * sizeof(P));
      } else {
        uint32_t words[panel];
        for (int64_t n = 0; n < panel; ++n)
          words[n] = uint32_t(pieces[0][at + n].bits) | uint32_t(pieces[1][at + n].bits) << 16;
        std::memcpy(out, words, sizeof words);
      }
    }
  }
}

// Panels of the transpose: b (k, columns) is given as `columns` rows of k elements. `rows` is scratch
// for one panel's worth of them.
template <class P, class T>
inline void pack_panels_transposed(const T* from, int64_t stride, int64_t k, int64_t columns, P* to,
                                   int64_t panel_stride, P* rows) {
  const int64_t length = round_up(k, pair<P>), words = length / pair<P>;
  for (int64_t at = 0; at < columns; at += panel, to += panel_stride) {
    for (int64_t n = 0; n < panel; ++n)
      copy_row(from + (at + n) * stride, at + n < columns ? k : 0, rows + n * length, length);
    for (int64_t n = 0; n < panel; n += 8)
      for (int64_t w = 0; w < words; ++w) {
        uint32_t eight[8];
        for (int64_t j = 0; j < 8; ++j)
          std::memcpy(eight + j, rows + (n + j) * length + w * pair<P>, sizeof(uint32_t));
        std::memcpy(to + (w * panel + n) * pair<P>, eight, sizeof eight);
      }
  }
}

}  // namespace ddb_fast::DDB_LEVEL
