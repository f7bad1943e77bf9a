// The four passes of ReLU linear attention over cache-sized tiles; compiled once per instruction set.
//
// Each pass follows the memory order of the tensor it writes: channel-major (tokens contiguous, what a
// 1x1 convolution on NCHW leaves) computes with tokens in the lanes, token-major with channels in the
// lanes. Only the tile that feeds a sum over tokens must be token-major; it is transposed in registers
// on its way in when memory says otherwise.
#include "product.h"
#include "relu_linear_attention.h"
#include "tile.h"

namespace effattn::cpu::EFFATTN_ISA {
namespace {

using Problem = ReluLinearAttention;

template <class T>
Place<T> place(const Problem& p, const Operand& operand, int64_t group, int64_t token) {
  int64_t offset = token * operand.token_stride;
  for (int i = p.lead_rank - 1; i >= 0; --i) {
    offset += group % p.lead_sizes[i] * operand.lead_strides[i];
    group /= p.lead_sizes[i];
  }
  return {static_cast<T*>(operand.data) + offset, operand.token_stride, operand.channel_stride, 0};
}

template <class T>
Place<const T> source(const Problem& p, const Operand& operand, int64_t group, int64_t token) {
  const Place<T> at = place<T>(p, operand, group, token);
  return {at.data, at.token_stride, at.channel_stride, 0};
}

template <class T>
void advance(Place<T>& at, int64_t tokens) {
  at.data += tokens * at.token_stride;
}

// Asks for early fetching of the block behind the one of `tokens` that is loaded next, if there is one.
template <class T>
void look_ahead(Place<const T>& at, int64_t tokens, bool last) {
  at.ahead = last ? 0 : tokens * at.token_stride;
}

bool is_channel_major(const Operand& operand) {
  return operand.token_stride == 1 && operand.channel_stride != 1;
}

// Hands out cache-line-aligned pieces of a thread's scratch.
struct Scratch {
  float* next;

  float* floats(int64_t count) {
    float* piece = next;
    next += round_up(count, 16);
    return piece;
  }
  // Rows one cache line longer than a power of two would be, so that rows do not share cache sets.
  Tile tile(int64_t tokens, int64_t channels, bool channel_major) {
    const int64_t rows = channel_major ? channels : tokens;
    const int64_t stride = padded(channel_major ? tokens : channels) + (channel_major ? 16 : 0);
    return {floats(rows * stride), stride, channel_major};
  }
};

int64_t scratch_floats(int64_t head_dim, int64_t value_dim, int64_t tile) {
  const int64_t d = round_up(head_dim, 16), dv = round_up(value_dim, 16), t = round_up(tile, 16);
  const int64_t matrices = 2 * (head_dim * dv + value_dim * d) + 2 * d;
  const int64_t tiles = (3 * (d + dv)) * (t + 16);
  return matrices + tiles + 4 * t + 64;
}

// --- the sums, in scratch ---------------------------------------------------------------------------

// S with its rows padded to whole vectors, and z.
struct Sums {
  float* matrix;  // (head_dim, stride)
  int64_t stride;
  float* z;  // (head_dim padded), zero behind
  int64_t head_dim, value_dim;

  Sums(Scratch& scratch, const Problem& p)
      : stride(padded(p.value_dim)), head_dim(p.head_dim), value_dim(p.value_dim) {
    matrix = scratch.floats(head_dim * stride);
    z = scratch.floats(padded(head_dim));
    for (int64_t i = 0; i < padded(head_dim); ++i) z[i] = 0.0f;
  }

  void clear() const {
    for (int64_t i = 0; i < head_dim * stride; i += kLanes) store(matrix + i, Vec{});
    for (int64_t i = 0; i < head_dim; i += kLanes) store(z + i, Vec{});
  }
  // The packed form that crosses passes: (head_dim, value_dim + 1), z in the last column.
  void read(const float* packed) const {
    for (int64_t d = 0; d < head_dim; ++d, packed += value_dim + 1) {
      for (int64_t e = 0; e < stride; e += kLanes) {
        store(matrix + d * stride + e, load_first(packed + e, value_dim - e));
      }
      z[d] = packed[value_dim];
    }
  }
  void write(float* packed) const {
    for (int64_t d = 0; d < head_dim; ++d, packed += value_dim + 1) {
      for (int64_t e = 0; e < stride; e += kLanes) {
        store_first(packed + e, load(matrix + d * stride + e), value_dim - e);
      }
      packed[value_dim] = z[d];
    }
  }
  // S^T with padded rows, for the products that need channels of q or k in the lanes.
  Vectors transposed(Scratch& scratch) const {
    const int64_t width = padded(head_dim);
    float* out = scratch.floats(value_dim * width);
    for (int64_t e = 0; e < value_dim; ++e) {
      for (int64_t d = 0; d < head_dim; ++d) out[e * width + d] = matrix[d * stride + e];
      for (int64_t d = head_dim; d < width; ++d) out[e * width + d] = 0.0f;
    }
    return {out, width};
  }

  Vectors rows() const { return {matrix, stride}; }
};

// sums += a^T [b | weight]: a tile of any order, b token-major, over `tokens`.
void accumulate(const Sums& sums, const Tile& a, const Tile& b, int64_t tokens) {
  product(sums.head_dim, sums.value_dim, Scalars{a.data, a.channel_stride(), a.token_stride()},
          Vectors{b.data, b.row_stride}, tokens, AddTo{sums.matrix, sums.stride});
}

// z += sum over tokens of a * weight; a null weight counts as ones.
void accumulate_normaliser(const Sums& sums, const Tile& a, const float* weight, int64_t tokens) {
  if (a.channel_major) {
    Vec totals[kLanes];
    for (int64_t d = 0; d < sums.head_dim; d += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        totals[i] = Vec{};
        if (d + i >= sums.head_dim) continue;
        for (int64_t t = 0; t < tokens; t += kLanes) {
          // Only the tile's own tokens: behind them a weight may be 0 / 0.
          const Vec x = load_first(a.row(d + i) + t, tokens - t);
          totals[i] += weight != nullptr ? x * load_first(weight + t, tokens - t) : x;
        }
      }
      store(sums.z + d, load(sums.z + d) + sum_lanes(totals));
    }
  } else {
    for (int64_t d = 0; d < sums.head_dim; d += kLanes) {
      Vec total = {};
      for (int64_t t = 0; t < tokens; ++t) {
        const Vec x = load(a.row(t) + d);
        total += weight != nullptr ? x * weight[t] : x;
      }
      store(sums.z + d, load(sums.z + d) + total);
    }
  }
}

// --- per-token dot products ---------------------------------------------------------------------------

// out[t] = sum over channels of a(t, c) * other(t, c), or of a(t, c) * z[c] where `other` is null.
void dot_channels(float* out, const Tile& a, const Tile* other, const float* z, int64_t tokens,
                  int64_t channels) {
  if (a.channel_major) {
    for (int64_t t = 0; t < tokens; t += kLanes) {
      Vec even = {}, odd = {};
      int64_t c = 0;
      for (; c + 2 <= channels; c += 2) {
        even += load(a.row(c) + t) * (other != nullptr ? load(other->row(c) + t) : broadcast(z[c]));
        odd +=
            load(a.row(c + 1) + t) * (other != nullptr ? load(other->row(c + 1) + t) : broadcast(z[c + 1]));
      }
      if (c < channels)
        even += load(a.row(c) + t) * (other != nullptr ? load(other->row(c) + t) : broadcast(z[c]));
      store(out + t, even + odd);
    }
  } else {
    // A vector of lane sums a token; one transposition then adds up kLanes tokens at once.
    Vec lane_sums[kLanes];
    for (int64_t t = 0; t < tokens; t += kLanes) {
      for (int i = 0; i < kLanes; ++i) {
        lane_sums[i] = Vec{};
        if (t + i >= tokens) continue;
        for (int64_t c = 0; c < channels; c += kLanes) {
          lane_sums[i] += load(a.row(t + i) + c) * load(other != nullptr ? other->row(t + i) + c : z + c);
        }
      }
      store(out + t, sum_lanes(lane_sums));
    }
  }
}

// 1 / (dot + eps). What is infinite or NaN in a denominator stays so in a product with its inverse.
void invert(float* dots, float eps, int64_t tokens) {
  for (int64_t t = 0; t < tokens; t += kLanes) store(dots + t, 1.0f / (load(dots + t) + eps));
}

// --- products over channels ---------------------------------------------------------------------------

// Scales by a factor per token and rounds to T, straight into the output tensor.
template <class T, bool ChannelMajor>
struct ScaledStore {
  T* data;
  int64_t row_stride;
  int64_t cols;
  const float* scale;  // per token
  EFFATTN_INLINE Vec start(int64_t, int64_t) const { return Vec{}; }
  EFFATTN_INLINE bool whole(int64_t end) const { return end <= cols; }
  template <bool Whole>
  EFFATTN_INLINE void finish(int64_t row, int64_t col, Vec acc) const {
    const Vec factor = ChannelMajor ? load(scale + col) : broadcast(scale[row]);
    T* const at = data + row * row_stride + col;
    if constexpr (Whole) {
      store(at, acc * factor);
    } else {
      store_first(at, acc * factor, cols - col);
    }
  }
};

// Starts at z (one per output channel), drops what relu gated, writes a tile.
template <bool ChannelMajor>
struct GatedWrite {
  Tile to;
  Tile relu_input;
  const float* z;
  EFFATTN_INLINE Vec start(int64_t row, int64_t col) const {
    return ChannelMajor ? broadcast(z[row]) : load(z + col);
  }
  EFFATTN_INLINE bool whole(int64_t) const { return true; }
  template <bool>
  EFFATTN_INLINE void finish(int64_t row, int64_t col, Vec acc) const {
    store(to.row(row) + col, relu_gate(load(relu_input.row(row) + col), acc));
  }
};

// to(t, i) = sum_j tile(t, j) * matrix(j, i), where `by_input` has a row a j and `by_output` a row an
// i; tokens in the lanes read the one as scalars, channels in the lanes the other as vectors.
template <class Edge>
void mix_channels(const Tile& tile, Scalars matrix_scalars, Vectors matrix_vectors, int64_t tokens,
                  int64_t inputs, int64_t outputs, const Edge& edge) {
  if (tile.channel_major) {
    product(outputs, tokens, matrix_scalars, Vectors{tile.data, tile.row_stride}, inputs, edge);
  } else {
    product(tokens, outputs, Scalars{tile.data, tile.row_stride, 1}, matrix_vectors, inputs, edge);
  }
}

// --- the passes ---------------------------------------------------------------------------------------

template <class T>
void sum_keys(const Problem& p, int64_t group, int64_t begin, int64_t end, int64_t tile_tokens, float* packed,
              float* scratch_memory) {
  Scratch scratch{scratch_memory};
  const Sums sums(scratch, p);
  sums.clear();
  const Tile k = scratch.tile(tile_tokens, p.head_dim, is_channel_major(p.k));
  const Tile v = scratch.tile(tile_tokens, p.value_dim, false);
  Place<const T> from_k = source<T>(p, p.k, group, begin), from_v = source<T>(p, p.v, group, begin);
  for (int64_t at = begin; at < end; at += tile_tokens) {
    const int64_t tokens = smaller(tile_tokens, end - at);
    look_ahead(from_k, tokens, at + tokens == end);
    look_ahead(from_v, tokens, at + tokens == end);
    load_tile<true>(k, from_k, tokens, p.head_dim);
    load_tile<false>(v, from_v, tokens, p.value_dim);
    accumulate(sums, k, v, tokens);
    accumulate_normaliser(sums, k, nullptr, tokens);
    advance(from_k, tokens);
    advance(from_v, tokens);
  }
  sums.write(packed);
}

template <class T, bool ChannelMajor>
void apply_tiles(const Problem& p, int64_t group, int64_t begin, int64_t end, int64_t tile_tokens,
                 const Sums& sums, Scratch scratch) {
  const Tile q = scratch.tile(tile_tokens, p.head_dim, ChannelMajor);
  float* inverse = scratch.floats(padded(tile_tokens));
  const Scalars by_output{sums.matrix, 1, sums.stride};
  // The output is allocated in q's order; only a caller's odd strides need the detour by a tile.
  const bool direct = ChannelMajor ? p.out.token_stride == 1 : p.out.channel_stride == 1;
  const Tile detour = scratch.tile(direct ? 0 : tile_tokens, direct ? 0 : p.value_dim, ChannelMajor);
  Place<const T> from = source<T>(p, p.q, group, begin);
  Place<T> to = place<T>(p, p.out, group, begin);
  for (int64_t at = begin; at < end; at += tile_tokens) {
    const int64_t tokens = smaller(tile_tokens, end - at);
    look_ahead(from, tokens, at + tokens == end);
    load_tile<true>(q, from, tokens, p.head_dim);
    dot_channels(inverse, q, nullptr, sums.z, tokens, p.head_dim);
    invert(inverse, p.eps, tokens);
    if (direct) {
      const ScaledStore<T, ChannelMajor> edge{to.data, ChannelMajor ? to.channel_stride : to.token_stride,
                                              ChannelMajor ? tokens : p.value_dim, inverse};
      mix_channels(q, by_output, sums.rows(), tokens, p.head_dim, p.value_dim, edge);
    } else {
      const ScaledStore<float, ChannelMajor> edge{detour.data, detour.row_stride,
                                                  padded(ChannelMajor ? tokens : p.value_dim), inverse};
      mix_channels(q, by_output, sums.rows(), tokens, p.head_dim, p.value_dim, edge);
      store_tile(detour, to, tokens, p.value_dim);
    }
    advance(from, tokens);
    advance(to, tokens);
  }
}

template <class T>
void apply_queries(const Problem& p, int64_t group, int64_t begin, int64_t end, int64_t tile_tokens,
                   const float* packed, float* scratch_memory) {
  Scratch scratch{scratch_memory};
  const Sums sums(scratch, p);
  sums.read(packed);
  if (is_channel_major(p.q)) {
    apply_tiles<T, true>(p, group, begin, end, tile_tokens, sums, scratch);
  } else {
    apply_tiles<T, false>(p, group, begin, end, tile_tokens, sums, scratch);
  }
}

// In place: w becomes grad_q, q becomes q / denominator.
//   r = 1 / (q.z + eps)   s = (q.w) r   grad_q = gate (w - z s) r   q' = q r
// where w = S grad_out, so that the gradient of the normaliser needs no output to be kept:
// grad_out . out = (q.w) r.
void finish_grad_q(const Tile& q, const Tile& w, const float* z, const float* inverse, const float* share,
                   int64_t tokens, int64_t head_dim) {
  const int64_t rows = q.channel_major ? head_dim : tokens;
  const int64_t cols = q.channel_major ? tokens : head_dim;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < cols; c += kLanes) {
      const Vec inv = q.channel_major ? load(inverse + c) : broadcast(inverse[r]);
      const Vec part = q.channel_major ? broadcast(z[r]) * load(share + c) : load(z + c) * share[r];
      const Vec x = load(q.row(r) + c);
      store(w.row(r) + c, relu_gate(x, (load(w.row(r) + c) - part) * inv));
      store(q.row(r) + c, x * inv);
    }
  }
}

template <class T>
void grad_queries(const Problem& p, int64_t group, int64_t begin, int64_t end, int64_t tile_tokens,
                  const float* packed, float* packed_grad, float* scratch_memory) {
  Scratch scratch{scratch_memory};
  const Sums sums(scratch, p), grad_sums(scratch, p);
  sums.read(packed);
  grad_sums.clear();
  const bool channel_major = is_channel_major(p.q);
  const Scalars by_output{sums.matrix, sums.stride, 1};
  const Vectors by_input = sums.transposed(scratch);
  const Tile q = scratch.tile(tile_tokens, p.head_dim, channel_major);
  const Tile w = scratch.tile(tile_tokens, p.head_dim, channel_major);
  const Tile grad = scratch.tile(tile_tokens, p.value_dim, channel_major);
  const Tile grad_rows = channel_major ? scratch.tile(tile_tokens, p.value_dim, false) : grad;
  float* inverse = scratch.floats(padded(tile_tokens));
  float* share = scratch.floats(padded(tile_tokens));
  Place<const T> from_q = source<T>(p, p.q, group, begin), from_grad = source<T>(p, p.grad_out, group, begin);
  Place<T> to = place<T>(p, p.grad_q, group, begin);
  for (int64_t at = begin; at < end; at += tile_tokens) {
    const int64_t tokens = smaller(tile_tokens, end - at);
    look_ahead(from_q, tokens, at + tokens == end);
    look_ahead(from_grad, tokens, at + tokens == end);
    load_tile<true>(q, from_q, tokens, p.head_dim);
    load_tile<false>(grad, from_grad, tokens, p.value_dim);
    if (channel_major) load_tile<false>(grad_rows, from_grad, tokens, p.value_dim);
    mix_channels(grad, by_output, by_input, tokens, p.value_dim, p.head_dim, WriteTo{w.data, w.row_stride});
    dot_channels(inverse, q, nullptr, sums.z, tokens, p.head_dim);
    invert(inverse, p.eps, tokens);
    dot_channels(share, q, &w, nullptr, tokens, p.head_dim);
    for (int64_t t = 0; t < tokens; t += kLanes) store(share + t, load(share + t) * load(inverse + t));
    finish_grad_q(q, w, sums.z, inverse, share, tokens, p.head_dim);
    store_tile(w, to, tokens, p.head_dim);
    for (int64_t t = 0; t < tokens; t += kLanes) store(share + t, -load(share + t));
    accumulate(grad_sums, q, grad_rows, tokens);
    accumulate_normaliser(grad_sums, q, share, tokens);
    advance(from_q, tokens);
    advance(from_grad, tokens);
    advance(to, tokens);
  }
  grad_sums.write(packed_grad);
}

template <class T, bool ChannelMajor>
void grad_key_tiles(const Problem& p, int64_t group, int64_t begin, int64_t end, int64_t tile_tokens,
                    const Sums& grad, Scratch scratch) {
  const Vectors transposed = grad.transposed(scratch);
  const Tile k = scratch.tile(tile_tokens, p.head_dim, ChannelMajor);
  const Tile grad_k = scratch.tile(tile_tokens, p.head_dim, ChannelMajor);
  const Tile v = scratch.tile(tile_tokens, p.value_dim, ChannelMajor);
  const Tile grad_v = scratch.tile(tile_tokens, p.value_dim, ChannelMajor);
  Place<const T> from_k = source<T>(p, p.k, group, begin), from_v = source<T>(p, p.v, group, begin);
  Place<T> to_k = place<T>(p, p.grad_k, group, begin), to_v = place<T>(p, p.grad_v, group, begin);
  for (int64_t at = begin; at < end; at += tile_tokens) {
    const int64_t tokens = smaller(tile_tokens, end - at);
    look_ahead(from_k, tokens, at + tokens == end);
    look_ahead(from_v, tokens, at + tokens == end);
    load_tile<true>(k, from_k, tokens, p.head_dim);
    load_tile<false>(v, from_v, tokens, p.value_dim);
    mix_channels(v, Scalars{grad.matrix, grad.stride, 1}, transposed, tokens, p.value_dim, p.head_dim,
                 GatedWrite<ChannelMajor>{grad_k, k, grad.z});
    mix_channels(k, Scalars{grad.matrix, 1, grad.stride}, grad.rows(), tokens, p.head_dim, p.value_dim,
                 WriteTo{grad_v.data, grad_v.row_stride});
    store_tile(grad_k, to_k, tokens, p.head_dim);
    store_tile(grad_v, to_v, tokens, p.value_dim);
    advance(from_k, tokens);
    advance(from_v, tokens);
    advance(to_k, tokens);
    advance(to_v, tokens);
  }
}

template <class T>
void grad_keys(const Problem& p, int64_t group, int64_t begin, int64_t end, int64_t tile_tokens,
               const float* packed_grad, float* scratch_memory) {
  Scratch scratch{scratch_memory};
  const Sums grad(scratch, p);
  grad.read(packed_grad);
  if (is_channel_major(p.k)) {
    grad_key_tiles<T, true>(p, group, begin, end, tile_tokens, grad, scratch);
  } else {
    grad_key_tiles<T, false>(p, group, begin, end, tile_tokens, grad, scratch);
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
