// ReLU linear attention, backward: a kernel for the gradients of q, one for those of the kv_state, which are
// sums over queries, and one for those of k and v.
#include "api.h"

#include "launch_plan.h"

namespace effattn::cuda {
namespace linear_attention {
namespace {

// The vector z of a kv_state in shared memory.
template <class Tiles, int kPadded>
EFFATTN_DEVICE const float* place_vector(char* shared, const KvState& kv_state) {
  float* const vector = reinterpret_cast<float*>(shared);
  for (int channel = thread_index(); channel < kPadded; channel += Tiles::kThreads) {
    vector[channel] = kv_state(kZ, channel);
  }
  return vector;
}

EFFATTN_DEVICE KvState kv_state_of(const float* data, int64_t group, int head_dim, int value_dim) {
  return {data + group * (value_dim + 1) * head_dim, head_dim, value_dim};
}

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((TokenTiles<T, kPadded, kTokenMajor>::kThreads), 1)
query_gradients(EFFATTN_PARAMETERS(QueryArgs) p) {
  using Tiles = TokenTiles<T, kPadded, kTokenMajor>;
  using Chunk = typename Tiles::Chunk;
  using Operand = typename Tiles::template Operand<false>;
  const TileCoord<Tiles> at(p.tiles);
  const Matrix<const T> q = by_token<const T>(p.q, p.groups, at.group, p.tokens, p.head_dim);
  const Matrix<const T> grad_out = by_token<const T>(p.grad_out, p.groups, at.group, p.tokens, p.value_dim);
  Chunk grad, query;
  grad.load(grad_out, at.token, 0);
  Operand state(shared_memory());
  const KvState kv_state = kv_state_of(p.kv_state, at.group, p.head_dim, p.value_dim);
  state.template place<Tiles::kThreads>([&](int k, int n) { return kv_state(k, n); });
  const float* const vector = place_vector<Tiles, kPadded>(shared_memory() + Operand::kSharedBytes, kv_state);
  sync_block();
  typename Tiles::Piece total;
  total.clear();
  EFFATTN_NOT_UNROLLED
  for (int chunk = 0; chunk < Tiles::kChunks; ++chunk) {
    if (chunk > 0) grad.load(grad_out, at.token, chunk * Chunk::kAllCols);
    state.template multiply_add<false>(total, grad, chunk);
  }
  float inverse[Tiles::kRows] = {}, along[Tiles::kRows] = {};
  EFFATTN_UNROLL
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    query.load(q, at.token, first);
    query.relu();
    query.each([&](float x, int r, int c) {
      inverse[r] += x * vector[first + Chunk::col(c)];
      along[r] += x * total.x[r][first / 4 + c];
    });
  }
  EFFATTN_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) {
    inverse[r] = 1 / clamp_subnormal(sum_of_cols(inverse[r]) + p.eps);
    // -grad . out, with out = relu(q) S / denominator
    along[r] = -sum_of_cols(along[r]) * inverse[r];
  }
  EFFATTN_UNROLL
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    if (kPadded > Chunk::kAllCols) {  // or it is there still
      query.load(q, at.token, first);
      query.relu();
    }
    // The gate is relu's, which lets NaN through.
    query.each([&](float x, int r, int c) {
      float& gradient = total.x[r][first / 4 + c];
      gradient = x <= 0 ? 0.0f : (gradient + along[r] * vector[first + Chunk::col(c)]) * inverse[r];
    });
  }
  total.store(by_token<T>(p.out, p.groups, at.group, p.tokens, p.head_dim), at.token, 0);
  if (col_lane() != 0) return;
  EFFATTN_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) {
    const int token = at.token + Chunk::row(r);
    if (token >= p.tokens) continue;
    float* const scales = p.scales + 2 * (at.group * p.tokens + token);
    scales[0] = inverse[r];
    scales[1] = along[r] * inverse[r];
  }
}

struct KeyArgs {
  Groups groups;
  View k, v, grad_k, grad_v;
  const float* grad_kv_state;
  int tokens, head_dim, value_dim;
  uint32_t tiles;
};

template <class T, int kPadded, bool kTokenMajor>
using KeyTiles = TokenTiles<T, kPadded, kTokenMajor, false, 4, kTokenMajor ? 8 : 4>;

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((KeyTiles<T, kPadded, kTokenMajor>::kThreads), 1)
key_gradients(EFFATTN_PARAMETERS(KeyArgs) p) {
  using Tiles = KeyTiles<T, kPadded, kTokenMajor>;
  using Chunk = typename Tiles::Chunk;
  using Operand = typename Tiles::template Operand<false>;
  const TileCoord<Tiles> at(p.tiles);
  const Matrix<const T> k = by_token<const T>(p.k, p.groups, at.group, p.tokens, p.head_dim);
  const Matrix<const T> v = by_token<const T>(p.v, p.groups, at.group, p.tokens, p.value_dim);
  Chunk value, key;
  value.load(v, at.token, 0);
  if (Tiles::kChunks == 1) key.load(k, at.token, 0);
  grid_dependency_wait();
  const KvState sums = kv_state_of(p.grad_kv_state, at.group, p.head_dim, p.value_dim);
  Operand grads(shared_memory());
  grads.template place<Tiles::kThreads>([&](int k, int n) { return sums(k, n); });
  const float* const vector = place_vector<Tiles, kPadded>(shared_memory() + Operand::kSharedBytes, sums);
  sync_block();
  typename Tiles::Piece out;
  out.each([&](float& x, int, int c) { x = vector[Tiles::Piece::col(c)]; });
  EFFATTN_NOT_UNROLLED
  for (int chunk = 0; chunk < Tiles::kChunks; ++chunk) {
    if (chunk > 0) value.load(v, at.token, chunk * Chunk::kAllCols);
    grads.template multiply_add<false>(out, value, chunk);
  }
  EFFATTN_UNROLL
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    if (Tiles::kChunks > 1) key.load(k, at.token, first);
    key.each([&](float x, int r, int c) {
      if (x <= 0) out.x[r][first / 4 + c] = 0;
    });
  }
  out.store(by_token<T>(p.grad_k, p.groups, at.group, p.tokens, p.head_dim), at.token, 0);
  sync_block();
  grads.template place<Tiles::kThreads>([&](int k, int n) { return sums(n, k); });
  sync_block();
  out.clear();
  EFFATTN_NOT_UNROLLED
  for (int chunk = 0; chunk < Tiles::kChunks; ++chunk) {
    if (Tiles::kChunks > 1) key.load(k, at.token, chunk * Chunk::kAllCols);
    grads.template multiply_add<true>(out, key, chunk);
  }
  out.store(by_token<T>(p.grad_v, p.groups, at.group, p.tokens, p.value_dim), at.token, 0);
}

// --- launches ---------------------------------------------------------------------------------------

struct Backward : LaunchPlan {
  using LaunchPlan::LaunchPlan;

  void gradients_of_queries(const float* kv_state, float* scales) const {
    QueryArgs s = queries(kv_state);
    s.scales = scales;
    s.groups = take({&params.q, &params.grad_out, &params.grad_q}, {&s.q, &s.grad_out, &s.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      using Tiles = TokenTiles<T, padded(), token_major()>;
      launch_tiles<Tiles>(query_gradients<T, padded(), token_major()>, s,
                          Tiles::template Operand<false>::kSharedBytes + Tiles::kVectorBytes, false);
    });
  }

  void gradients_of_keys(const float* grad_kv_state) const {
    KeyArgs s = sizes<KeyArgs>(params.keys);
    s.grad_kv_state = grad_kv_state;
    s.groups =
        take({&params.k, &params.v, &params.grad_k, &params.grad_v}, {&s.k, &s.v, &s.grad_k, &s.grad_v});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      using Tiles = KeyTiles<T, padded(), token_major()>;
      launch_tiles<Tiles>(key_gradients<T, padded(), token_major()>, s,
                          Tiles::template Operand<false>::kSharedBytes + Tiles::kVectorBytes, true);
    });
  }
};

}  // namespace
}  // namespace linear_attention

void backward(const LinearAttentionParams& params, const float* kv_state, const Execution& execution) {
  if (params.groups == 0) return;
  const linear_attention::Backward plan(params, execution);
  float* const scales = execution.workspace(params.groups * params.queries * 2);
  float* const grad_kv_state = execution.workspace(params.groups * params.kv_state_size());
  plan.gradients_of_queries(kv_state, scales);
  plan.accumulate<true>(params.q, params.grad_out, params.queries, scales, grad_kv_state);
  plan.gradients_of_keys(grad_kv_state);
}

}  // namespace effattn::cuda
