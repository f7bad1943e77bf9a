// The four passes of ReLU linear attention over cache-sized tiles; compiled once per instruction set.
//
// Each pass that writes tensors follows the memory order of q or of k: channel-major (tokens contiguous, what
// a 1x1 convolution on NCHW leaves) computes with tokens in the lanes, token-major with channels in the
// lanes. Sums over tokens have the channels of q and k in the lanes and take the other factor as scalars, so
// that v can be read where it lies.
#include <type_traits>

#include "../core/prefetch.h"
#include "../core/product.h"
#include "plan.h"
#include "../core/scratch.h"

namespace effattn::cpu::EFFATTN_ISA {
namespace {

using Problem = LinearAttentionParams;

template <class T>
Place<T> place(const Problem& p, const Operand& operand, int64_t group, int64_t token) {
  int64_t offset = token * operand.token_stride;
  int i = p.lead_rank - 1;
  for (; i > 0; --i) {
    offset += group % p.lead_sizes[i] * operand.lead_strides[i];
    group /= p.lead_sizes[i];
  }
  if (i == 0) offset += group * operand.lead_strides[0];
  return {static_cast<T*>(operand.data) + offset, operand.token_stride, operand.channel_stride};
}

template <class T>
Place<const T> source(const Problem& p, const Operand& operand, int64_t group, int64_t token) {
  const Place<T> at = place<T>(p, operand, group, token);
  return {at.data, at.token_stride, at.channel_stride};
}

bool is_channel_major(const Operand& operand) {
  return operand.token_stride == 1 && operand.channel_stride != 1;
}

int64_t scratch_floats(int64_t head_dim, int64_t value_dim, int64_t tile) {
  const int64_t d = round_up(head_dim, 16), dv = round_up(value_dim, 16), t = round_up(tile, 16);
  const int64_t matrices = 2 * (value_dim + 1) * d + head_dim * dv;
  const int64_t tiles = (3 * (d + dv)) * (t + 16);
  constexpr int64_t kPieces = 12;  // more than any pass takes
  return matrices + tiles + 4 * t + kPieces * (Scratch::kAlignment + Scratch::kGap);
}

Scratch scratch_of(const Problem& p, int64_t tile_tokens, float* memory) {
  return {memory, scratch_floats(p.head_dim, p.value_dim, tile_tokens)};
}

// --- the sums, in scratch ---------------------------------------------------------------------------

// S^T and z, a row a channel of v and z in the last one; rows padded to whole vectors, with zeros. Passes
// hand sums to each other in the dense form (value_dim + 1, head_dim), which serves as it is if nothing is
// padded.
struct Sums {
  float* matrix;
  int64_t stride;
  int64_t head_dim, value_dim;
  float* dense;

  Sums(Scratch& scratch, const Problem& p, float* dense_form)
      : stride(padded(p.head_dim)), head_dim(p.head_dim), value_dim(p.value_dim), dense(dense_form) {
    matrix = stride == head_dim ? dense : scratch.floats((value_dim + 1) * stride);
  }
  // To be read only.
  Sums(Scratch& scratch, const Problem& p, const float* dense_form)
      : Sums(scratch, p, const_cast<float*>(dense_form)) {
    if (matrix != dense) copy_rows(matrix, stride, dense, head_dim);
  }

  float* z() const { return matrix + value_dim * stride; }
  void clear() const {
    for (int64_t i = 0; i < (value_dim + 1) * stride; i += kLanes) store(matrix + i, Vec{});
  }
  // Carries what was summed up into the dense form.
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
void accumulate(const Sums& sums, Scalars a, const Tile& b, int64_t tokens, Fetch& fetch) {
  product(sums.value_dim, sums.head_dim, a, Vectors<>{b.data, b.row_stride}, tokens,
          AddTo{sums.matrix, sums.stride}, fetch);
}

// z += sum over tokens of b * weight, for a token-major tile.
template <class Weight>
void accumulate_normaliser(const Sums& sums, const Tile& b, int64_t tokens, const Weight& weight) {
  constexpr int kChains = 4;  // hide the latency of an addition
  for (int64_t d = 0; d < sums.head_dim; d += kLanes) {
    Vec totals[kChains] = {};
    const float* column = b.data + d;
    int64_t t = 0;
    for (; t + kChains <= tokens; t += kChains, column += kChains * b.row_stride) {
      EFFATTN_UNROLL
      for (int i = 0; i < kChains; ++i) totals[i] += weight(t + i) * load(column + i * b.row_stride);
    }
    for (; t < tokens; ++t, column += b.row_stride) totals[0] += weight(t) * load(column);
    float* const z = sums.z() + d;
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
    // A vector of lane sums a token; then kLanes tokens are added up at once. Padding is left out: a product
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

// Rounds a product to T and writes it, after `Last` has had its say: Last::at(row, col) gives the initial
// vectors of a row and what is to be done to its results.
template <class T, class Last>
struct StoreTo {
  T* data;
  int64_t row_stride;
  int64_t cols;
  Last last;

  struct Row : RowPointer<T> {
    typename Last::Row last;
    int64_t cols;  // from here on
    EFFATTN_INLINE Vec start(int v) const { return last.start(v); }
    template <bool Whole>
    EFFATTN_INLINE void finish(int v, Vec acc) const {
      if constexpr (Whole) {
        store(this->at + v * kLanes, last(v, acc));
      } else {
        store_first(this->at + v * kLanes, last(v, acc), cols - v * kLanes);
      }
    }
    EFFATTN_INLINE void next_row() {
      RowPointer<T>::next_row();
      last.next_row();
    }
  };
  EFFATTN_INLINE Row at(int64_t row, int64_t col) const {
    return {{data + row * row_stride + col, row_stride}, last.at(row, col), cols - col};
  }
  EFFATTN_INLINE bool whole(int64_t end) const { return end <= cols; }
};

struct AsItIs {
  struct Row {
    EFFATTN_INLINE Vec start(int) const { return Vec{}; }
    EFFATTN_INLINE Vec operator()(int, Vec acc) const { return acc; }
    EFFATTN_INLINE void next_row() {}
  };
  EFFATTN_INLINE Row at(int64_t, int64_t) const { return {}; }
};

// Times a factor per token.
template <bool ChannelMajor>
struct Scaled {
  const float* scale;

  struct Row {
    const float* scale;
    EFFATTN_INLINE Vec start(int) const { return Vec{}; }
    EFFATTN_INLINE Vec operator()(int v, Vec acc) const {
      return acc * (ChannelMajor ? load(scale + v * kLanes) : broadcast(*scale));
    }
    EFFATTN_INLINE void next_row() {
      if constexpr (!ChannelMajor) ++scale;
    }
  };
  EFFATTN_INLINE Row at(int64_t row, int64_t col) const { return {scale + (ChannelMajor ? col : row)}; }
};

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
    EFFATTN_INLINE Vec operator()(int v, Vec acc) const {
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

// Calls write(data, row_stride, cols) to have a block written in the pass's order: straight into the tensor,
// or into the tile `detour` where the tensor's order is another: grad_v, if v's differs from k's.
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
Mixer to_key_channels(const Sums& sums) {
  return {RowsAdjacent{sums.matrix, sums.stride}, Vectors<>{sums.matrix, sums.stride}};
}

// From channels of k to those of v: multiplies with S^T.
Mixer to_value_channels(const Sums& sums, Scratch& scratch) {
  const Tile transposed = scratch.tile(sums.head_dim, sums.value_dim, false);
  load_tile<false>(transposed, Place<const float>{sums.matrix, 1, sums.stride}, sums.head_dim,
                   sums.value_dim);
  return {RowsAdjacent{transposed.data, transposed.row_stride},
          Vectors<>{transposed.data, transposed.row_stride}};
}

// edge(t, i) = sum_j tile(t, j) * matrix(j, i)
template <bool ChannelMajor, class Edge>
void mix_channels(const Tile& tile, const Mixer& matrix, int64_t tokens, int64_t inputs, int64_t outputs,
                  const Edge& edge, Fetch& fetch) {
  if constexpr (ChannelMajor) {
    product(outputs, tokens, matrix.by_output, Vectors<>{tile.data, tile.row_stride}, inputs, edge, fetch);
  } else {
    product(tokens, outputs, StepsAdjacent<false>{tile.data, tile.row_stride}, matrix.by_input, inputs, edge,
            fetch);
  }
}

// The same into a tensor.
template <bool ChannelMajor, class T, class Last>
void mix_into(Place<T> to, const Tile& detour, const Tile& tile, const Mixer& matrix, int64_t tokens,
              int64_t inputs, int64_t outputs, const Last& last, Fetch& fetch) {
  write_block<ChannelMajor>(to, detour, tokens, outputs, [&](auto* data, int64_t row_stride, int64_t cols) {
    using Out = std::remove_pointer_t<decltype(data)>;
    mix_channels<ChannelMajor>(tile, matrix, tokens, inputs, outputs,
                               StoreTo<Out, Last>{data, row_stride, cols, last}, fetch);
  });
}

// --- where vectors can be read where they lie --------------------------------------------------------------

// 16-bit types are converted once, into a tile; a product would convert them for every block of rows.
template <class T, bool ChannelMajor>
constexpr bool kInPlace = ChannelMajor && sizeof(T) == sizeof(float);

// Whether a channel-major pass can do without tiles: tokens are contiguous in all `places`, and there is at
// least a vector of them.
template <class... Places>
bool reads_in_place(int64_t tokens, const Places&... places) {
  return tokens >= kLanes && ((places.token_stride == 1) && ...);
}

template <bool Relu, class T>
Vectors<T, Relu> in_place(const Place<const T>& from, int64_t offset) {
  return {from.data + offset, from.channel_stride};
}

template <class T, class Rows, class Last>
void mix_in_place(Place<T> to, int64_t offset, const Rows& rows, const Mixer& matrix, int64_t tokens,
                  int64_t inputs, int64_t outputs, const Last& last, Fetch& fetch) {
  product(outputs, tokens, matrix.by_output, rows, inputs,
          StoreTo<T, Last>{to.data + offset, to.channel_stride, tokens, last}, fetch);
}

// --- what to fetch ahead ------------------------------------------------------------------------------

// The tensors that a pass reads or writes and how many channels they have; whether its tokens are keys, and
// whether it reduces them to sums or uses sums.
struct Traffic {
  bool keys, reduces;
  struct {
    Operand Problem::* operand;
    int64_t Problem::* channels;
  } tensors[Fetch::kMaxBlocks];
};
constexpr Traffic kSumKeys{
    true, true, {{&Problem::k, &Problem::head_dim}, {&Problem::v, &Problem::value_dim}}};
constexpr Traffic kApplyQueries{
    false, false, {{&Problem::q, &Problem::head_dim}, {&Problem::out, &Problem::value_dim}}};
constexpr Traffic kGradQueries{false,
                               true,
                               {{&Problem::q, &Problem::head_dim},
                                {&Problem::grad_out, &Problem::value_dim},
                                {&Problem::grad_q, &Problem::head_dim}}};
constexpr Traffic kGradKeys{true,
                            false,
                            {{&Problem::k, &Problem::head_dim},
                             {&Problem::v, &Problem::value_dim},
                             {&Problem::grad_k, &Problem::head_dim},
                             {&Problem::grad_v, &Problem::value_dim}}};

// The next tile of this range, or behind its last one the first tile of what the thread does next.
template <class T>
Fetch fetch_ahead(const Problem& p, const Traffic& pass, const Traffic& other_pass, const Range& range,
                  int64_t at, int64_t tile_tokens) {
  Fetch fetch;
  const auto add_tile = [&](const Traffic& traffic, int64_t group, int64_t token, int64_t end) {
    for (const auto& [operand, channels] : traffic.tensors) {
      if (operand == nullptr) break;
      fetch.add(place<T>(p, p.*operand, group, token), min(tile_tokens, end - token), p.*channels);
    }
  };
  if (at < range.end) {
    add_tile(pass, range.group, at, range.end);
  } else if (range.next != Range::Next::kNothing) {
    const Traffic& next = (range.next == Range::Next::kReduce) == pass.reduces ? pass : other_pass;
    add_tile(next, range.next_group, range.next_begin, next.keys ? p.keys : p.queries);
  }
  return fetch;
}

// --- the passes ---------------------------------------------------------------------------------------

template <class T>
void sum_keys(const Problem& p, const Range& range, int64_t tile_tokens, float* dense_sums,
              float* scratch_memory) {
  Scratch scratch = scratch_of(p, tile_tokens, scratch_memory);
  const Sums sums(scratch, p, dense_sums);
  sums.clear();
  const Tile k = scratch.tile(tile_tokens, p.head_dim, false);
  const Tile v = scratch.tile(tile_tokens, p.value_dim, is_channel_major(p.v));
  for (int64_t at = range.begin; at < range.end; at += tile_tokens) {
    const int64_t tokens = min(tile_tokens, range.end - at);
    const Place<const T> from_k = source<T>(p, p.k, range.group, at),
                         from_v = source<T>(p, p.v, range.group, at);
    Fetch fetch = fetch_ahead<T>(p, kSumKeys, kApplyQueries, range, at + tokens, tile_tokens);
    load_tile<true>(k, from_k, tokens, p.head_dim);
    with_scalars(v, from_v, tokens, p.value_dim,
                 [&](const auto& scalars) { accumulate(sums, scalars, k, tokens, fetch); });
    accumulate_normaliser(sums, k, tokens, [](int64_t) { return 1.0f; });
  }
  sums.finish();
}

template <class T, bool ChannelMajor>
void apply_tiles(const Problem& p, const Range& range, int64_t tile_tokens, const Sums& sums,
                 Scratch scratch) {
  const Tile q = scratch.tile(tile_tokens, p.head_dim, ChannelMajor);
  float* inverse = scratch.floats(padded(tile_tokens));
  const Mixer mixer = to_value_channels(sums, scratch);
  const Tile detour = scratch.tile(tile_tokens, p.value_dim, ChannelMajor);
  for (int64_t at = range.begin; at < range.end; at += tile_tokens) {
    const int64_t tokens = min(tile_tokens, range.end - at);
    const Place<const T> from = source<T>(p, p.q, range.group, at);
    const Place<T> to = place<T>(p, p.out, range.group, at);
    Fetch fetch = fetch_ahead<T>(p, kApplyQueries, kSumKeys, range, at + tokens, tile_tokens);
    if constexpr (kInPlace<T, ChannelMajor>) {
      if (p.value_dim <= kRowsWithoutCopy && reads_in_place(range.end - range.begin, to)) {
        in_whole_vectors(tokens, [&](int64_t offset, int64_t count) {
          const auto rows = in_place<true>(from, offset);
          dot_tokens(inverse, rows, ByVector{sums.z()}, count, p.head_dim);
          invert(inverse, p.eps, count);
          mix_in_place(to, offset, rows, mixer, count, p.head_dim, p.value_dim, Scaled<true>{inverse}, fetch);
        });
        continue;
      }
    }
    load_tile<true>(q, from, tokens, p.head_dim);
    dot_channels(inverse, q, ByVector{sums.z()}, tokens, p.head_dim);
    invert(inverse, p.eps, tokens);
    mix_into<ChannelMajor>(to, detour, q, mixer, tokens, p.head_dim, p.value_dim,
                           Scaled<ChannelMajor>{inverse}, fetch);
  }
}

template <class T>
void apply_queries(const Problem& p, const Range& range, int64_t tile_tokens, const float* dense_sums,
                   float* scratch_memory) {
  Scratch scratch = scratch_of(p, tile_tokens, scratch_memory);
  const Sums sums(scratch, p, dense_sums);
  if (is_channel_major(p.q)) {
    apply_tiles<T, true>(p, range, tile_tokens, sums, scratch);
  } else {
    apply_tiles<T, false>(p, range, tile_tokens, sums, scratch);
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
void grad_query_tiles(const Problem& p, const Range& range, int64_t tile_tokens, const Sums& sums,
                      const Sums& grad_sums, Scratch scratch) {
  const Mixer mixer = to_key_channels(sums);
  const Tile q = scratch.tile(tile_tokens, p.head_dim, ChannelMajor);
  const Tile w = scratch.tile(tile_tokens, p.head_dim, ChannelMajor);
  const Tile grad = scratch.tile(tile_tokens, p.value_dim, ChannelMajor);
  const Tile q_rows = ChannelMajor ? scratch.tile(tile_tokens, p.head_dim, false) : q;
  float* inverse = scratch.floats(padded(tile_tokens));
  float* share = scratch.floats(padded(tile_tokens));
  for (int64_t at = range.begin; at < range.end; at += tile_tokens) {
    const int64_t tokens = min(tile_tokens, range.end - at);
    const Place<const T> from_q = source<T>(p, p.q, range.group, at);
    const Place<const T> from_grad = source<T>(p, p.grad_out, range.group, at);
    const Place<T> to = place<T>(p, p.grad_q, range.group, at);
    Fetch fetch = fetch_ahead<T>(p, kGradQueries, kGradKeys, range, at + tokens, tile_tokens);
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
                  WriteTo{w.data + offset, w.row_stride}, fetch);
        });
      }
    }
    if (copied) {
      load_tile<false>(grad, from_grad, tokens, p.value_dim);
      mix_channels<ChannelMajor>(grad, mixer, tokens, p.value_dim, p.head_dim, WriteTo{w.data, w.row_stride},
                                 fetch);
    }
    dot_channels(inverse, q, ByVector{sums.z()}, tokens, p.head_dim);
    invert(inverse, p.eps, tokens);
    dot_channels(share, q, ByTile{w}, tokens, p.head_dim);
    for (int64_t t = 0; t < tokens; t += kLanes) store(share + t, load(share + t) * load(inverse + t));
    write_block<ChannelMajor>(to, w, tokens, p.head_dim, [&](auto* data, int64_t row_stride, int64_t cols) {
      finish_grad_q<ChannelMajor>(data, row_stride, cols, q, w, sums.z(), inverse, share,
                                  ChannelMajor ? p.head_dim : tokens);
    });
    if (ChannelMajor) {
      load_tile<false>(q_rows, Place<const float>{q.data, 1, q.row_stride}, tokens, p.head_dim);
    }
    accumulate(grad_sums, grad_scalars, q_rows, tokens, fetch);
    accumulate_normaliser(grad_sums, q_rows, tokens, [&](int64_t t) { return -share[t]; });
  }
}

template <class T>
void grad_queries(const Problem& p, const Range& range, int64_t tile_tokens, const float* dense_sums,
                  float* dense_grad, float* scratch_memory) {
  Scratch scratch = scratch_of(p, tile_tokens, scratch_memory);
  const Sums sums(scratch, p, dense_sums), grad_sums(scratch, p, dense_grad);
  grad_sums.clear();
  if (is_channel_major(p.q)) {
    grad_query_tiles<T, true>(p, range, tile_tokens, sums, grad_sums, scratch);
  } else {
    grad_query_tiles<T, false>(p, range, tile_tokens, sums, grad_sums, scratch);
  }
  grad_sums.finish();
}

template <class T, bool ChannelMajor>
void grad_key_tiles(const Problem& p, const Range& range, int64_t tile_tokens, const Sums& grad,
                    Scratch scratch) {
  const Mixer to_k = to_key_channels(grad), to_v = to_value_channels(grad, scratch);
  const Tile k = scratch.tile(tile_tokens, p.head_dim, ChannelMajor);
  const Tile detour_k = scratch.tile(tile_tokens, p.head_dim, ChannelMajor);
  const Tile v = scratch.tile(tile_tokens, p.value_dim, ChannelMajor);
  const Tile detour_v = scratch.tile(tile_tokens, p.value_dim, ChannelMajor);
  for (int64_t at = range.begin; at < range.end; at += tile_tokens) {
    const int64_t tokens = min(tile_tokens, range.end - at);
    const Place<const T> from_k = source<T>(p, p.k, range.group, at),
                         from_v = source<T>(p, p.v, range.group, at);
    const Place<T> into_k = place<T>(p, p.grad_k, range.group, at);
    const Place<T> into_v = place<T>(p, p.grad_v, range.group, at);
    Fetch fetch = fetch_ahead<T>(p, kGradKeys, kGradQueries, range, at + tokens, tile_tokens);
    if constexpr (kInPlace<T, ChannelMajor>) {
      if (p.value_dim <= kRowsWithoutCopy &&
          reads_in_place(range.end - range.begin, from_v, into_k, into_v)) {
        in_whole_vectors(tokens, [&](int64_t offset, int64_t count) {
          const auto rows_k = in_place<true>(from_k, offset);
          mix_in_place(into_k, offset, in_place<false>(from_v, offset), to_k, count, p.value_dim, p.head_dim,
                       Gated<true>{rows_k.data, rows_k.row_stride, grad.z()}, fetch);
          mix_in_place(into_v, offset, rows_k, to_v, count, p.head_dim, p.value_dim, AsItIs{}, fetch);
        });
        continue;
      }
    }
    load_tile<true>(k, from_k, tokens, p.head_dim);
    load_tile<false>(v, from_v, tokens, p.value_dim);
    mix_into<ChannelMajor>(into_k, detour_k, v, to_k, tokens, p.value_dim, p.head_dim,
                           Gated<ChannelMajor>{k.data, k.row_stride, grad.z()}, fetch);
    mix_into<ChannelMajor>(into_v, detour_v, k, to_v, tokens, p.head_dim, p.value_dim, AsItIs{}, fetch);
  }
}

template <class T>
void grad_keys(const Problem& p, const Range& range, int64_t tile_tokens, const float* dense_grad,
               float* scratch_memory) {
  Scratch scratch = scratch_of(p, tile_tokens, scratch_memory);
  const Sums grad(scratch, p, dense_grad);
  if (is_channel_major(p.k)) {
    grad_key_tiles<T, true>(p, range, tile_tokens, grad, scratch);
  } else {
    grad_key_tiles<T, false>(p, range, tile_tokens, grad, scratch);
  }
}

template <class T>
constexpr ReluLinearAttentionPasses kPasses = {scratch_floats, sum_keys<T>, apply_queries<T>, grad_queries<T>,
                                               grad_keys<T>};

}  // namespace

const ReluLinearAttentionPasses& relu_linear_attention_passes(DType dtype) {
  switch (dtype) {
    case DType::kBFloat16:
      return kPasses<BFloat16>;
    case DType::kFloat16:
      return kPasses<Float16>;
    default:
      return kPasses<float>;
  }
}

}  // namespace effattn::cpu::EFFATTN_ISA
