// The micro-kernels of ReLU linear attention over cache-sized tiles.
//
// Each that writes tensors follows the memory order of q or of k: channel-major (tokens contiguous, what a
// 1x1 convolution on NCHW leaves) computes with tokens in the lanes, token-major with channels in the lanes.
// Sums over tokens have the channels of q and k in the lanes and take the other factor as scalars, so that v
// is read in place.
#include "ukernels.h"

#include <type_traits>

#include "../core/product.h"

namespace effattn::cpu::EFFATTN_ISA {
namespace {

using Params = LinearAttentionParams;

template <class T>
Place<T> place(const Params& p, const Operand& operand, int64_t group, int64_t token) {
  int64_t offset = token * operand.token_stride;
  int i = p.lead_rank - 1;
  for (; i > 0; --i) {
    offset += group % p.lead_sizes[i] * operand.lead_strides[i];
    group /= p.lead_sizes[i];
  }
  if (i == 0) offset += group * operand.lead_strides[0];
  return {static_cast<T*>(operand.data) + offset, operand.token_stride, operand.channel_stride};
}

bool is_channel_major(const Operand& operand) {
  return operand.token_stride == 1 && operand.channel_stride != 1;
}

int64_t scratch_floats(int64_t head_dim, int64_t value_dim, int64_t tile) {
  const int64_t d = round_up(head_dim, 16), dv = round_up(value_dim, 16), t = round_up(tile, 16);
  const int64_t matrices = 2 * (value_dim + 1) * d + head_dim * dv;
  const int64_t tiles = (3 * (d + dv)) * (t + 16);
  constexpr int64_t kMaxPieces = 12;
  return matrices + tiles + 4 * t + kMaxPieces * Arena::kMaxOverhead;
}

// --- the state, in scratch --------------------------------------------------------------------------

// S^T, a row a channel of v, and z in the last row; rows padded to whole vectors, with zeros. Between
// micro-kernels the state is dense, (value_dim + 1, head_dim), and used in place if nothing is padded.
struct KvState {
  float* matrix;
  int64_t stride;
  int64_t head_dim, value_dim;
  float* dense;

  KvState(Arena& arena, const Params& p, float* dense_form)
      : stride(padded(p.head_dim)), head_dim(p.head_dim), value_dim(p.value_dim), dense(dense_form) {
    matrix = stride == head_dim ? dense : arena.floats((value_dim + 1) * stride);
  }
  // To be read only.
  KvState(Arena& arena, const Params& p, const float* dense_form)
      : KvState(arena, p, const_cast<float*>(dense_form)) {
    if (matrix != dense) copy_rows(matrix, stride, dense, head_dim);
  }

  float* z() const { return matrix + value_dim * stride; }
  void clear() const {
    for (int64_t i = 0; i < (value_dim + 1) * stride; i += kLanes) store(matrix + i, Vec{});
  }
  // Writes the dense form.
  void finish() const {
    if (matrix != dense) copy_rows(dense, head_dim, matrix, stride);
  }

 private:
  void copy_rows(float* to, int64_t to_stride, const float* from, int64_t from_stride) const {
    for (int64_t e = 0; e <= value_dim; ++e) {
      for (int64_t d = 0; d < head_dim; d += kLanes) {
        const Vec row = load_first(from + e * from_stride + d, head_dim - d);
        store_first(to + e * to_stride + d, row, to_stride - d);
      }
    }
  }
};

// S^T += a b over `tokens`, z stays: a(channel of v, token) as scalars, b a token-major tile of head_dim.
template <class Scalars>
void accumulate(const KvState& state, Scalars a, const Tile& b, int64_t tokens, PrefetchQueue& prefetch) {
  product(state.value_dim, state.head_dim, a, Vectors<>{b.data, b.row_stride}, tokens,
          AddTo{state.matrix, state.stride}, prefetch);
}

// z += sum over tokens of b * weight, for a token-major tile.
template <class Weight>
void accumulate_normaliser(const KvState& state, const Tile& b, int64_t tokens, const Weight& weight) {
  constexpr int kChains = 4;  // hide the latency of an addition
  for (int64_t d = 0; d < state.head_dim; d += kLanes) {
    Vec totals[kChains] = {};
    const float* column = b.data + d;
    int64_t t = 0;
    for (; t + kChains <= tokens; t += kChains, column += kChains * b.row_stride) {
      EFFATTN_UNROLL
      for (int i = 0; i < kChains; ++i) totals[i] += weight(t + i) * load(column + i * b.row_stride);
    }
    for (; t < tokens; ++t, column += b.row_stride) totals[0] += weight(t) * load(column);
    float* const z = state.z() + d;
    store(z, load(z) + ((totals[0] + totals[1]) + (totals[2] + totals[3])));
  }
}

// Calls use(scalars) with a block of a tensor (channel, token), read where it lies if it is float and has no
// gaps between channels or between tokens, else converted into `tile`.
template <class T, class Use>
void with_scalars(const Tile& tile, Place<const T> from, int64_t tokens, int64_t channels, const Use& use) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (from.token_stride == 1) return use(StepsAdjacent<true>{from.data, from.channel_stride});
    if (from.channel_stride == 1) return use(RowsAdjacent{from.data, from.token_stride});
  }
  load_tile<false>(tile, from, tokens, channels);
  if (tile.channel_major) {
    use(StepsAdjacent<true>{tile.data, tile.row_stride});
  } else {
    use(RowsAdjacent{tile.data, tile.row_stride});
  }
}

// --- per-token dot products ---------------------------------------------------------------------------

// What a tile is multiplied with, channel by channel: another tile, or one vector for all tokens.
struct ByTile {
  Tile tile;
  EFFATTN_INLINE Vec tokens(int64_t c, int64_t t) const { return load(tile.row(c) + t); }
  EFFATTN_INLINE const float* channels(int64_t t) const { return tile.row(t); }
};
struct ByVector {
  const float* data;
  EFFATTN_INLINE Vec tokens(int64_t c, int64_t) const { return broadcast(data[c]); }
  EFFATTN_INLINE const float* channels(int64_t) const { return data; }
};

// out[t] = sum over channels c of a(t, c) * other(t, c), for V vectors of tokens.
template <int V, class Rows, class Other>
EFFATTN_INLINE void dot_rows(float* out, const Rows& a, const Other& other, int64_t t, int64_t channels) {
  Vec dots[V] = {};
  const auto* at = a.data + t;
  for (int64_t c = 0; c < channels; ++c, at += a.row_stride) {
    EFFATTN_UNROLL
    for (int v = 0; v < V; ++v) dots[v] += a.at(at + v * kLanes) * other.tokens(c, t + v * kLanes);
  }
  EFFATTN_UNROLL
  for (int v = 0; v < V; ++v) store(out + t + v * kLanes, dots[v]);
}

template <class Rows, class Other>
void dot_tokens(float* out, const Rows& a, const Other& other, int64_t tokens, int64_t channels) {
  int64_t t = 0;
  for (; t + 3 * kLanes < tokens; t += 4 * kLanes) dot_rows<4>(out, a, other, t, channels);
  for (; t < tokens; t += kLanes) dot_rows<1>(out, a, other, t, channels);
}

template <class Other>
void dot_channels(float* out, const Tile& a, const Other& other, int64_t tokens, int64_t channels) {
  if (a.channel_major) {
    dot_tokens(out, Vectors<>{a.data, a.row_stride}, other, tokens, channels);
  } else {
    // A vector of lane state a token; then kLanes tokens are added up at once. Padding is left out: a product
    // with an infinite gradient leaves NaN there.
    Vec lane_sums[kLanes];
    for (int64_t t = 0; t < tokens; t += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        Vec total = {};
        if (t + i < tokens) {
          const float *const x = a.row(t + i), *const y = other.channels(t + i);
          int64_t c = 0;
          for (; c + kLanes <= channels; c += kLanes) total += load(x + c) * load(y + c);
          if (c < channels) total += load_first(x + c, channels - c) * load_first(y + c, channels - c);
        }
        lane_sums[i] = total;
      }
      store(out + t, sum_lanes(lane_sums));
    }
  }
}

// 1 / (dot + eps). What is infinite or NaN in a denominator stays so in a product with its inverse. A
// positive denominator whose inverse would overflow counts as the smallest whose inverse does not: a zero
// divided by a subnormal eps is zero.
void invert(float* dots, float eps, int64_t tokens) {
  const Vec smallest = broadcast(0x1p-128f + 0x1p-149f);
  for (int64_t t = 0; t < tokens; t += kLanes) {
    const Vec denominator = load(dots + t) + eps;
    const Vec raised = denominator < smallest ? smallest : denominator;
    store(dots + t, 1.0f / (denominator > 0.0f ? raised : denominator));
  }
}

// --- products over channels ---------------------------------------------------------------------------

// Starts at z (one per output channel), drops what relu gated.
template <bool ChannelMajor>
struct Gated {
  const float* input;  // of the relu, or what came out of it
  int64_t input_stride;
  const float* z;

  struct Row {
    RowPointer<const float> input;
    const float* z;
    EFFATTN_INLINE Vec start(int v) const { return ChannelMajor ? broadcast(*z) : load(z + v * kLanes); }
    EFFATTN_INLINE Vec operator()(int v, Vec acc, const void*) const {
      return relu_gate(load(input.at + v * kLanes), acc);
    }
    EFFATTN_INLINE void next_row() {
      input.next_row();
      if constexpr (ChannelMajor) ++z;
    }
  };
  EFFATTN_INLINE Row at(int64_t row, int64_t col) const {
    return {{input + row * input_stride + col, input_stride}, z + (ChannelMajor ? row : col)};
  }
};

// Calls write(data, row_stride, cols) to have a block written in the micro-kernel's order: straight into the
// tensor, or by way of the tile `detour` where the tensor's order is another: grad_v, if v's differs from
// k's.
template <bool ChannelMajor, class T, class Write>
void write_block(Place<T> to, const Tile& detour, int64_t tokens, int64_t channels, const Write& write) {
  const int64_t cols = ChannelMajor ? tokens : channels;
  if ((ChannelMajor ? to.token_stride : to.channel_stride) == 1) {
    write(to.data, ChannelMajor ? to.channel_stride : to.token_stride, cols);
  } else {
    write(detour.data, detour.row_stride, padded(cols));
    store_tile(detour, to, tokens, channels);
  }
}

// A matrix between channels of k and channels of v: tokens in the lanes read it as scalars, a row an
// output; channels in the lanes as vectors, a row an input.
struct Mixer {
  RowsAdjacent by_output;
  Vectors<> by_input;
};

// From channels of v to those of k: multiplies with S.
Mixer to_key_channels(const KvState& state) {
  return {RowsAdjacent{state.matrix, state.stride}, Vectors<>{state.matrix, state.stride}};
}

// From channels of k to those of v: multiplies with S^T.
Mixer to_value_channels(const KvState& state, Arena& arena) {
  const Tile transposed = tile(arena, state.head_dim, state.value_dim, false);
  load_tile<false>(transposed, Place<const float>{state.matrix, 1, state.stride}, state.head_dim,
                   state.value_dim);
  return {RowsAdjacent{transposed.data, transposed.row_stride},
          Vectors<>{transposed.data, transposed.row_stride}};
}

// edge(t, i) = sum_j tile(t, j) * matrix(j, i)
template <bool ChannelMajor, class Edge>
void mix_channels(const Tile& tile, const Mixer& matrix, int64_t tokens, int64_t inputs, int64_t outputs,
                  const Edge& edge, PrefetchQueue& prefetch) {
  if constexpr (ChannelMajor) {
    product(outputs, tokens, matrix.by_output, Vectors<>{tile.data, tile.row_stride}, inputs, edge, prefetch);
  } else {
    product(tokens, outputs, StepsAdjacent<false>{tile.data, tile.row_stride}, matrix.by_input, inputs, edge,
            prefetch);
  }
}

// The same into a tensor.
template <bool ChannelMajor, class T, class Epilogue>
void mix_into(Place<T> to, const Tile& detour, const Tile& tile, const Mixer& matrix, int64_t tokens,
              int64_t inputs, int64_t outputs, const Epilogue& epilogue, PrefetchQueue& prefetch) {
  write_block<ChannelMajor>(to, detour, tokens, outputs, [&](auto* data, int64_t row_stride, int64_t cols) {
    using Out = std::remove_pointer_t<decltype(data)>;
    mix_channels<ChannelMajor>(tile, matrix, tokens, inputs, outputs,
                               StoreTo<Out, Epilogue>{data, row_stride, epilogue, cols}, prefetch);
  });
}

// --- vectors read in place ---------------------------------------------------------------------------------

// 16-bit types are converted once, into a tile; a product would convert them for every block of rows.
template <class T, bool ChannelMajor>
constexpr bool kInPlace = ChannelMajor && sizeof(T) == sizeof(float);

// Whether a channel-major micro-kernel can do without tiles: tokens are contiguous in all `places`, and there
// is at least a vector of them.
template <class... Places>
bool reads_in_place(int64_t tokens, const Places&... places) {
  return tokens >= kLanes && ((places.token_stride == 1) && ...);
}

template <bool Relu, class T>
Vectors<T, Relu> in_place(const Place<const T>& from, int64_t offset) {
  return {from.data + offset, from.channel_stride};
}

template <class T, class Rows, class Epilogue>
void mix_in_place(Place<T> to, int64_t offset, const Rows& rows, const Mixer& matrix, int64_t tokens,
                  int64_t inputs, int64_t outputs, const Epilogue& epilogue, PrefetchQueue& prefetch) {
  product(outputs, tokens, matrix.by_output, rows, inputs,
          StoreTo<T, Epilogue>{to.data + offset, to.channel_stride, epilogue, tokens}, prefetch);
}

// --- prefetch -----------------------------------------------------------------------------------------

// The tensors that a micro-kernel reads or writes and how many channels they have; whether its tokens are
// keys, and whether it reduces them to a state or uses one.
struct PrefetchTensors {
  bool keys, reduces;
  struct {
    Operand Params::* operand;
    int64_t Params::* channels;
  } operands[PrefetchQueue::kMaxBlocks];
};
constexpr PrefetchTensors kReduceKeys{
    true, true, {{&Params::k, &Params::head_dim}, {&Params::v, &Params::value_dim}}};
constexpr PrefetchTensors kApplyQueries{
    false, false, {{&Params::q, &Params::head_dim}, {&Params::out, &Params::value_dim}}};
constexpr PrefetchTensors kGradQueries{false,
                                       true,
                                       {{&Params::q, &Params::head_dim},
                                        {&Params::grad_out, &Params::value_dim},
                                        {&Params::grad_q, &Params::head_dim}}};
constexpr PrefetchTensors kGradKeys{true,
                                    false,
                                    {{&Params::k, &Params::head_dim},
                                     {&Params::v, &Params::value_dim},
                                     {&Params::grad_k, &Params::head_dim},
                                     {&Params::grad_v, &Params::value_dim}}};

// The next tile of this range, or behind its last one the first tile of what the thread does next.
template <class T>
PrefetchQueue prefetch_next(const Params& p, const PrefetchTensors& own, const PrefetchTensors& other,
                            const Range& range, int64_t at, int64_t tile_tokens) {
  PrefetchQueue prefetch;
  const auto add_tile = [&](const PrefetchTensors& tensors, int64_t group, int64_t token, int64_t end) {
    for (const auto& [operand, channels] : tensors.operands) {
      if (operand == nullptr) break;
      prefetch.add(place<T>(p, p.*operand, group, token), min(tile_tokens, end - token), p.*channels);
    }
  };
  if (at < range.end) {
    add_tile(own, range.group, at, range.end);
  } else if (range.next != Range::Next::kNothing) {
    const PrefetchTensors& next = (range.next == Range::Next::kReduce) == own.reduces ? own : other;
    add_tile(next, range.next_group, range.next_begin, next.keys ? p.keys : p.queries);
  }
  return prefetch;
}

// --- the micro-kernels ------------------------------------------------------------------------------------

template <class T>
void reduce_keys(const Params& p, const Range& range, int64_t tile_tokens, float* kv_state, Arena arena) {
  const KvState state(arena, p, kv_state);
  state.clear();
  const Tile k = tile(arena, tile_tokens, p.head_dim, false);
  const Tile v = tile(arena, tile_tokens, p.value_dim, is_channel_major(p.v));
  for (int64_t at = range.begin; at < range.end; at += tile_tokens) {
    const int64_t tokens = min(tile_tokens, range.end - at);
    const Place<const T> from_k = place<T>(p, p.k, range.group, at),
                         from_v = place<T>(p, p.v, range.group, at);
    PrefetchQueue prefetch = prefetch_next<T>(p, kReduceKeys, kApplyQueries, range, at + tokens, tile_tokens);
    load_tile<true>(k, from_k, tokens, p.head_dim);
    with_scalars(v, from_v, tokens, p.value_dim,
                 [&](const auto& scalars) { accumulate(state, scalars, k, tokens, prefetch); });
    accumulate_normaliser(state, k, tokens, [](int64_t) { return 1.0f; });
  }
  state.finish();
}

template <class T, bool ChannelMajor>
void apply_tiles(const Params& p, const Range& range, int64_t tile_tokens, const KvState& state,
                 Arena arena) {
  const Tile q = tile(arena, tile_tokens, p.head_dim, ChannelMajor);
  float* inverse = arena.floats(padded(tile_tokens));
  const Mixer mixer = to_value_channels(state, arena);
  const Tile detour = tile(arena, tile_tokens, p.value_dim, ChannelMajor);
  for (int64_t at = range.begin; at < range.end; at += tile_tokens) {
    const int64_t tokens = min(tile_tokens, range.end - at);
    const Place<const T> from = place<T>(p, p.q, range.group, at);
    const Place<T> to = place<T>(p, p.out, range.group, at);
    PrefetchQueue prefetch = prefetch_next<T>(p, kApplyQueries, kReduceKeys, range, at + tokens, tile_tokens);
    if constexpr (kInPlace<T, ChannelMajor>) {
      if (p.value_dim <= kRowsWithoutCopy && reads_in_place(range.end - range.begin, to)) {
        in_whole_vectors(tokens, [&](int64_t offset, int64_t count) {
          const auto rows = in_place<true>(from, offset);
          dot_tokens(inverse, rows, ByVector{state.z()}, count, p.head_dim);
          invert(inverse, p.eps, count);
          mix_in_place(to, offset, rows, mixer, count, p.head_dim, p.value_dim, Scaled<false>{inverse},
                       prefetch);
        });
        continue;
      }
    }
    load_tile<true>(q, from, tokens, p.head_dim);
    dot_channels(inverse, q, ByVector{state.z()}, tokens, p.head_dim);
    invert(inverse, p.eps, tokens);
    mix_into<ChannelMajor>(to, detour, q, mixer, tokens, p.head_dim, p.value_dim,
                           Scaled<!ChannelMajor>{inverse}, prefetch);
  }
}

template <class T>
void apply_queries(const Params& p, const Range& range, int64_t tile_tokens, const float* kv_state,
                   Arena arena) {
  const KvState state(arena, p, kv_state);
  if (is_channel_major(p.q)) {
    apply_tiles<T, true>(p, range, tile_tokens, state, arena);
  } else {
    apply_tiles<T, false>(p, range, tile_tokens, state, arena);
  }
}

//   r = 1 / (q.z + eps)   s = (q.w) r   grad_q = gate (w - z s) r   q' = q r
// where w = S grad_out, so that the gradient of the normaliser needs no output to be kept:
// grad_out . out = (q.w) r. q becomes q' in place.
template <bool ChannelMajor, class T>
void finish_grad_q(T* grad_q, int64_t row_stride, int64_t cols, const Tile& q, const Tile& w, const float* z,
                   const float* inverse, const float* share, int64_t rows) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      const Vec inv = ChannelMajor ? load(inverse + c) : broadcast(inverse[row]);
      const Vec part =
          ChannelMajor ? broadcast(z[row]) * load(share + c) : load(z + c) * broadcast(share[row]);
      const Vec x = load(q.row(row) + c);
      const Vec result = relu_gate(x, (load(w.row(row) + c) - part) * inv);
      if (c + kLanes <= cols) {
        store(grad_q + row * row_stride + c, result);
      } else {
        store_first(grad_q + row * row_stride + c, result, cols - c);
      }
      store(q.row(row) + c, x * inv);
    }
  }
}

template <class T, bool ChannelMajor>
void grad_query_tiles(const Params& p, const Range& range, int64_t tile_tokens, const KvState& state,
                      const KvState& grad_state, Arena arena) {
  const Mixer mixer = to_key_channels(state);
  const Tile q = tile(arena, tile_tokens, p.head_dim, ChannelMajor);
  const Tile w = tile(arena, tile_tokens, p.head_dim, ChannelMajor);
  const Tile grad = tile(arena, tile_tokens, p.value_dim, ChannelMajor);
  const Tile q_rows = ChannelMajor ? tile(arena, tile_tokens, p.head_dim, false) : q;
  float* inverse = arena.floats(padded(tile_tokens));
  float* share = arena.floats(padded(tile_tokens));
  for (int64_t at = range.begin; at < range.end; at += tile_tokens) {
    const int64_t tokens = min(tile_tokens, range.end - at);
    const Place<const T> from_q = place<T>(p, p.q, range.group, at);
    const Place<const T> from_grad = place<T>(p, p.grad_out, range.group, at);
    const Place<T> to = place<T>(p, p.grad_q, range.group, at);
    PrefetchQueue prefetch = prefetch_next<T>(p, kGradQueries, kGradKeys, range, at + tokens, tile_tokens);
    load_tile<true>(q, from_q, tokens, p.head_dim);
    using Scalars = std::conditional_t<ChannelMajor, StepsAdjacent<true>, RowsAdjacent>;
    Scalars grad_scalars{grad.data, grad.row_stride};
    bool copied = true;
    if constexpr (kInPlace<T, ChannelMajor>) {
      if (reads_in_place(tokens, from_grad)) {
        copied = false;
        grad_scalars = {from_grad.data, from_grad.channel_stride};
        in_whole_vectors(tokens, [&](int64_t offset, int64_t count) {
          product(p.head_dim, count, mixer.by_output, in_place<false>(from_grad, offset), p.value_dim,
                  WriteTo{w.data + offset, w.row_stride}, prefetch);
        });
      }
    }
    if (copied) {
      load_tile<false>(grad, from_grad, tokens, p.value_dim);
      mix_channels<ChannelMajor>(grad, mixer, tokens, p.value_dim, p.head_dim, WriteTo{w.data, w.row_stride},
                                 prefetch);
    }
    dot_channels(inverse, q, ByVector{state.z()}, tokens, p.head_dim);
    invert(inverse, p.eps, tokens);
    dot_channels(share, q, ByTile{w}, tokens, p.head_dim);
    for (int64_t t = 0; t < tokens; t += kLanes) store(share + t, load(share + t) * load(inverse + t));
    write_block<ChannelMajor>(to, w, tokens, p.head_dim, [&](auto* data, int64_t row_stride, int64_t cols) {
      finish_grad_q<ChannelMajor>(data, row_stride, cols, q, w, state.z(), inverse, share,
                                  ChannelMajor ? p.head_dim : tokens);
    });
    if (ChannelMajor) {
      load_tile<false>(q_rows, Place<const float>{q.data, 1, q.row_stride}, tokens, p.head_dim);
    }
    accumulate(grad_state, grad_scalars, q_rows, tokens, prefetch);
    accumulate_normaliser(grad_state, q_rows, tokens, [&](int64_t t) { return -share[t]; });
  }
}

template <class T>
void grad_queries(const Params& p, const Range& range, int64_t tile_tokens, const float* kv_state,
                  float* grad_kv_state, Arena arena) {
  const KvState state(arena, p, kv_state), grad_state(arena, p, grad_kv_state);
  grad_state.clear();
  if (is_channel_major(p.q)) {
    grad_query_tiles<T, true>(p, range, tile_tokens, state, grad_state, arena);
  } else {
    grad_query_tiles<T, false>(p, range, tile_tokens, state, grad_state, arena);
  }
  grad_state.finish();
}

template <class T, bool ChannelMajor>
void grad_key_tiles(const Params& p, const Range& range, int64_t tile_tokens, const KvState& grad,
                    Arena arena) {
  const Mixer to_k = to_key_channels(grad), to_v = to_value_channels(grad, arena);
  const Tile k = tile(arena, tile_tokens, p.head_dim, ChannelMajor);
  const Tile detour_k = tile(arena, tile_tokens, p.head_dim, ChannelMajor);
  const Tile v = tile(arena, tile_tokens, p.value_dim, ChannelMajor);
  const Tile detour_v = tile(arena, tile_tokens, p.value_dim, ChannelMajor);
  for (int64_t at = range.begin; at < range.end; at += tile_tokens) {
    const int64_t tokens = min(tile_tokens, range.end - at);
    const Place<const T> from_k = place<T>(p, p.k, range.group, at),
                         from_v = place<T>(p, p.v, range.group, at);
    const Place<T> into_k = place<T>(p, p.grad_k, range.group, at);
    const Place<T> into_v = place<T>(p, p.grad_v, range.group, at);
    PrefetchQueue prefetch = prefetch_next<T>(p, kGradKeys, kGradQueries, range, at + tokens, tile_tokens);
    if constexpr (kInPlace<T, ChannelMajor>) {
      if (p.value_dim <= kRowsWithoutCopy &&
          reads_in_place(range.end - range.begin, from_v, into_k, into_v)) {
        in_whole_vectors(tokens, [&](int64_t offset, int64_t count) {
          const auto rows_k = in_place<true>(from_k, offset);
          mix_in_place(into_k, offset, in_place<false>(from_v, offset), to_k, count, p.value_dim, p.head_dim,
                       Gated<true>{rows_k.data, rows_k.row_stride, grad.z()}, prefetch);
          mix_in_place(into_v, offset, rows_k, to_v, count, p.head_dim, p.value_dim, NoEpilogue{}, prefetch);
        });
        continue;
      }
    }
    load_tile<true>(k, from_k, tokens, p.head_dim);
    load_tile<false>(v, from_v, tokens, p.value_dim);
    mix_into<ChannelMajor>(into_k, detour_k, v, to_k, tokens, p.value_dim, p.head_dim,
                           Gated<ChannelMajor>{k.data, k.row_stride, grad.z()}, prefetch);
    mix_into<ChannelMajor>(into_v, detour_v, k, to_v, tokens, p.head_dim, p.value_dim, NoEpilogue{},
                           prefetch);
  }
}

template <class T>
void grad_keys(const Params& p, const Range& range, int64_t tile_tokens, const float* grad_kv_state,
               Arena arena) {
  const KvState grad(arena, p, grad_kv_state);
  if (is_channel_major(p.k)) {
    grad_key_tiles<T, true>(p, range, tile_tokens, grad, arena);
  } else {
    grad_key_tiles<T, false>(p, range, tile_tokens, grad, arena);
  }
}

template <class T>
constexpr LinearAttentionUkernels kOfType = {reduce_keys<T>, apply_queries<T>, grad_queries<T>, grad_keys<T>};

constexpr LinearAttentionTable kTable = {scratch_floats,
                                         {kOfType<float>, kOfType<BFloat16>, kOfType<Float16>}};

}  // namespace

const LinearAttentionTable& linear_attention_table() { return kTable; }

}  // namespace effattn::cpu::EFFATTN_ISA
