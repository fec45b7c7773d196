// What a task does per channel and per group, whatever the layout of the pixels: operands in, the
// coefficients of the passes over the pixels out, and the gradients from the channels' sums.
#pragma once

#include "group_norm.h"
#include "simd.h"

namespace ddb_fast::DDB_LEVEL {

// Sums over this many terms are kept in Real before they are added up in double.
constexpr int64_t block_terms = 64;

// Dropout's draws are made for so many rows of a slab, or pixels of eight channels, at a time.
constexpr int64_t drawn_rows = 4, drawn_pixels = 512;

// The channels first..first + count of a sample. Each array has an element per channel, and room for
// whole vectors.
template <class R>
struct Slab {
  const Call& call;
  int64_t sample, first, count, group_size, first_group, group_count;

  // Sums over the current block of pixels and over all blocks before. Forward: of s - offset and its
  // square, then mean and sum of squares about it. Backward: of dz, dz * (x - offset), x - offset
  // and d_sum.
  R *offset, *sums[4];
  double *totals[4];

  R *pre_bias, *gain;
  R *a, *b;  // z = x * a + b
  R *p, *q;  // ds = dz * a + x * q + p, with another a

  double* group_mean;  // each channel's group's, as group_rstd
  R* group_rstd;
  uint16_t* halves;
  int64_t halves_row;
  R* dz;  // of the whole slab, if kept there; a row per pixel, or per channel where contiguous

  Slab(const Call& call, int64_t task, void* scratch);

  static int64_t row(const Call& call) { return (call.slab + 15) / 16 * 16; }
  static int64_t halves_row_of(const Call& call) {
    return call.channels_last ? (call.slab + 14 + 64) / 64 * 64 + 64 : drawn_pixels;
  }
  static int64_t halves_bytes(const Call& call) {
    return call.dropout ? 8 * halves_row_of(call) * sizeof(uint16_t) : 0;
  }
  static int64_t scratch_bytes(const Call& call) {
    return row(call) * (5 * sizeof(double) + 12 * sizeof(R)) + halves_bytes(call) +
           (call.keep_dz ? row(call) * call.pixels * sizeof(R) : 0);
  }

  int64_t pixel_stride() const { return call.channels_last ? call.channels : 1; }
  int64_t origin() const {  // of the slab's first element in x
    return call.channels_last ? sample * call.pixels * call.channels + first
                              : (sample * call.channels + first) * call.pixels;
  }
};

template <class R>
Slab<R>::Slab(const Call& call, int64_t task, void* scratch) : call(call) {
  const int64_t slabs = (call.channels + call.slab - 1) / call.slab;
  sample = task / slabs;
  first = task % slabs * call.slab;
  count = call.channels - first < call.slab ? call.channels - first : call.slab;
  group_size = call.channels / call.groups;
  first_group = first / group_size;
  group_count = count / group_size;

  double* d = static_cast<double*>(scratch);
  double** const doubles[] = {&totals[0], &totals[1], &totals[2], &totals[3], &group_mean};
  for (double** array : doubles) {
    *array = d;
    d += row(call);
  }
  R* r = reinterpret_cast<R*>(d);
  R** const reals[] = {&offset, &sums[0], &sums[1], &sums[2], &sums[3], &pre_bias,
                       &gain,   &a,       &b,       &p,       &q,       &group_rstd};
  for (R** array : reals) {
    *array = r;
    r += row(call);
  }
  halves = reinterpret_cast<uint16_t*>(r);
  halves_row = halves_row_of(call);
  dz = call.keep_dz ? reinterpret_cast<R*>(reinterpret_cast<char*>(r) + halves_bytes(call)) : nullptr;
}

template <class R, class T>
inline void read_row(const Rows& rows, int64_t at, int64_t count, R* out) {
  const T* row = static_cast<const T*>(rows.data) + at;
  each_vector<R>(count, [&](int64_t i, auto some) { store(out + i, load(row + i, some), All()); });
}

// The operand's channels of this slab; `absent` where there is no operand.
template <class R>
void read(const Slab<R>& slab, const Rows& rows, R absent, R* out) {
  const int64_t at = slab.sample * rows.row_stride + slab.first;
  if (rows.data == nullptr) {
    for (int64_t i = 0; i < slab.count; ++i) out[i] = absent;
  } else if constexpr (sizeof(R) == sizeof(double)) {
    if (rows.format == Format::float64) {
      read_row<R, double>(rows, at, slab.count, out);
    } else {
      const float* row = static_cast<const float*>(rows.data) + at;
      for (int64_t i = 0; i < slab.count; ++i) out[i] = row[i];
    }
  } else if (rows.format == Format::float32) {
    read_row<R, float>(rows, at, slab.count, out);
  } else if (rows.format == Format::bfloat16) {
    read_row<R, BFloat16>(rows, at, slab.count, out);
  } else {
    read_row<R, Half>(rows, at, slab.count, out);
  }
}

// Take the sums of a block of `terms` into mean and m2 = totals of `before` terms (Chan, Golub and
// LeVeque 1979), and go on about the mean found so far: no sum of squares is far larger than m2.
template <class R>
inline void add_block(Slab<R>& slab, int64_t from, int64_t to, int64_t before, int64_t terms) {
  const double share = double(terms) / double(before + terms), each = 1.0 / double(terms);
  R *offset = slab.offset, *sum1 = slab.sums[0], *sum2 = slab.sums[1];
  double *mean = slab.totals[0], *m2 = slab.totals[1];
#pragma GCC ivdep
  for (int64_t i = from; i < to; ++i) {
    const double about = sum1[i] * each;
    const double delta = before == 0 ? 0 : offset[i] + about - mean[i];
    mean[i] = before == 0 ? offset[i] + about : mean[i] + delta * share;
    m2[i] = (before == 0 ? 0 : m2[i]) + (sum2[i] - sum1[i] * about) + delta * delta * before * share;
    offset[i] = R(mean[i]);
    sum1[i] = sum2[i] = 0;
  }
}

// Each channel of the slab gets what its group has.
template <class R, class Mean>
inline void to_channels(Slab<R>& slab, const Mean* mean, const R* rstd) {
  for (int64_t g = 0, i = 0; g < slab.group_count; ++g)
    for (int64_t end = i + slab.group_size; i < end; ++i) {
      slab.group_mean[i] = mean[g];
      slab.group_rstd[i] = rstd[g];
    }
}

// Mean and rstd of each group from its channels' mean and m2. Sums are of distances from the group's
// first channel: one pass, and none of its digits are lost where a mean is far from 0.
template <class R>
void groups_from_channels(Slab<R>& slab) {
  const Call& call = slab.call;
  const int64_t at = slab.sample * call.groups + slab.first_group, size = slab.group_size;
  const double pixels = double(call.pixels), each = 1.0 / double(size);
  double *const means = slab.totals[2], *const variances = slab.totals[3];
  for (int64_t g = 0; g < slab.group_count; ++g) {
    const double *mean = slab.totals[0] + g * size, *m2 = slab.totals[1] + g * size;
    const R* pre_bias = slab.pre_bias + g * size;
    const double first = mean[0] + pre_bias[0];
    double sum = 0, squares = 0, within = 0;
    for (int64_t i = 0; i < size; ++i) {
      const double distance = mean[i] + pre_bias[i] - first;
      sum += distance;
      squares += distance * distance;
      within += m2[i];
    }
    means[g] = first + sum * each;
    variances[g] = (within + pixels * (squares - sum * (sum * each))) * (each / pixels) + call.eps;
  }
  R *const mean = static_cast<R*>(call.mean) + at, *const rstd = static_cast<R*>(call.rstd) + at;
#pragma GCC ivdep
  for (int64_t g = 0; g < slab.group_count; ++g) {
    mean[g] = R(means[g]);
    rstd[g] = R(1 / __builtin_sqrt(variances[g]));
  }
  to_channels(slab, means, rstd);
}

template <class R>
void groups_from_call(Slab<R>& slab) {
  const int64_t at = slab.sample * slab.call.groups + slab.first_group;
  to_channels(slab, static_cast<const R*>(slab.call.mean) + at,
              static_cast<const R*>(slab.call.rstd) + at);
}

// z = xhat * weight + bias, times 1 + scale, plus shift, as x * a + b; gain = dz / dxhat.
template <class R>
void affine(Slab<R>& slab) {
  const Call& call = slab.call;
  R *bias = slab.p, *scale = slab.q, *shift = slab.sums[0];
  read(slab, call.weight, R(1), slab.gain);
  read(slab, call.bias, R(0), bias);
  read(slab, call.scale, R(0), scale);
  read(slab, call.shift, R(0), shift);
#pragma GCC ivdep
  for (int64_t i = 0; i < slab.count; ++i) {
    const double more = 1.0 + scale[i];
    slab.gain[i] = R(slab.gain[i] * more);
    slab.a[i] = slab.group_rstd[i] * slab.gain[i];
    // b makes up for the rounding of a, so that z is exact near the mean however far that is from 0.
    slab.b[i] =
        R(bias[i] * more + shift[i] - slab.a[i] * (slab.group_mean[i] - slab.pre_bias[i]));
    slab.offset[i] = R(slab.group_mean[i] - slab.pre_bias[i]);
  }
}

template <class R>
inline void add_gradient_block(Slab<R>& slab, int64_t from, int64_t to) {
  for (int k = 0; k < 4; ++k)
    for (int64_t i = from; i < to; ++i) {
      slab.totals[k][i] += slab.sums[k][i];
      slab.sums[k][i] = 0;
    }
}

template <class R>
void clear_sums(Slab<R>& slab) {
  for (int k = 0; k < 4; ++k)
    for (int64_t i = 0; i < slab.count; ++i) slab.sums[k][i] = slab.totals[k][i] = 0;
}

// The gradients of the operands from the sums over the pixels, and the coefficients of
//   ds = rstd * (gain * dz - m1 - xhat * m2) + d_sum,
// m1 and m2 the means over the group of gain * dz and gain * dz * xhat.
template <class R>
void gradients(Slab<R>& slab) {
  const Call& call = slab.call;
  const int64_t at = slab.sample * call.channels + slab.first;
  const double elements = double(slab.group_size) * double(call.pixels);
  double *dz = slab.totals[0], *dz_xhat = slab.totals[1], *xhat = slab.totals[2];
  for (int64_t i = 0; i < slab.count; ++i) {
    dz_xhat[i] *= slab.group_rstd[i];
    xhat[i] *= slab.group_rstd[i];
  }
  const auto write = [&](void* to, auto value) {
    if (to != nullptr)
      for (int64_t i = 0; i < slab.count; ++i) static_cast<R*>(to)[at + i] = R(value(i));
  };
  R *weight = slab.sums[0], *bias = slab.sums[1], *scale = slab.sums[2];
  if (call.d_scale != nullptr) {
    read(slab, call.weight, R(1), weight);
    read(slab, call.bias, R(0), bias);
  }
  read(slab, call.scale, R(0), scale);
  write(call.d_shift, [&](int64_t i) { return dz[i]; });
  write(call.d_scale, [&](int64_t i) { return weight[i] * dz_xhat[i] + bias[i] * dz[i]; });
  write(call.d_weight_terms, [&](int64_t i) { return (1.0 + scale[i]) * dz_xhat[i]; });
  write(call.d_bias_terms, [&](int64_t i) { return (1.0 + scale[i]) * dz[i]; });

  for (int64_t g = 0; g < slab.group_count; ++g) {
    const int64_t from = g * slab.group_size, to = from + slab.group_size;
    double m1 = 0, m2 = 0;
    for (int64_t i = from; i < to; ++i) {
      m1 += slab.gain[i] * dz[i];
      m2 += slab.gain[i] * dz_xhat[i];
    }
    m1 /= elements;
    m2 /= elements;
    const double rstd = slab.group_rstd[from];
    for (int64_t i = from; i < to; ++i) {
      slab.q[i] = R(-rstd * rstd * m2);
      slab.p[i] = R(-rstd * m1 - slab.q[i] * double(slab.offset[i]));
      xhat[i] = rstd * (slab.gain[i] * dz[i] - double(call.pixels) * m1 - m2 * xhat[i]) +
                slab.totals[3][i];
    }
  }
  write(call.d_pre_bias, [&](int64_t i) { return xhat[i]; });
  for (int64_t i = 0; i < slab.count; ++i) slab.gain[i] *= slab.group_rstd[i];
}

}  // namespace ddb_fast::DDB_LEVEL
