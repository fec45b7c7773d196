// What the attention operators (attention_operators.cpp) and their kernels (attention_kernels.cpp,
// compiled once for each instruction set) tell each other. Plain data only, see group_norm.h.
#pragma once

#include <cstdint>

#include "formats.h"

namespace ddb_fast {

// (B, H, S, D) with stride 1 in D; strides in elements.
struct Tokens {
  void* data;
  int64_t batch, head, token;
};

// One call: o = softmax(q k^T scale) v, or its gradients. All tensors have the format.
struct AttentionCall {
  Format format;
  int64_t batch, heads, queries, keys, width;
  float scale;
  Tokens q, k, v, o, d_o, dq, dk, dv;
  // fp32 (B, H, S, 2): the largest of a row's scores times scale * log2(e), and the sum of 2^(score -
  // largest). Kept apart, because their logarithm would not give back weights that add up to 1 where
  // scores are in the thousands.
  float* statistics;
  // Backward: the keys of a head are divided among so many tasks, each with its own part of dq.
  int64_t splits;
  float* d_queries;  // (B * H, splits, D, padded queries), written by `backward`, added by `finish`
};

// The tasks of `forward` are blocks of queries, those of `backward` are heads and splits, those of
// `finish` heads. What a task writes depends on nothing but the call. `scratch` is aligned to 64.
struct AttentionKernels {
  int64_t (*query_blocks)(const AttentionCall&);  // of a head
  int64_t (*padded_queries)(const AttentionCall&);
  int64_t (*forward_bytes)(const AttentionCall&);
  int64_t (*backward_bytes)(const AttentionCall&);
  void (*forward)(const AttentionCall&, int64_t first_task, int64_t last_task, void* scratch);
  void (*backward)(const AttentionCall&, int64_t first_task, int64_t last_task, void* scratch);
  void (*finish)(const AttentionCall&, int64_t first_head, int64_t last_head);
};

}  // namespace ddb_fast
