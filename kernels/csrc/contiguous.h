// The passes over the pixels of a slab where the pixels of a channel lie side by side.
#pragma once

#include "pointwise.h"
#include "slab.h"

namespace ddb_fast::DDB_LEVEL {

// Calls body(channel, from, to, halves) for each channel of the slab and run of its pixels; `halves`
// are the draws from pixel `from` on, or null without dropout.
template <class R, class Body>
inline void each_run(const Slab<R>& slab, bool dropout, const Body& body) {
  const Call& call = slab.call;
  if (!dropout) {
    for (int64_t c = 0; c < slab.count; ++c) body(c, int64_t(0), call.pixels, nullptr);
    return;
  }
  const int64_t blocks = (call.channels + 7) / 8, last = slab.first + slab.count;
  for (int64_t block = slab.first / 8; block * 8 < last; ++block)
    for (int64_t from = 0; from < call.pixels; from += drawn_pixels) {
      const int64_t to = from + drawn_pixels < call.pixels ? from + drawn_pixels : call.pixels;
      draw_pixels(call.seed, (slab.sample * call.pixels + from) * blocks + block, blocks, to - from,
                  slab.halves, slab.halves_row);
      for (int64_t j = 0; j < 8; ++j)
        if (block * 8 + j >= slab.first && block * 8 + j < last)
          body(block * 8 + j - slab.first, from, to, slab.halves + j * slab.halves_row);
    }
}

template <class T>
struct Contiguous {
  using R = Real<T>;
  using V = Vector<T>;

  static V all(R x) { return V{} + x; }

  // Pixels of a block whose sums are kept in vectors of Real.
  static constexpr int64_t block = block_terms * lanes<R>;

  static void statistics(Slab<R>& slab) {
    slab.call.residual ? statistics_of<true>(slab) : statistics_of<false>(slab);
  }

  template <bool with_residual>
  static void statistics_of(Slab<R>& slab) {
    const int64_t pixels = slab.call.pixels;
    for (int64_t c = 0; c < slab.count; ++c) {
      const int64_t origin = slab.origin() + c * pixels;
      const T *x = static_cast<const T*>(slab.call.x) + origin;
      const T *residual = static_cast<const T*>(slab.call.residual) + origin;
      const auto s = [&](int64_t at, auto some) {
        V value = load(x + at, some);
        if constexpr (with_residual) value += load(residual + at, some);
        return value;
      };
      // A vector of one lane is put together in memory, which stalls the load behind it.
      slab.offset[c] = (pixels < lanes<R> ? s(0, Some{1}) : s(0, All()))[0];
      for (int64_t from = 0; from < pixels; from += block) {
        const int64_t count = from + block < pixels ? block : pixels - from;
        const V offset = all(slab.offset[c]);
        V sum1 = {}, sum2 = {};
        each_vector<R>(count, [&](int64_t i, auto some) {
          const V d = only(s(from + i, some) - offset, some);
          sum1 += d;
          sum2 += d * d;
        });
        slab.sums[0][c] = sum(sum1);
        slab.sums[1][c] = sum(sum2);
        if (pixels > block) add_block(slab, c, c + 1, from, count);
      }
    }
    // For one channel alone this takes longer than the sums of 64 pixels.
    if (pixels <= block) add_block(slab, 0, slab.count, 0, pixels);
  }

  template <bool silu, bool extra>
  static void apply(Slab<R>& slab) {
    const Call& call = slab.call;
    each_run(slab, extra && call.dropout,
             [&](int64_t c, int64_t from, int64_t to, const uint16_t* halves) {
      const int64_t origin = slab.origin() + c * call.pixels + from;
      const T *x = static_cast<const T*>(call.x) + origin;
      const T *residual = static_cast<const T*>(call.residual) + origin;
      T *y = static_cast<T*>(call.y) + origin, *total = static_cast<T*>(call.total) + origin;
      const V a = all(slab.a[c]), b = all(slab.b[c]), pre_bias = all(slab.pre_bias[c]);
      each_vector<R>(to - from, [&](int64_t i, auto some) {
        V s = load(x + i, some);
        if (extra && call.residual) s += load(residual + i, some);
        if (extra && call.total) store(total + i, s + pre_bias, some);
        V value = activation<T, silu>(s * a + b);
        if (extra && halves)
          value = keep(halves + i, value, call.dropout_threshold, call.dropout_scale);
        store(y + i, value, some);
      });
    });
  }

  template <bool silu, bool extra, bool kept>
  static void gradient_sums(Slab<R>& slab) {
    const Call& call = slab.call;
    clear_sums(slab);
    each_run(slab, extra && call.dropout,
             [&](int64_t c, int64_t first, int64_t last, const uint16_t* halves) {
      const int64_t origin = slab.origin() + c * call.pixels;
      const T *x = static_cast<const T*>(call.x) + origin;
      const T *dy = static_cast<const T*>(call.dy) + origin;
      const T *d_sum = static_cast<const T*>(call.d_sum) + origin;
      R* dzs = sizeof(T) == sizeof(R) ? static_cast<R*>(call.ds) + origin : slab.dz + c * call.pixels;
      const V a = all(slab.a[c]), b = all(slab.b[c]), offset = all(slab.offset[c]);
      for (int64_t from = first; from < last; from += block) {
        V sums[4] = {};
        each_vector<R>(from + block < last ? block : last - from, [&](int64_t i, auto some) {
          const int64_t at = from + i;
          const V s = load(x + at, some);
          V dz = activation_gradient<T, silu>(s * a + b, load(dy + at, some));
          if (extra && halves)
            dz = keep(halves + at - first, dz, call.dropout_threshold, call.dropout_scale);
          if constexpr (kept) store(dzs + at, dz, some);
          sums[0] += dz;
          sums[1] += dz * (s - offset);
          if (extra && call.d_pre_bias) {
            sums[2] += only(s - offset, some);
            if (call.d_sum) sums[3] += load(d_sum + at, some);
          }
        });
        for (int k = 0; k < (extra ? 4 : 2); ++k) slab.totals[k][c] += sum(sums[k]);
      }
    });
  }

  template <bool silu, bool extra, bool kept>
  static void gradient_apply(Slab<R>& slab) {
    const Call& call = slab.call;
    each_run(slab, !kept && extra && call.dropout,
             [&](int64_t c, int64_t from, int64_t to, const uint16_t* halves) {
      const int64_t origin = slab.origin() + c * call.pixels + from;
      const T *x = static_cast<const T*>(call.x) + origin;
      const T *dy = static_cast<const T*>(call.dy) + origin;
      const T *d_sum = static_cast<const T*>(call.d_sum) + origin;
      T* ds = static_cast<T*>(call.ds) + origin;
      const R* dzs = sizeof(T) == sizeof(R) ? static_cast<const R*>(call.ds) + origin
                                            : slab.dz + c * call.pixels + from;
      const V a = all(slab.a[c]), b = all(slab.b[c]), gain = all(slab.gain[c]);
      const V q = all(slab.q[c]), p = all(slab.p[c]);
      each_vector<R>(to - from, [&](int64_t i, auto some) {
        const V s = load(x + i, some);
        V dz;
        if constexpr (kept) {
          dz = load(dzs + i, some);
        } else {
          dz = activation_gradient<T, silu>(s * a + b, load(dy + i, some));
          if (extra && halves)
            dz = keep(halves + i, dz, call.dropout_threshold, call.dropout_scale);
        }
        V value = dz * gain + (s * q + p);
        if (extra && call.d_sum) value += load(d_sum + i, some);
        store(ds + i, value, some);
      });
    });
  }
};

}  // namespace ddb_fast::DDB_LEVEL
