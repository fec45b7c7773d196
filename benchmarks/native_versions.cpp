// Versions of the C++ group norm's kernels, linked into one program and run in turns, which is what
// native_versions.py builds: V(0) V(1) ... in VERSIONS are the namespaces they were compiled into.
//
//   program ROUNDS THREADS nhwc|nchw CHANNELS PIXELS [CHANNELS PIXELS ...]
//
// prints a line for each format, shape, direction and version: median milliseconds of 16 samples. It
// ends with 3 where a version's results are not the first one's, up to rounding.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <vector>

#include <omp.h>

#include "group_norm.h"

#define V(n) namespace ddb_fast::v##n { extern const ddb_fast::Kernels kernels; }
VERSIONS
#undef V

namespace {

using ddb_fast::Call, ddb_fast::Format, ddb_fast::Kernels;

#define V(n) &ddb_fast::v##n::kernels,
const Kernels* const versions[] = {VERSIONS};
#undef V
constexpr int count = int(std::size(versions));
constexpr int64_t samples = 16, groups = 32;

struct Free {
  void operator()(void* p) const { std::free(p); }
};
using Block = std::unique_ptr<void, Free>;

Block block(int64_t bytes) {
  Block p(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
  std::memset(p.get(), 0, bytes);
  return p;
}

// Values around zero; bf16 is the upper half of a float.
void fill(void* to, int64_t elements, bool half) {
  uint32_t state = 1;
  for (int64_t i = 0; i < elements; ++i) {
    float sum = -2;
    for (int k = 0; k < 4; ++k) {
      state = state * 1664525u + 1013904223u;
      sum += float(state >> 8) / float(1 << 24);
    }
    uint32_t bits;
    std::memcpy(&bits, &sum, 4);
    if (half)
      static_cast<uint16_t*>(to)[i] = uint16_t(bits >> 16);
    else
      static_cast<float*>(to)[i] = sum;
  }
}

float value(const void* from, int64_t i, bool half) {
  if (!half) return static_cast<const float*>(from)[i];
  const uint32_t bits = uint32_t(static_cast<const uint16_t*>(from)[i]) << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

// RMS of the difference over RMS; NaN where there is one.
double difference(const void* a, const void* b, int64_t elements, bool half) {
  double squares = 0, all = 0;
  for (int64_t i = 0; i < elements; ++i) {
    const double x = value(a, i, half), y = value(b, i, half);
    squares += (x - y) * (x - y);
    all += x * x;
  }
  return std::sqrt(squares / all);
}

void measure(bool half, bool channels_last, int64_t channels, int64_t pixels, int rounds, int threads) {
  const int64_t elements = samples * channels * pixels, bytes = elements * (half ? 2 : 4);
  const Block x = block(bytes), dy = block(bytes), y = block(bytes), ds = block(bytes);
  const Block first[2] = {block(bytes), block(bytes)};
  fill(x.get(), elements, half);
  fill(dy.get(), elements, half);
  const std::vector<float> weight(channels, 1.0f), bias(channels, 0.1f);
  std::vector<float> mean(samples * groups), rstd(mean), terms[2], sums[2];
  Call call{};
  call.format = half ? Format::bfloat16 : Format::float32;
  call.channels_last = channels_last;
  call.silu = true;
  call.samples = samples;
  call.channels = channels;
  call.pixels = pixels;
  call.groups = groups;
  call.eps = 1e-5;
  call.weight = {weight.data(), 0, Format::float32};
  call.bias = {bias.data(), 0, Format::float32};
  call.mean = mean.data();
  call.rstd = rstd.data();
  call.x = x.get();
  call.y = y.get();
  const auto slab_of = [&](int64_t tensors) {  // as in operators.cpp
    if (channels_last) return channels;
    const int64_t size = channels / groups, fit = (1 << 20) / (size * pixels * (half ? 2 : 4) * tensors);
    return size * std::clamp(std::min(fit, samples * groups / (4 * threads)), int64_t(1), groups);
  };
  call.slab = slab_of(1);
  Call back = call;
  back.slab = slab_of(half ? 5 : 3);
  back.dy = dy.get();
  back.ds = ds.get();
  back.keep_dz = half;
  for (auto& array : terms) array.resize(samples * channels);
  for (auto& array : sums) array.resize(channels);
  back.d_weight_terms = terms[0].data();
  back.d_bias_terms = terms[1].data();
  back.d_weight = sums[0].data();
  back.d_bias = sums[1].data();
  int64_t most = 0;
  for (const Kernels* version : versions)
    most = std::max({most, version->scratch_bytes(call), version->scratch_bytes(back)});
  std::vector<Block> scratch;
  for (int t = 0; t < threads; ++t) scratch.push_back(block(most));

  std::vector<double> times[2][count];
  for (int round = -2; round < rounds; ++round)
    for (int turn = 0; turn < count; ++turn) {
      const int v = (turn + round + 2) % count;  // each version is first equally often
      for (int direction = 0; direction < 2; ++direction) {
        const auto began = std::chrono::steady_clock::now();
        const Call& own = direction ? back : call;
        const int64_t tasks = samples * ((channels + own.slab - 1) / own.slab);
// Each thread has as many tasks, one after the other, as at::parallel_for gives it.
#pragma omp parallel for schedule(static) num_threads(threads)
        for (int t = 0; t < threads; ++t) {
          const int64_t first = tasks * t / threads, last = tasks * (t + 1) / threads;
          if (direction)
            versions[v]->backward(back, first, last, scratch[t].get());
          else
            versions[v]->forward(call, first, last, scratch[t].get());
        }
        const std::chrono::duration<double, std::milli> took =
            std::chrono::steady_clock::now() - began;
        if (round >= 0) times[direction][v].push_back(took.count());
        if (round > -2) continue;
        const void* result = direction ? ds.get() : y.get();
        if (v == 0) std::memcpy(first[direction].get(), result, bytes);
        const double off = difference(first[direction].get(), result, elements, half);
        if (!(off <= (half ? 4e-3 : 3e-6))) {
          std::fprintf(stderr, "version %d is off by %.1e\n", v, off);
          std::exit(3);
        }
      }
    }
  for (int direction = 0; direction < 2; ++direction)
    for (int v = 0; v < count; ++v) {
      std::vector<double>& own = times[direction][v];
      std::nth_element(own.begin(), own.begin() + own.size() / 2, own.end());
      std::printf("%s %lld %lld %s %d %.6f\n", half ? "bf16" : "fp32", (long long)channels,
                  (long long)pixels, direction ? "backward" : "forward", v, own[own.size() / 2]);
      std::fflush(stdout);
    }
}

}  // namespace

int main(int argc, char** argv) {
  const int rounds = std::atoi(argv[1]), threads = std::atoi(argv[2]);
  const bool channels_last = std::strcmp(argv[3], "nhwc") == 0;
  for (const bool half : {false, true})
    for (int at = 4; at + 1 < argc; at += 2)
      measure(half, channels_last, std::atoll(argv[at]), std::atoll(argv[at + 1]), rounds, threads);
}
