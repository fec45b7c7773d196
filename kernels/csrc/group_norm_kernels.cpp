// The kernels for one instruction set: this file is compiled once for each, with DDB_LEVEL its name.
// No inline function of another library may be used here, see group_norm.h.
#include "channels_last.h"
#include "contiguous.h"

namespace ddb_fast::DDB_LEVEL {

template <class T, class Layout, bool silu, bool extra>
void forward_tasks(const Call& call, int64_t first, int64_t last, void* scratch) {
  for (int64_t task = first; task < last; ++task) {
    Slab<Real<T>> slab(call, task, scratch);
    read(slab, call.pre_bias, Real<T>(0), slab.pre_bias);
    Layout::statistics(slab);
    groups_from_channels(slab);
    affine(slab);
    Layout::template apply<silu, extra>(slab);
  }
}

template <class T, class Layout, bool silu, bool extra, bool kept>
void backward_tasks_of(const Call& call, int64_t first, int64_t last, void* scratch) {
  for (int64_t task = first; task < last; ++task) {
    Slab<Real<T>> slab(call, task, scratch);
    read(slab, call.pre_bias, Real<T>(0), slab.pre_bias);
    groups_from_call(slab);
    affine(slab);
    Layout::template gradient_sums<silu, extra, kept>(slab);
    gradients(slab);
    Layout::template gradient_apply<silu, extra, kept>(slab);
  }
}

template <class T, class Layout, bool silu, bool extra>
void backward_tasks(const Call& call, int64_t first, int64_t last, void* scratch) {
  constexpr bool in_place = sizeof(T) == sizeof(Real<T>);
  if (in_place || (silu && call.keep_dz))
    backward_tasks_of<T, Layout, silu, extra, in_place || silu>(call, first, last, scratch);
  else
    backward_tasks_of<T, Layout, silu, extra, in_place>(call, first, last, scratch);
}

// Calls body with a T{} and the layout of the call.
template <class Body>
void with_format(const Call& call, const Body& body) {
  const auto with_layout = [&]<class T>(T) {
    call.channels_last ? body(T(), ChannelsLast<T>()) : body(T(), Contiguous<T>());
  };
  switch (call.format) {
    case Format::float32: return with_layout(float());
    case Format::bfloat16: return with_layout(BFloat16());
    case Format::float16: return with_layout(Half());
    case Format::float64: return with_layout(double());
  }
}

void forward(const Call& call, int64_t first, int64_t last, void* scratch) {
  const bool extra = call.residual || call.total || call.dropout;
  with_format(call, [&]<class T, class Layout>(T, Layout) {
    if (extra)
      (call.silu ? forward_tasks<T, Layout, true, true> : forward_tasks<T, Layout, false, true>)(
          call, first, last, scratch);
    else
      (call.silu ? forward_tasks<T, Layout, true, false> : forward_tasks<T, Layout, false, false>)(
          call, first, last, scratch);
  });
}

void backward(const Call& call, int64_t first, int64_t last, void* scratch) {
  const bool extra = call.d_sum || call.d_pre_bias || call.dropout;
  with_format(call, [&]<class T, class Layout>(T, Layout) {
    if (extra)
      (call.silu ? backward_tasks<T, Layout, true, true> : backward_tasks<T, Layout, false, true>)(
          call, first, last, scratch);
    else
      (call.silu ? backward_tasks<T, Layout, true, false> : backward_tasks<T, Layout, false, false>)(
          call, first, last, scratch);
  });
}

template <class R>
void add_samples_of(const Call& call, const void* terms, void* sums, int64_t first, int64_t last) {
  if (sums == nullptr) return;
  for (int64_t c = first; c < last; ++c) {
    double sum = 0;
    for (int64_t n = 0; n < call.samples; ++n)
      sum += static_cast<const R*>(terms)[n * call.channels + c];
    static_cast<R*>(sums)[c] = R(sum);
  }
}

void add_samples(const Call& call, int64_t first, int64_t last) {
  const auto add = [&](const void* terms, void* sums) {
    call.format == Format::float64 ? add_samples_of<double>(call, terms, sums, first, last)
                                   : add_samples_of<float>(call, terms, sums, first, last);
  };
  add(call.d_weight_terms, call.d_weight);
  add(call.d_bias_terms, call.d_bias);
}

int64_t scratch_bytes(const Call& call) {
  return call.format == Format::float64 ? Slab<double>::scratch_bytes(call)
                                        : Slab<float>::scratch_bytes(call);
}

extern const Kernels kernels;
const Kernels kernels{scratch_bytes, forward, backward, add_samples};

}  // namespace ddb_fast::DDB_LEVEL
