// What the operators (operators.cpp) and the kernels (group_norm_kernels.cpp, compiled once for each
// instruction set) tell each other. Plain data only: a function defined here would be compiled for
// several instruction sets under one name, and the linker would keep any of them.
#pragma once

#include <cstdint>

#include "formats.h"

namespace ddb_fast {

// An operand that is the same for all pixels: (C,) with row_stride 0, or (N, C) with stride 1 in C.
struct Rows {
  const void* data = nullptr;
  int64_t row_stride = 0;
  Format format = Format::float32;
};

// One call of the operator. "Real" is float, or double where format is float64.
struct Call {
  Format format;
  bool channels_last;
  bool silu;
  bool dropout;
  int64_t samples, channels, pixels, groups;
  int64_t slab;  // channels per task, a multiple of the channels of a group
  bool keep_dz;  // backward of a half format: dz waits in the scratch memory for the second pass

  Rows pre_bias, weight, bias, scale, shift;
  uint64_t seed;
  uint32_t dropout_threshold;
  double dropout_scale;
  void* mean;  // Real (N, groups), as rstd
  void* rstd;

  // Forward: reads x and residual, writes y, total (the sum, or null), mean and rstd.
  // Backward: reads x (the sum, or x without its pre_bias), dy and d_sum, writes ds.
  const void* x;
  const void* residual;
  const void* dy;
  const void* d_sum;
  void* y;
  void* total;
  void* ds;
  double eps;

  // Backward, Real, null where not asked for. The terms of d_weight and d_bias are kept per sample
  // and added up in a fixed order once all tasks are done.
  void* d_pre_bias;      // (N, C), as the next four
  void* d_scale;
  void* d_shift;
  void* d_weight_terms;
  void* d_bias_terms;
  void* d_weight;        // (C,), as d_bias
  void* d_bias;
};

// A task is a slab of channels of a sample; it writes only what belongs to it, and its result does
// not depend on the slab's width. `scratch` holds scratch_bytes(call) bytes aligned to 64.
struct Kernels {
  int64_t (*scratch_bytes)(const Call&);
  void (*forward)(const Call&, int64_t first_task, int64_t last_task, void* scratch);
  void (*backward)(const Call&, int64_t first_task, int64_t last_task, void* scratch);
  void (*add_samples)(const Call&, int64_t first_channel, int64_t last_channel);
};

}  // namespace ddb_fast
