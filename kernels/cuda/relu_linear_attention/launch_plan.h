// What the launches of linear attention share: the tiles of tokens, a row a token, that kernels take with a
// kv_state, and how a call is launched.
#pragma once

#include "../core/launch.h"
#include "kv_state.h"
#include "kv_state_operand.h"

namespace effattn::cuda::linear_attention {

// Rows of a tile are tokens: vectors of them in channel-major, so many in token-major that registers suffice.
// kVectors: of a narrow type, all of whose vectors can be accessed at once.
template <class T, int kPadded, bool kTokenMajor, bool kVectors = false, int kMaxRows = 8,
          int kMaxAtATime = 8>
struct TokenTiles {
  static constexpr int kWarps = KvStateTiles<kPadded>::kWarps, kThreads = kWarps * kLanes;
  static constexpr int kWantedRows = kPadded <= 32 ? kVector<T> : max(2, kVector<T> * 32 / kPadded);
  static constexpr int kRows = kTokenMajor ? min(kWantedRows, kMaxRows) : kWantedRows;
  static constexpr int kCols = kPadded / 4;
  static constexpr int kTokens = kWarps * 8 * kRows;  // of a block
  // Of a multiprocessor, for what loads vectors: enough of them in flight for memory.
  static constexpr int kBlocks = kPadded > 32 ? 1 : kPadded > 16 ? (std::is_same_v<T, Float16> ? 2 : 3) : 4;
  static constexpr int kRowVector = kTokenMajor ? 1 : min(kVector<T>, kRows);
  // Two columns at least are neighbours: so the registers of a result are those of an operand.
  static constexpr int kColVector = kTokenMajor ? min(kVector<T>, kCols) : 2;
  // A result with all its channels, and what is loaded at a time: all of it where that is vectors, else less,
  // where the result takes most registers.
  static constexpr bool kWhole = kVectors && (std::is_same_v<T, BFloat16> || kPadded <= 64);
  static constexpr int kOfWide = std::is_same_v<T, BFloat16> || (kIsNarrow<T> && kTokenMajor) ? 8 : 4;
  static constexpr int kAtATime = kWhole ? kCols : min(kCols, kPadded >= 64 ? kOfWide : kMaxAtATime);
  using Piece = Fragment<T, kRows, kCols, kRowVector, kColVector, !kTokenMajor>;
  using Chunk = std::conditional_t<kIsNarrow<T>,
                                   PackedFragment<T, kRows, kAtATime, kRowVector, kColVector, !kTokenMajor>,
                                   Fragment<T, kRows, kAtATime, kRowVector, kColVector, !kTokenMajor>>;
  static constexpr int kChunks = kCols / kAtATime;

  template <bool kHasVector>
  using Operand = KvStateOperand<T, Piece, Chunk, kPadded, kHasVector>;
  static constexpr int64_t kVectorBytes = 4 * kPadded;
};

// Where the kv_state of a group is: S, a row a channel of v, and z below.
struct KvState {
  const float* data;
  int head_dim, value_dim;

  EFFATTN_DEVICE int floats() const { return (value_dim + 1) * head_dim; }
  EFFATTN_DEVICE bool has(int value, int channel) const { return value < value_dim && channel < head_dim; }
  EFFATTN_DEVICE int index(int value, int channel) const {
    return (value == kZ ? value_dim : value) * head_dim + channel;
  }
  EFFATTN_DEVICE float operator()(int value, int channel) const {
    return has(value, channel) ? data[index(value, channel)] : 0.0f;
  }
};

struct QueryArgs {
  Groups groups;
  View q, grad_out, out;  // out: of the backward grad_q
  const float* kv_state;  // (groups, rows, value_dim + 1, head_dim), to be added up over the rows
  int rows;
  float* keep;    // what they add up to, or null
  float* scales;  // backward: of each query two, by which the gradients of the kv_state take it
  int tokens, head_dim, value_dim;
  uint32_t tiles;      // blocks of a group
  int tiles_of_block;  // of tokens, one after the other
  float eps;
};

// The first tile of tokens of a warp in a launch over all groups.
template <class Tiles>
struct TileCoord {
  int64_t group;
  int token;

  EFFATTN_DEVICE explicit TileCoord(uint32_t blocks, int tiles_of_block = 1) {
    const uint32_t index = static_cast<uint32_t>(block_index());
    group = index / blocks;
    token = static_cast<int>(index % blocks) * tiles_of_block * Tiles::kTokens +
            warp_index() * Tiles::Piece::kAllRows;
  }
};

// A chunk of queries. kVectors: of a narrow type, all of whose vectors can be accessed at once.
template <bool kVectors, class T, class Chunk>
EFFATTN_DEVICE void load_queries(Chunk& query, const Matrix<const T>& q, int token, int chunk) {
  if constexpr (kVectors) {
    query.template load<true>(q, token, chunk * Chunk::kAllCols);
  } else {
    query.load(q, token, chunk * Chunk::kAllCols);
  }
}

// What the launches of a call share.
struct LaunchPlan {
  const LinearAttentionParams& params;
  const Execution& execution;
  bool token_major;

  LaunchPlan(const LinearAttentionParams& p, const Execution& e) : params(p), execution(e) {
    const int64_t channels = max(params.head_dim, params.value_dim),
                  tokens = max(params.queries, params.keys);
    require(channels <= kMaxChannels, "the kernels take heads of up to ", kMaxChannels, " channels, not ",
            channels);
    require(tokens <= INT32_MAX / 2, "the kernels take up to 2^30 tokens, not ", tokens);
    // The memory order of the first tensor is that of the others, where one can be said to be.
    const Operand& first = params.queries > 0 ? params.q : params.k;
    token_major = first.channel_stride == 1 && (first.token_stride != 1 || params.head_dim == 1);
  }

  // Points views at operands; all tensors of a launch have the same groups.
  template <int kCount>
  Groups take(const Operand* const (&operands)[kCount], View* const (&views)[kCount]) const {
    Groups groups;
    merge(params.lead_sizes, params.lead_rank, operands, views, kCount, groups);
    for (View* view : views) view->access = access_of(*view, groups.rank, token_major, params.dtype);
    return groups;
  }

  // Fills `kv_state` with that of k and v; or returns up to max_rows rows a group, which their readers add
  // up. kScaled: each token of k counts by `scales`.
  struct Rows {
    const float* data;
    int count;
  };
  template <bool kScaled>
  Rows accumulate(const Operand& k, const Operand& v, int64_t tokens, const float* scales, float* kv_state,
                  int max_rows = 1) const {
    Rows result{kv_state, 1};
    KvStateArgs s = sizes<KvStateArgs>(tokens);
    s.groups = take({&k, &v}, {&s.k, &s.v});
    s.scales = scales;
    with_instance([&](auto type, auto padded, auto by_token) {
      using T = decltype(type);
      using Tiles = KvStateTiles<padded()>;
      s.split = split_tokens(params.groups, tokens, Tiles::kTokens * Tiles::kSlices, execution.gpu);
      const int64_t rows = s.split.rows();
      s.kv_state = rows == 1 && kv_state != nullptr
                       ? kv_state
                       : execution.workspace(params.groups * rows * params.kv_state_size());
      auto kernel = accumulate_kv_state < T, padded(), by_token(),
           kScaled ? Variant::kScaled : Variant::kPlain > ;
      if constexpr (kIsNarrow<T> && !kScaled) {
        if (by_vectors(tokens, s.k, s.v)) {
          kernel = accumulate_kv_state<T, padded(), by_token(), Variant::kVectors>;
        }
      }
      const Grid grid{params.groups * s.split.parts, Tiles::kThreads, Tiles::kSharedBytes, s.split.cluster};
      launch(kernel, grid, execution, s);
      if (rows <= max_rows) {
        result = {s.kv_state, static_cast<int>(rows)};
      } else {
        if (kv_state == nullptr)
          result.data = kv_state = execution.workspace(params.groups * params.kv_state_size());
        add_up(s.kv_state, kv_state, params.groups, rows, params.kv_state_size(), execution);
      }
    });
    return result;
  }

  // f(type, padded channels, whether token-major), as types.
  template <class F>
  void with_instance(F f) const {
    with_dtype(params.dtype, [&](auto type) {
      with_channels(max(params.head_dim, params.value_dim), [&](auto padded) {
        if (token_major) {
          f(type, padded, std::true_type{});
        } else {
          f(type, padded, std::false_type{});
        }
      });
    });
  }

  // Whether all that is next to each other in memory is whole vectors, and aligned.
  bool by_vectors(int64_t tokens, const View& a, const View& b) const {
    constexpr int vector = kVector<BFloat16>;
    const bool is_whole =
        token_major ? params.head_dim % vector == 0 && params.value_dim % vector == 0 : tokens % vector == 0;
    return is_whole && a.access == 16 && b.access == 16;
  }

  // A kernel's arguments without its tensors.
  template <class Args>
  Args sizes(int64_t tokens) const {
    Args args{};
    args.tokens = static_cast<int>(tokens);
    args.head_dim = static_cast<int>(params.head_dim);
    args.value_dim = static_cast<int>(params.value_dim);
    return args;
  }
  QueryArgs queries(const float* kv_state) const {
    QueryArgs s = sizes<QueryArgs>(params.queries);
    s.kv_state = kv_state;
    s.eps = params.eps;
    return s;
  }

  // is_dependent: on the launch in front, which makes the kv_state.
  template <class Tiles, class Kernel, class Parameters>
  void launch_tiles(Kernel kernel, Parameters& s, int64_t shared_bytes, bool is_dependent,
                    int tiles_of_block = 1) const {
    const int64_t tiles = ceil_div(s.tokens, Tiles::kTokens * tiles_of_block);
    s.tiles = static_cast<uint32_t>(tiles);
    launch(kernel, {params.groups * tiles, Tiles::kThreads, shared_bytes, 1, is_dependent}, execution, s);
  }
};

}  // namespace effattn::cuda::linear_attention
