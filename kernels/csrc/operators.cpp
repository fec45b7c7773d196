// torch.ops.ddb_fast_native: allocates, divides the work into tasks and runs the kernels of the best
// instruction set. Built on LibTorch's stable ABI alone, so one library serves torch 2.10 and later.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <numeric>
#include <optional>
#include <tuple>

#include "group_norm.h"
#include "level.h"

namespace ddb_fast {

namespace baseline {
extern const Kernels kernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

using torch::stable::Tensor;

Format format_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  const ScalarType type = x.scalar_type();
  if (type == ScalarType::Float) return Format::float32;
  if (type == ScalarType::BFloat16) return Format::bfloat16;
  if (type == ScalarType::Half) return Format::float16;
  STD_TORCH_CHECK(type == ScalarType::Double, "not a floating-point tensor");
  return Format::float64;
}

namespace {

using Operand = std::optional<Tensor>;

// Instruction sets by number: 0 what the compiler assumes, 1 AVX2, 2 AVX-512 with bf16. Older
// AVX-512 machines lower their clock for it and are left with AVX2.
int64_t best_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  // clang's __builtin_cpu_supports does not know f16c: leaf 1, bit 29 of ecx.
  unsigned a, b, c = 0, d;
  const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bf16"))
    return 2;
  if (avx2) return 1;
#endif
  return 0;
}

int64_t level = best_level();

}  // namespace

int64_t current_level() { return level; }

namespace {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (level == 2) return avx512::kernels;
  if (level == 1) return avx2::kernels;
#endif
  return baseline::kernels;
}

// For tests: run the kernels of another level from now on; returns the best level there is.
int64_t set_level(int64_t wanted) {
  const int64_t best = best_level();
  STD_TORCH_CHECK(0 <= wanted && wanted <= best, "level must be in 0..", best, ", got ", wanted);
  level = wanted;
  return best;
}

int64_t bytes_of(Format format) {
  return format == Format::float64 ? 8 : format == Format::float32 ? 4 : 2;
}

Rows rows_of(const Operand& operand) {
  if (!operand) return {};
  return {operand->const_data_ptr(), operand->dim() == 2 ? operand->stride(0) : 0,
          format_of(*operand)};
}

const void* data_of(const Operand& tensor) { return tensor ? tensor->const_data_ptr() : nullptr; }

Call call_of(const Tensor& x, const Operand& pre_bias, const Operand& weight, const Operand& bias,
             const Operand& scale, const Operand& shift, const Operand& seed, int64_t groups,
             bool silu, double dropout_p) {
  Call call{};
  const auto sizes = x.sizes();
  STD_TORCH_CHECK(sizes.size() == 4, "x must be (N, C, H, W)");
  call.format = format_of(x);
  call.samples = sizes[0];
  call.channels = sizes[1];
  call.pixels = sizes[2] * sizes[3];
  call.groups = groups;
  // With one pixel both layouts are the same, and channels_last is the faster to walk.
  call.channels_last = call.pixels == 1 || !x.is_contiguous();
  call.silu = silu;
  call.pre_bias = rows_of(pre_bias);
  call.weight = rows_of(weight);
  call.bias = rows_of(bias);
  call.scale = rows_of(scale);
  call.shift = rows_of(shift);
  call.x = x.const_data_ptr();
  call.dropout = dropout_p > 0;
  if (call.dropout) {
    STD_TORCH_CHECK(seed, "dropout needs a seed");
    call.seed = *static_cast<const int64_t*>(seed->const_data_ptr());
    const double threshold = std::min(std::nearbyint(dropout_p * 65536), 65535.0);
    call.dropout_threshold = uint32_t(threshold);
    call.dropout_scale = 65536 / (65536 - threshold);
  }
  return call;
}

// Channels per task: as narrow as it takes to keep `tensors` of the slab in the cache between two
// passes and all threads busy. In channels_last a slab is whole vectors wide, and the wider the
// better: short pieces far apart meet in few sets of a cache and are not prefetched. Half a sample's
// channels took 4 to 17 % longer than all of them, a quarter 10 to 30 %, up to 19 MiB measured; so its
// slabs may fill much of the last cache, where contiguous ones stay in a core's own.
int64_t slab_of(const Call& call, int64_t tensors) {
  const int64_t budget = call.channels_last ? int64_t(24) << 20 : int64_t(1) << 20;
  const int64_t size = call.channels / call.groups;
  const int64_t unit =
      call.channels_last ? std::min(std::lcm(size, int64_t(16)), call.channels) : size;
  const int64_t units = (call.channels + unit - 1) / unit;
  const int64_t unit_bytes = unit * call.pixels * bytes_of(call.format) * tensors;
  const int64_t wanted = 4 * int64_t(torch::stable::get_num_threads());
  int64_t count = std::clamp(budget / std::max(unit_bytes, int64_t(1)), int64_t(1), units);
  count = std::min(count, std::max(units * call.samples / wanted, int64_t(1)));
  return std::min(count * unit, call.channels);
}

// Bytes of dz that a thread keeps in scratch memory; a slab with more is computed twice.
constexpr int64_t most_kept = int64_t(8) << 20;

using Tasks = void (*)(const Call&, int64_t, int64_t, void*);

void run(const Call& call, Tasks tasks) {
  const int64_t count = call.samples * ((call.channels + call.slab - 1) / call.slab);
  if (count == 0) return;
  // Below some ten thousand elements a second thread costs more than it does.
  const int64_t grain = std::max(int64_t(32768) / (call.slab * call.pixels), int64_t(1));
  const int64_t bytes = (kernels().scratch_bytes(call) + 63) / 64 * 64;
  torch::stable::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
    const std::unique_ptr<void, void (*)(void*)> scratch(std::aligned_alloc(64, bytes), std::free);
    if (scratch == nullptr) throw std::bad_alloc();
    tasks(call, first, last, scratch.get());
  });
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes) {
  using torch::headeronly::ScalarType;
  return torch::stable::new_empty(
      like, {sizes.begin(), sizes.size()},
      format_of(like) == Format::float64 ? ScalarType::Double : ScalarType::Float);
}

// Blocks from 32 MiB on come fresh from the kernel with each glibc malloc, and the page faults would
// take longer than the norm: huge pages divide them by 512.
Tensor image_like(const Tensor& x) {
  Tensor y = torch::stable::empty_like(x);
#if defined(__linux__)
  constexpr int64_t huge = int64_t(2) << 20;
  const int64_t bytes = y.numel() * bytes_of(format_of(y));
  if (bytes >= int64_t(32) << 20) {
    const int64_t address = reinterpret_cast<int64_t>(y.mutable_data_ptr());
    const int64_t first = (address + huge - 1) / huge * huge, last = (address + bytes) / huge * huge;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // if it can be had
  }
#endif
  return y;
}

std::tuple<Tensor, Operand, Tensor, Tensor> forward(
    Tensor x, Operand residual, Operand pre_bias, Operand weight, Operand bias, Operand scale,
    Operand shift, Operand seed, int64_t groups, double eps, bool silu, double dropout_p,
    bool keep_sum) {
  Call call = call_of(x, pre_bias, weight, bias, scale, shift, seed, groups, silu, dropout_p);
  Tensor y = image_like(x);
  Tensor mean = empty(x, {call.samples, groups}), rstd = empty(x, {call.samples, groups});
  Operand total;
  if (keep_sum) total = image_like(x);
  call.eps = eps;
  call.residual = data_of(residual);
  call.y = y.mutable_data_ptr();
  call.total = keep_sum ? total->mutable_data_ptr() : nullptr;
  call.mean = mean.mutable_data_ptr();
  call.rstd = rstd.mutable_data_ptr();
  call.slab = slab_of(call, residual ? 2 : 1);
  run(call, kernels().forward);
  return {y, total, mean, rstd};
}

std::tuple<Tensor, Operand, Operand, Operand, Operand, Operand> backward(
    Tensor dy, Operand d_sum, Tensor s, Operand pre_bias, Operand weight, Operand bias,
    Operand scale, Operand shift, Operand seed, Tensor mean, Tensor rstd, int64_t groups, bool silu,
    double dropout_p, bool need_pre_bias, bool need_weight, bool need_bias, bool need_scale,
    bool need_shift) {
  Call call = call_of(s, pre_bias, weight, bias, scale, shift, seed, groups, silu, dropout_p);
  const int64_t n = call.samples, c = call.channels;
  Tensor ds = image_like(s);
  call.dy = dy.const_data_ptr();
  call.d_sum = data_of(d_sum);
  call.mean = mean.mutable_data_ptr();
  call.rstd = rstd.mutable_data_ptr();
  call.ds = ds.mutable_data_ptr();

  Operand results[5], terms[2];
  const auto wanted = [&](bool needed, Operand& tensor, std::initializer_list<int64_t> sizes) {
    if (!needed) return static_cast<void*>(nullptr);
    tensor = empty(s, sizes);
    return tensor->mutable_data_ptr();
  };
  call.d_pre_bias = wanted(need_pre_bias, results[0], {n, c});
  call.d_weight = wanted(need_weight, results[1], {c});
  call.d_bias = wanted(need_bias, results[2], {c});
  call.d_scale = wanted(need_scale, results[3], {n, c});
  call.d_shift = wanted(need_shift, results[4], {n, c});
  call.d_weight_terms = wanted(need_weight, terms[0], {n, c});
  call.d_bias_terms = wanted(need_bias, terms[1], {n, c});

  // Half formats have no room for dz in ds. Kept in fp32 beside it, it need not be computed twice.
  const bool half = bytes_of(call.format) == 2;
  call.slab = slab_of(call, (d_sum ? 4 : 3) + (silu && half ? 2 : 0));
  const int64_t kept_bytes = (call.slab + 15) / 16 * 16 * call.pixels * int64_t(sizeof(float));
  call.keep_dz = silu && half && kept_bytes <= most_kept;
  run(call, kernels().backward);
  if (need_weight || need_bias)
    torch::stable::parallel_for(
        0, c, std::max(int64_t(65536) / std::max(n, int64_t(1)), int64_t(16)),
        [&](int64_t first, int64_t last) { kernels().add_samples(call, first, last); });
  return {ds, results[0], results[1], results[2], results[3], results[4]};
}

STABLE_TORCH_LIBRARY(ddb_fast_native, m) {
  m.def(
      "group_norm(Tensor x, Tensor? residual, Tensor? pre_bias, Tensor? weight, Tensor? bias, "
      "Tensor? scale, Tensor? shift, Tensor? seed, int num_groups, float eps, bool silu, "
      "float dropout_p, bool keep_sum) -> (Tensor, Tensor?, Tensor, Tensor)");
  m.def(
      "group_norm_backward(Tensor dy, Tensor? d_sum, Tensor s, Tensor? pre_bias, Tensor? weight, "
      "Tensor? bias, Tensor? scale, Tensor? shift, Tensor? seed, Tensor mean, Tensor rstd, "
      "int num_groups, bool silu, float dropout_p, bool need_pre_bias, bool need_weight, "
      "bool need_bias, bool need_scale, bool need_shift) "
      "-> (Tensor, Tensor?, Tensor?, Tensor?, Tensor?, Tensor?)");
  m.def("set_level(int level) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(ddb_fast_native, CPU, m) {
  m.impl("group_norm", TORCH_BOX(&forward));
  m.impl("group_norm_backward", TORCH_BOX(&backward));
}

STABLE_TORCH_LIBRARY_IMPL(ddb_fast_native, CompositeExplicitAutograd, m) {
  m.impl("set_level", TORCH_BOX(&set_level));
}

}  // namespace
}  // namespace ddb_fast
