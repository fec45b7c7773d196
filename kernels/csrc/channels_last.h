// The passes over the pixels of a slab where the channels of a pixel lie side by side.
#pragma once

#include "pointwise.h"
#include "slab.h"

namespace ddb_fast::DDB_LEVEL {

template <int n>
struct Count {
  static constexpr int value = n;
};

template <class Body>
inline void each_rows(int64_t first, int64_t last, const Body& body) {
  for (; first + 4 <= last; first += 4) body(first, Count<4>());
  for (; first < last; ++first) body(first, Count<1>());
}

// How many elements ahead of a first pass memory is asked for: the four rows that it reads side by
// side are more than the machine's own prefetching follows. Measured against 0, 2, 8 and 24 KiB; past
// the end of a tensor nothing happens. Asking for what is written gained nothing.
template <class T>
inline int64_t whole_rows_ahead(int64_t stride) {
  constexpr int64_t elements = 4096 / sizeof(T);
  return (elements + stride - 1) / stride * stride;
}

template <class R>
inline void draw_rows(const Slab<R>& slab, int64_t pixel, int64_t rows) {
  const Call& call = slab.call;
  const int64_t blocks = (call.channels + 7) / 8, block = slab.first / 8;
  const int64_t count = (slab.first + slab.count + 7) / 8 - block;
  for (int64_t r = 0; r < rows; ++r)
    draw_blocks(call.seed, (slab.sample * call.pixels + pixel + r) * blocks + block, count,
                slab.halves + r * slab.halves_row);
}

template <class T>
struct ChannelsLast {
  using R = Real<T>;
  using V = Vector<T>;

  static void statistics(Slab<R>& slab) {
    const Call& call = slab.call;
    const T* x = static_cast<const T*>(call.x) + slab.origin();
    const T* residual = call.residual ? static_cast<const T*>(call.residual) + slab.origin() : x;
    call.residual ? statistics_of<true>(slab, x, residual) : statistics_of<false>(slab, x, x);
  }

  template <bool with_residual>
  static void statistics_of(Slab<R>& slab, const T* x, const T* residual) {
    const int64_t stride = slab.call.channels, pixels = slab.call.pixels;
    const int64_t far = whole_rows_ahead<T>(stride);
    const auto s = [&](int64_t at, auto some) {
      V value = load(x + at, some);
      if constexpr (with_residual) value += load(residual + at, some);
      return value;
    };
    each_vector<R>(slab.count, [&](int64_t i, auto some) {
      store(slab.offset + i, s(i, some), All());
      store(slab.sums[0] + i, V{}, All());
      store(slab.sums[1] + i, V{}, All());
    });
    for (int64_t block = 0; block < pixels; block += block_terms) {
      const int64_t end = block + block_terms < pixels ? block + block_terms : pixels;
      each_rows(block, end, [&](int64_t pixel, auto rows) {
        each_vector<R>(slab.count, [&](int64_t i, auto some) {
          const V offset = load(slab.offset + i, All());
          V sum1 = load(slab.sums[0] + i, All()), sum2 = load(slab.sums[1] + i, All());
          for (int r = 0; r < rows.value; ++r) {
            __builtin_prefetch(x + (pixel + r) * stride + i + far);
            const V d = s((pixel + r) * stride + i, some) - offset;
            sum1 += d;
            sum2 += d * d;
          }
          store(slab.sums[0] + i, sum1, All());
          store(slab.sums[1] + i, sum2, All());
        });
      });
      add_block(slab, 0, slab.count, block, end - block);
    }
  }

  // `extra` is any of residual, total and dropout.
  template <bool silu, bool extra>
  static void apply(Slab<R>& slab) {
    const Call& call = slab.call;
    const int64_t stride = call.channels, origin = slab.origin();
    const T *x = static_cast<const T*>(call.x) + origin;
    const T *residual = static_cast<const T*>(call.residual) + origin;
    T *y = static_cast<T*>(call.y) + origin, *total = static_cast<T*>(call.total) + origin;
    // Backwards, so that what the statistics have read last is still in the cache.
    for (int64_t end = call.pixels; end > 0; end -= block_terms)
      each_rows(end > block_terms ? end - block_terms : 0, end, [&](int64_t pixel, auto rows) {
        if (extra && call.dropout) draw_rows(slab, pixel, rows.value);
        const uint16_t* halves = slab.halves + slab.first % 8;
        each_vector<R>(slab.count, [&](int64_t i, auto some) {
          const V a = load(slab.a + i, All()), b = load(slab.b + i, All());
          for (int r = 0; r < rows.value; ++r) {
            const int64_t at = (pixel + r) * stride + i;
            V s = load(x + at, some);
            if (extra && call.residual) s += load(residual + at, some);
            if (extra && call.total) store(total + at, s + load(slab.pre_bias + i, All()), some);
            V value = activation<T, silu>(s * a + b);
            if (extra && call.dropout)
              value = keep(halves + r * slab.halves_row + i, value, call.dropout_threshold,
                           call.dropout_scale);
            store(y + at, value, some);
          }
        });
      });
  }

  // `extra` is any of d_sum, d_pre_bias and dropout. `kept`: dz waits for the second pass, where ds
  // will be if that has room for it, else in the slab's scratch memory.
  template <bool silu, bool extra, bool kept>
  static void gradient_sums(Slab<R>& slab) {
    const Call& call = slab.call;
    const int64_t stride = call.channels, origin = slab.origin();
    const T *x = static_cast<const T*>(call.x) + origin, *dy = static_cast<const T*>(call.dy) + origin;
    const T* d_sum = static_cast<const T*>(call.d_sum) + origin;
    T* ds = static_cast<T*>(call.ds) + origin;
    constexpr bool in_place = sizeof(T) == sizeof(R);
    R* dzs = in_place ? reinterpret_cast<R*>(ds) : slab.dz;
    const int64_t far = whole_rows_ahead<T>(stride);
    const int64_t dz_stride = in_place ? stride : slab.row(call);
    clear_sums(slab);
    for (int64_t block = 0; block < call.pixels; block += block_terms) {
      const int64_t end = block + block_terms < call.pixels ? block + block_terms : call.pixels;
      each_rows(block, end, [&](int64_t pixel, auto rows) {
        if (extra && call.dropout) draw_rows(slab, pixel, rows.value);
        const uint16_t* halves = slab.halves + slab.first % 8;
        each_vector<R>(slab.count, [&](int64_t i, auto some) {
          const V a = load(slab.a + i, All()), b = load(slab.b + i, All());
          const V offset = load(slab.offset + i, All());
          V sums[4];
          for (int k = 0; k < (extra ? 4 : 2); ++k) sums[k] = load(slab.sums[k] + i, All());
          for (int r = 0; r < rows.value; ++r) {
            const int64_t at = (pixel + r) * stride + i;
            __builtin_prefetch(x + at + far);
            __builtin_prefetch(dy + at + far);
            const V s = load(x + at, some);
            V dz = activation_gradient<T, silu>(s * a + b, load(dy + at, some));
            if (extra && call.dropout)
              dz = keep(halves + r * slab.halves_row + i, dz, call.dropout_threshold,
                        call.dropout_scale);
            if constexpr (kept) store(dzs + (pixel + r) * dz_stride + i, dz, some);
            sums[0] += dz;
            sums[1] += dz * (s - offset);
            if (extra && call.d_pre_bias) {
              sums[2] += s - offset;
              if (call.d_sum) sums[3] += load(d_sum + at, some);
            }
          }
          for (int k = 0; k < (extra ? 4 : 2); ++k) store(slab.sums[k] + i, sums[k], All());
        });
      });
      add_gradient_block(slab, 0, slab.count);
    }
  }

  template <bool silu, bool extra, bool kept>
  static void gradient_apply(Slab<R>& slab) {
    const Call& call = slab.call;
    const int64_t stride = call.channels, origin = slab.origin();
    const T *x = static_cast<const T*>(call.x) + origin, *dy = static_cast<const T*>(call.dy) + origin;
    const T* d_sum = static_cast<const T*>(call.d_sum) + origin;
    T* ds = static_cast<T*>(call.ds) + origin;
    constexpr bool in_place = sizeof(T) == sizeof(R);
    R* dzs = in_place ? reinterpret_cast<R*>(ds) : slab.dz;
    const int64_t dz_stride = in_place ? stride : slab.row(call);
    for (int64_t end = call.pixels; end > 0; end -= block_terms)
      each_rows(end > block_terms ? end - block_terms : 0, end, [&](int64_t pixel, auto rows) {
        if (!kept && extra && call.dropout) draw_rows(slab, pixel, rows.value);
        const uint16_t* halves = slab.halves + slab.first % 8;
        each_vector<R>(slab.count, [&](int64_t i, auto some) {
          const V a = load(slab.a + i, All()), b = load(slab.b + i, All());
          const V gain = load(slab.gain + i, All());
          const V q = load(slab.q + i, All()), p = load(slab.p + i, All());
          for (int r = 0; r < rows.value; ++r) {
            const int64_t at = (pixel + r) * stride + i;
            const V s = load(x + at, some);
            V dz;
            if constexpr (kept) {
              dz = load(dzs + (pixel + r) * dz_stride + i, some);
            } else {
              dz = activation_gradient<T, silu>(s * a + b, load(dy + at, some));
              if (extra && call.dropout)
                dz = keep(halves + r * slab.halves_row + i, dz, call.dropout_threshold,
                          call.dropout_scale);
            }
            V value = dz * gain + (s * q + p);
            if (extra && call.d_sum) value += load(d_sum + at, some);
            store(ds + at, value, some);
          }
        });
      });
  }
};

}  // namespace ddb_fast::DDB_LEVEL
