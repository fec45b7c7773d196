// torch.ops.ddb_fast_native.attention and its backward; see operators.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "attention.h"
#include "level.h"

namespace ddb_fast {

namespace baseline {
extern const AttentionKernels attention_kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const AttentionKernels attention_kernels;
}
namespace avx512 {
extern const AttentionKernels attention_kernels;
}
#endif

namespace {

using torch::stable::Tensor;

const AttentionKernels& kernels() {
#if defined(__x86_64__)
  if (current_level() == 2) return avx512::attention_kernels;
  if (current_level() == 1) return avx2::attention_kernels;
#endif
  return baseline::attention_kernels;
}

Tokens tokens_of(const Tensor& x) {
  return {const_cast<void*>(x.const_data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

AttentionCall call_of(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& o,
                      const Tensor& statistics, double scale) {
  AttentionCall call{};
  const auto sizes = q.sizes();
  STD_TORCH_CHECK(sizes.size() == 4, "q must be (B, H, S, D)");
  call.format = format_of(q);
  STD_TORCH_CHECK(call.format != Format::float64, "attention takes no fp64");
  for (const Tensor* x : {&q, &k, &v, &o})
    STD_TORCH_CHECK(x->stride(3) == 1 || sizes[3] == 1, "stride 1 in D is needed");
  call.batch = sizes[0];
  call.heads = sizes[1];
  call.queries = sizes[2];
  call.keys = k.sizes()[2];
  call.width = sizes[3];
  STD_TORCH_CHECK(1 <= call.width && call.width <= 256, "D must be in 1..256");
  call.scale = float(scale);
  call.q = tokens_of(q);
  call.k = tokens_of(k);
  call.v = tokens_of(v);
  call.o = tokens_of(o);
  call.statistics = static_cast<float*>(const_cast<void*>(statistics.const_data_ptr()));
  return call;
}

using Memory = std::unique_ptr<void, void (*)(void*)>;

Memory allocate(int64_t bytes) {
  Memory memory(std::aligned_alloc(64, (bytes + 63) / 64 * 64), std::free);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

// Each thread takes a run of tasks with scratch memory of its own. A task of fewer multiplications
// than a thread's start is worth is not alone.
void run(const AttentionCall& call, int64_t tasks, int64_t products, int64_t bytes,
         void (*kernel)(const AttentionCall&, int64_t, int64_t, void*)) {
  const int64_t heads = std::max(call.batch * call.heads, int64_t(1));
  const int64_t work = call.queries * call.keys * call.width * products * heads / tasks;
  const int64_t grain = std::max(int64_t(500'000) / std::max(work, int64_t(1)), int64_t(1));
  torch::stable::parallel_for(0, tasks, grain, [&](int64_t first, int64_t last) {
    const Memory scratch = allocate(bytes);
    kernel(call, first, last, scratch.get());
  });
}

void forward(Tensor q, Tensor k, Tensor v, Tensor o, Tensor statistics, double scale) {
  const AttentionCall call = call_of(q, k, v, o, statistics, scale);
  const int64_t tasks = call.batch * call.heads * kernels().query_blocks(call);
  if (tasks > 0) run(call, tasks, 2, kernels().forward_bytes(call), kernels().forward);
}

void backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor statistics, Tensor dq,
              Tensor dk, Tensor dv, double scale) {
  AttentionCall call = call_of(q, k, v, o, statistics, scale);
  call.d_o = tokens_of(d_o);
  call.dq = tokens_of(dq);
  call.dk = tokens_of(dk);
  call.dv = tokens_of(dv);
  const int64_t heads = call.batch * call.heads;
  if (heads == 0) return;
  // Few heads are divided, by the shape alone: the result does not depend on the number of threads.
  call.splits = std::clamp(16 / heads, int64_t(1), std::max(call.keys / 512, int64_t(1)));
  const Memory d_queries =
      allocate(heads * call.splits * call.width * kernels().padded_queries(call) * sizeof(float));
  call.d_queries = static_cast<float*>(d_queries.get());
  run(call, heads * call.splits, 5, kernels().backward_bytes(call), kernels().backward);
  torch::stable::parallel_for(
      0, heads, std::max(int64_t(32768) / (call.queries * call.width), int64_t(1)),
      [&](int64_t first, int64_t last) { kernels().finish(call, first, last); });
}

STABLE_TORCH_LIBRARY_FRAGMENT(ddb_fast_native, m) {
  m.def(
      "attention(Tensor q, Tensor k, Tensor v, Tensor(a!) o, Tensor(b!) statistics, float scale) "
      "-> ()");
  m.def(
      "attention_backward(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor o, Tensor statistics, "
      "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ddb_fast_native, CPU, m) {
  m.impl("attention", TORCH_BOX(&forward));
  m.impl("attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace ddb_fast
