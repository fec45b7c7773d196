// The attention kernels for one instruction set, compiled once for each as group_norm_kernels.cpp.
// Scores never leave the cache: FlashAttention (Dao et al. 2022), with the running maximum of Milakov
// and Gimelshein 2018. Operands are packed for products.h once for each head.
#include <algorithm>

#include "attention.h"
#include "products.h"

namespace ddb_fast::DDB_LEVEL {

namespace {

// Blocks whose scores fill a part of a core's own cache. Those of a product's rows are multiples of
// tile_rows, the others of a panel.
constexpr int64_t forward_queries = 96, forward_keys = 256;
constexpr int64_t backward_queries = 128, backward_keys = 96;

constexpr float log2_e = 1.44269504f;

// Hands out scratch memory, aligned to a cache line; without memory it only counts.
struct Scratch {
  char* memory;
  int64_t used = 0;

  template <class E>
  E* take(int64_t count) {
    char* at = memory == nullptr ? nullptr : memory + used;
    used += round_up(count * int64_t(sizeof(E)), 64);
    return reinterpret_cast<E*>(at);
  }
};

template <class T>
T* tokens_of(const Tokens& tokens, const AttentionCall& call, int64_t head) {
  return static_cast<T*>(tokens.data) + head / call.heads * tokens.batch +
         head % call.heads * tokens.head;
}

inline VF larger(VF a, VF b) {
  return a > b ? a : b;
}

inline float largest(VF x) {
  return reduced(x, larger);
}

// A head's keys and values, and what a block of queries needs.
template <class T>
struct Forward {
  using P = typename Product<T>::Type;

  const AttentionCall& call;
  int64_t length, value_length, columns;  // D of packed rows, tokens of packed columns, D of panels
  P *k, *v, *rows, *q, *weights;
  float *scores, *sums;

  Forward(const AttentionCall& call, Scratch& scratch) : call(call) {
    length = round_up(call.width, pair<P>);
    value_length = round_up(call.keys, pair<P>);
    columns = round_up(call.width, panel);
    k = scratch.take<P>(round_up(call.keys, panel) * length);
    v = scratch.take<P>(columns * value_length);
    rows = scratch.take<P>(std::max(panel * length, 2 * columns));
    q = scratch.take<P>(forward_queries * length);
    scores = scratch.take<float>(forward_queries * forward_keys);
    weights = sizeof(P) == sizeof(float) ? reinterpret_cast<P*>(scores)
                                         : scratch.take<P>(forward_queries * forward_keys);
    sums = scratch.take<float>(forward_queries * columns);
  }

  void pack(int64_t head) {
    pack_panels_transposed(tokens_of<const T>(call.k, call, head), call.k.token, call.width,
                           call.keys, k, panel * length, rows);
    pack_panels(tokens_of<const T>(call.v, call, head), call.v.token, call.keys, call.width, v,
                panel * value_length, rows);
  }

  void run(int64_t head, int64_t first) {
    const int64_t count = std::min(call.queries - first, forward_queries);
    pack_rows(tokens_of<const T>(call.q, call, head) + first * call.q.token, call.q.token, count,
              call.width, q, length);
    float most[forward_queries], total[forward_queries];
    std::fill_n(most, count, -__builtin_inff());
    std::fill_n(total, count, 0.0f);
    std::fill_n(sums, count * columns, 0.0f);
    for (int64_t key = 0; key < call.keys; key += forward_keys) {
      const int64_t keys = std::min(call.keys - key, forward_keys);
      product<P, false>(q, length, count, k + key * length, panel * length, keys, call.width, scores,
                        forward_keys);
      for (int64_t r = 0; r < count; ++r) weigh(r, keys, most[r], total[r]);
      product<P, true>(weights, forward_keys, count, v + key * panel, panel * value_length,
                       call.width, keys, sums, columns);
    }
    T* o = tokens_of<T>(call.o, call, head) + first * call.o.token;
    float* statistics = call.statistics + 2 * (head * call.queries + first);
    for (int64_t r = 0; r < count; ++r) {
      const float scale = 1 / total[r];
      each_vector<float>(call.width, [&](int64_t i, auto part) {
        store(o + r * call.o.token + i, load(sums + r * columns + i, All()) * scale, part);
      });
      statistics[2 * r] = most[r];
      statistics[2 * r + 1] = total[r];
    }
  }

  // The weights 2^(score - most) of a row's next keys; what was summed up before follows a new most.
  void weigh(int64_t r, int64_t keys, float& most, float& total) {
    float* row = scores + r * forward_keys;
    const float scale = call.scale * log2_e;
    VF found = VF{} - __builtin_inff();
    each_vector<float>(keys, [&](int64_t i, auto part) {
      const VF x = load(row + i, part) * scale;
      found = larger(only(x, part, VF{} - __builtin_inff()), found);
    });
    const float before = most;
    most = std::max(before, largest(found));
    VF sum_of = {};
    each_vector<float>(keys, [&](int64_t i, auto part) {
      const VF x = only(exp2_below_zero(load(row + i, part) * scale - most), part);
      sum_of += x;
      // A whole vector: behind the last key are zeros, which an odd one's partner reads.
      store(weights + r * forward_keys + i, x, All());
    });
    if (before != most) {
      const float shrink = exp2_below_zero(VF{} + (before - most))[0];
      total *= shrink;
      for (int64_t i = 0; i < columns; i += lanes<float>)
        store(sums + r * columns + i, load(sums + r * columns + i, All()) * shrink, All());
    }
    total += sum(sum_of);
  }
};

// All of a head's operands, and what a block of keys and one of queries need. Scores are computed
// with a row for each key, so that weights and their gradients are the rows of dv's and dk's products
// as they stand, and panels of dq's once pairs of rows are interleaved.
template <class T>
struct Backward {
  using P = typename Product<T>::Type;

  const AttentionCall& call;
  int64_t length, columns, queries, query_length, key_length;
  P *k_rows, *v_rows, *k_columns, *q_panels, *d_o_panels, *q_across, *d_o_across, *rows;
  P *weights, *d_scores, *d_score_panels;
  float *most, *share, *delta, *scores, *d_weights, *dk, *dv;

  Backward(const AttentionCall& call, Scratch& scratch) : call(call) {
    length = round_up(call.width, pair<P>);
    columns = round_up(call.width, panel);
    queries = round_up(call.queries, panel);
    query_length = round_up(call.queries, pair<P>);
    key_length = round_up(call.keys, pair<P>);
    k_rows = scratch.take<P>(call.keys * length);
    v_rows = scratch.take<P>(call.keys * length);
    k_columns = scratch.take<P>(call.width * key_length);
    q_panels = scratch.take<P>(queries * length);
    d_o_panels = scratch.take<P>(queries * length);
    q_across = scratch.take<P>(columns * query_length);
    d_o_across = scratch.take<P>(columns * query_length);
    rows = scratch.take<P>(std::max({panel * length, 2 * columns, 2 * backward_queries}));
    weights = scratch.take<P>(backward_keys * backward_queries);
    d_scores = scratch.take<P>(backward_keys * backward_queries);
    d_score_panels = scratch.take<P>(backward_keys * backward_queries);
    most = scratch.take<float>(queries);
    share = scratch.take<float>(queries);
    delta = scratch.take<float>(queries);
    scores = scratch.take<float>(backward_keys * backward_queries);
    d_weights = scratch.take<float>(backward_keys * backward_queries);
    dk = scratch.take<float>(backward_keys * columns);
    dv = scratch.take<float>(backward_keys * columns);
  }

  void pack(int64_t head) {
    const T *q = tokens_of<const T>(call.q, call, head), *k = tokens_of<const T>(call.k, call, head);
    const T *v = tokens_of<const T>(call.v, call, head), *o = tokens_of<const T>(call.o, call, head);
    const T* d_o = tokens_of<const T>(call.d_o, call, head);
    const int64_t width = call.width;
    pack_rows(k, call.k.token, call.keys, width, k_rows, length);
    pack_rows(v, call.v.token, call.keys, width, v_rows, length);
    for (int64_t key = 0; key < key_length; ++key)
      for (int64_t i = 0; i < width; ++i)
        k_columns[i * key_length + key] = key < call.keys ? k_rows[key * length + i] : P{};
    pack_panels_transposed(q, call.q.token, width, call.queries, q_panels, panel * length, rows);
    pack_panels_transposed(d_o, call.d_o.token, width, call.queries, d_o_panels, panel * length,
                           rows);
    pack_panels(q, call.q.token, call.queries, width, q_across, panel * query_length, rows);
    pack_panels(d_o, call.d_o.token, call.queries, width, d_o_across, panel * query_length, rows);
    const float* statistics = call.statistics + 2 * head * call.queries;
    for (int64_t i = 0; i < queries; ++i) {
      // Behind the last query weights are 0.
      const bool there = i < call.queries;
      most[i] = there ? statistics[2 * i] : 0;
      share[i] = there ? 1 / statistics[2 * i + 1] : 0;
      VF terms = {};
      if (there)
        each_vector<float>(width, [&](int64_t at, auto part) {
          terms += load(d_o + i * call.d_o.token + at, part) * load(o + i * call.o.token + at, part);
        });
      delta[i] = sum(terms);
    }
  }

  void run(int64_t head, int64_t split) {
    // Whole blocks for each split.
    const int64_t blocks = (call.keys + backward_keys - 1) / backward_keys;
    const int64_t first = blocks * split / call.splits * backward_keys;
    const int64_t last = std::min(blocks * (split + 1) / call.splits * backward_keys, call.keys);
    float* dq = call.d_queries + (head * call.splits + split) * call.width * queries;
    for (int64_t key = first; key < last; key += backward_keys) {
      const int64_t count = std::min(last - key, backward_keys);
      std::fill_n(dk, count * columns, 0.0f);
      std::fill_n(dv, count * columns, 0.0f);
      for (int64_t query = 0; query < call.queries; query += backward_queries)
        block(key, count, query, key == first, dq);
      write(dk, call.dk, head, key, count);
      write(dv, call.dv, head, key, count);
    }
  }

  void block(int64_t key, int64_t count, int64_t query, bool is_first, float* dq) {
    constexpr int64_t stride = backward_queries;
    const int64_t here = std::min(call.queries - query, backward_queries);
    const auto against = [&](const P* a, const P* b, float* c) {
      product<P, false>(a + key * length, length, count, b + query * length, panel * length, here,
                        call.width, c, stride);
    };
    against(k_rows, q_panels, scores);
    against(v_rows, d_o_panels, d_weights);
    const float scale = call.scale * log2_e;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < here; i += lanes<float>) {
        const int64_t at = r * stride + i;
        // As in the forward pass, bit for bit; never above 0 but behind the last query.
        const VF score = load(scores + at, All()) * scale - load(most + query + i, All());
        const VF weight = exp2_below_zero(score) * load(share + query + i, All());
        const VF gradient = load(d_weights + at, All()) - load(delta + query + i, All());
        store(weights + at, weight, All());
        store(d_scores + at, weight * gradient * call.scale, All());
      }
    const auto add = [&](const P* a, const P* b, float* c) {
      product<P, true>(a, stride, count, b + query * panel, panel * query_length, call.width, here,
                       c, columns);
    };
    add(weights, d_o_across, dv);
    add(d_scores, q_across, dk);
    pack_panels(d_scores, stride, count, here, d_score_panels, panel * backward_keys, rows);
    (is_first ? product<P, false> : product<P, true>)(
        k_columns + key, key_length, call.width, d_score_panels, panel * backward_keys, here, count,
        dq + query, queries);
  }

  void write(const float* from, const Tokens& to, int64_t head, int64_t key, int64_t count) {
    T* out = tokens_of<T>(to, call, head) + key * to.token;
    for (int64_t r = 0; r < count; ++r)
      each_vector<float>(call.width, [&](int64_t i, auto part) {
        store(out + r * to.token + i, load(from + r * columns + i, All()), part);
      });
  }
};

template <class T>
void finish_head(const AttentionCall& call, int64_t head) {
  const int64_t queries = round_up(call.queries, panel), width = call.width;
  float* sums = call.d_queries + head * call.splits * width * queries;
  for (int64_t split = 1; split < call.splits; ++split)
    for (int64_t i = 0; i < width * queries; ++i) sums[i] += sums[split * width * queries + i];
  T* dq = tokens_of<T>(call.dq, call, head);
  float row[256 + lanes<float>];
  for (int64_t query = 0; query < call.queries; ++query) {
    for (int64_t i = 0; i < width; ++i) row[i] = sums[i * queries + query];
    each_vector<float>(width, [&](int64_t i, auto part) {
      store(dq + query * call.dq.token + i, load(row + i, All()), part);
    });
  }
}

// Calls body with a T{}.
template <class Body>
void with_format(const AttentionCall& call, const Body& body) {
  if (call.format == Format::float32) return body(float());
  if (call.format == Format::bfloat16) return body(BFloat16());
  body(Half());
}

int64_t query_blocks(const AttentionCall& call) {
  return (call.queries + forward_queries - 1) / forward_queries;
}

int64_t padded_queries(const AttentionCall& call) { return round_up(call.queries, panel); }

template <template <class> class Pass>
int64_t bytes_of(const AttentionCall& call) {
  Scratch scratch{nullptr};
  with_format(call, [&]<class T>(T) { Pass<T>(call, scratch); });
  return scratch.used;
}

// Tasks of a head follow one another, so a head is packed once by each thread that works on it.
template <template <class> class Pass>
void run(const AttentionCall& call, int64_t per_head, int64_t step, int64_t first, int64_t last,
         void* memory) {
  with_format(call, [&]<class T>(T) {
    Scratch scratch{static_cast<char*>(memory)};
    Pass<T> pass(call, scratch);
    for (int64_t task = first; task < last; ++task) {
      const int64_t head = task / per_head;
      if (task == first || task % per_head == 0) pass.pack(head);
      pass.run(head, task % per_head * step);
    }
  });
}

void forward(const AttentionCall& call, int64_t first, int64_t last, void* scratch) {
  run<Forward>(call, query_blocks(call), forward_queries, first, last, scratch);
}

void backward(const AttentionCall& call, int64_t first, int64_t last, void* scratch) {
  run<Backward>(call, call.splits, 1, first, last, scratch);
}

void finish(const AttentionCall& call, int64_t first, int64_t last) {
  with_format(call, [&]<class T>(T) {
    for (int64_t head = first; head < last; ++head) finish_head<T>(call, head);
  });
}

}  // namespace

extern const AttentionKernels attention_kernels;
const AttentionKernels attention_kernels{query_blocks,          padded_queries, bytes_of<Forward>,
                                         bytes_of<Backward>,    forward,        backward,
                                         finish};

}  // namespace ddb_fast::DDB_LEVEL
