// ReLU linear attention, forward and backward: a kernel for the sums over tokens, and three for what uses
// them.
//
// Tiles go from memory into registers in the order in which tensor cores take them (fragment.h): nothing of
// q, k and v passes through shared memory, warps wait for nobody, and each tensor is read once.
#include "api.h"

#include "../core/block.h"
#include "../core/limits.h"
#include "../core/reduction.h"
#include "../core/split_float.h"
#include "../core/tensors.h"
#include "kv_state_operand.h"

namespace effattn::cuda {
namespace {

// --- sums over tokens -------------------------------------------------------------------------------

// A warp sums kChunk x kChunk of them over 32 tokens at a time, 16 of float32: more would not fit into
// registers.
template <int kPadded>
struct SumTiles {
  static constexpr int kChunk = least(kPadded, 32);
  static constexpr int kAcross = kPadded / kChunk, kChunks = kAcross * kAcross;
  static constexpr int kWarps = kPadded <= 32 ? 4 : 8;
  static constexpr int kAtOnce = least(kChunks, kWarps), kSlices = kWarps / kAtOnce;
  static constexpr int kTokens = 32, kThreads = kWarps * kLanes;
  static constexpr int kFloats = (kPadded + 1) * kPadded;  // of a slice: the matrix, and below it the vector
  static constexpr int64_t kSharedBytes = int64_t{4} * kSlices * kFloats;
};

struct SumTokens {
  Groups groups;
  View k, v;
  const float* scales;  // of each token two, of k in the matrix and in the vector, or null
  float* sums;          // (groups, parts / cluster, value_dim + 1, head_dim)
  int tokens, head_dim, value_dim;
  Split split;
};

template <class T, int kPadded, bool kTokenMajor>
using ChannelFragment = Fragment<T, SumTiles<kPadded>::kChunk / 8, kVector<T>,
                                 kTokenMajor ? least(kVector<T>, SumTiles<kPadded>::kChunk / 8) : 1,
                                 kTokenMajor ? 1 : kVector<T>, kTokenMajor>;

// Steps of tokens after which narrow types' sums leave the registers: tensor cores round towards zero, and a
// longer chain of sums would fall behind. Even, as the loop is.
constexpr int kStepsOfChain = 32;

// sum v relu(k)^T and sum relu(k) of a narrow type over the tokens of a part that are a warp's, for some
// channels of each. The next tokens are asked for before these are used.
template <class T, int kPadded, bool kTokenMajor, int kAccess, bool kPrefetches>
EFFATTN_DEVICE void sum_chunk(const Matrix<const T>& k, const Matrix<const T>& v, int first_k, int first_v,
                              int begin, int end, int step, float* matrix, float* vector) {
  using Tiles = SumTiles<kPadded>;
  constexpr int rows = Tiles::kChunk / 8;
  using Piece = PairFragment<T, rows, kVector<T>, kTokenMajor ? least(kVector<T>, rows) : 1,
                             kTokenMajor ? 1 : kVector<T>, kTokenMajor>;
  struct Tokens {
    Piece key, value;

    EFFATTN_DEVICE void load(const Matrix<const T>& k, const Matrix<const T>& v, int first_k, int first_v,
                             int token) {
      key.template load_by<kAccess>(k, first_k, token);
      value.template load_by<kAccess>(v, first_v, token);
    }
  };
  const uint32_t one = pack<T>(1, 1), ones[2] = {one, one};
  // By channels of k, then of v; behind these the sum of k, in every column.
  float total[rows / 2][rows + 1][4];
  const auto add = [&](Tokens& now) {
    EFFATTN_UNROLL
    for (int s = 0; s < Piece::kColRegisters / 2; s += 2) {
      EFFATTN_UNROLL
      for (int i = 0; i < rows / 2; ++i) {
        uint32_t a[4];
        EFFATTN_UNROLL
        for (int e = 0; e < 4; ++e) a[e] = relu_pair<T>(now.key.pair(2 * i + e % 2, s + e / 2));
        EFFATTN_UNROLL
        for (int j = 0; j < rows; ++j) {
          const uint32_t b[2] = {now.value.pair(j, s), now.value.pair(j, s + 1)};
          mma_m16n8k16<T>(total[i][j], a, b);
        }
        mma_m16n8k16<T>(total[i][rows], a, ones);
      }
    }
  };
  Tokens even, odd;
  if (kPrefetches && begin < end) even.load(k, v, first_k, first_v, begin);
  int token = begin;
  do {
    EFFATTN_UNROLL
    for (auto& of_key : total) {
      EFFATTN_UNROLL
      for (auto& tile : of_key) {
        EFFATTN_UNROLL
        for (float& x : tile) x = 0;
      }
    }
    const bool is_first = token == begin;
    const int chain_end = least(end, token + kStepsOfChain * step);
    EFFATTN_NOT_UNROLLED
    while (token < chain_end) {
      if constexpr (kPrefetches) {
        if (token + step < end) odd.load(k, v, first_k, first_v, token + step);
        add(even);
        token += step;
        if (token >= chain_end) break;
        if (token + step < end) even.load(k, v, first_k, first_v, token + step);
        add(odd);
      } else {
        even.load(k, v, first_k, first_v, token);
        add(even);
      }
      token += step;
    }
    constexpr int neighbours = kTokenMajor ? least(kVector<T>, rows) : 1;
    EFFATTN_UNROLL
    for (int i = 0; i < rows / 2; ++i) {
      EFFATTN_UNROLL
      for (int e = 0; e < 4; ++e) {
        const int col = first_k + Piece::row(2 * i + e / 2);
        EFFATTN_UNROLL
        for (int j = 0; j < rows; ++j) {
          float& sum = matrix[(first_v + position<neighbours, 8>(j, 2 * col_lane() + e % 2)) * kPadded + col];
          sum = total[i][j][e] + (is_first ? 0.0f : sum);
        }
        if (first_v == 0 && col_lane() == 0 && e % 2 == 0) {
          vector[col] = total[i][rows][e] + (is_first ? 0.0f : vector[col]);
        }
      }
    }
  } while (token < end);
}

// sum v relu(k)^T and sum relu(k) over a part of the tokens, in `shared`, whole after a barrier.
template <class T, int kPadded, bool kTokenMajor, bool kVectors>
EFFATTN_DEVICE void sum_narrow_part(const SumTokens& p, int64_t group, int part, float* shared) {
  using Tiles = SumTiles<kPadded>;
  const Matrix<const T> k = by_channel<const T>(p.k, p.groups, group, p.tokens, p.head_dim);
  const Matrix<const T> v = by_channel<const T>(p.v, p.groups, group, p.tokens, p.value_dim);
  const int slice = warp_index() / Tiles::kAtOnce;
  float* const matrix = shared + slice * Tiles::kFloats;
  const int begin = part * p.split.part_tokens + slice * Tiles::kTokens,
            end = least((part + 1) * p.split.part_tokens, p.tokens);
  // Whole vectors are inside or outside of both.
  const auto whole = [](const Matrix<const T>& m) {
    constexpr int along = kTokenMajor ? least(kVector<T>, Tiles::kChunk / 8) : kVector<T>;
    return (kTokenMajor ? m.rows : m.cols) % along == 0 ? m.access : 0;
  };
  const int access = least(whole(k), whole(v));
  for (int chunk = warp_index() % Tiles::kAtOnce; chunk < Tiles::kChunks; chunk += Tiles::kAtOnce) {
    const int first_v = chunk / Tiles::kAcross * Tiles::kChunk,
              first_k = chunk % Tiles::kAcross * Tiles::kChunk;
    const auto sum = [&](auto bytes) {
      sum_chunk<T, kPadded, kTokenMajor, bytes(), kVectors>(k, v, first_k, first_v, begin, end,
                                                            Tiles::kSlices * Tiles::kTokens, matrix,
                                                            matrix + kPadded * kPadded);
    };
    if (kVectors || access == 16) {
      sum(std::integral_constant<int, 16>{});
    } else if (access == 4) {
      sum(std::integral_constant<int, 4>{});
    } else {
      sum(std::integral_constant<int, 0>{});
    }
  }
}

// The same of float32, and of any type with scales, whose products with k are no numbers of a narrow type.
template <class T, int kPadded, bool kTokenMajor, bool kScaled>
EFFATTN_DEVICE void sum_wide_part(const SumTokens& p, int64_t group, int part, float* shared) {
  using Tiles = SumTiles<kPadded>;
  using Piece = ChannelFragment<T, kPadded, kTokenMajor>;
  constexpr int rows = Tiles::kChunk / 8, cols = Piece::kColRegisters;
  const Matrix<const T> k = by_channel<const T>(p.k, p.groups, group, p.tokens, p.head_dim);
  const Matrix<const T> v = by_channel<const T>(p.v, p.groups, group, p.tokens, p.value_dim);
  const int begin = part * p.split.part_tokens, end = least(begin + p.split.part_tokens, p.tokens);
  const int slice = warp_index() / Tiles::kAtOnce;
  float* const mine = shared + slice * Tiles::kFloats;
  for (int chunk = warp_index() % Tiles::kAtOnce; chunk < Tiles::kChunks; chunk += Tiles::kAtOnce) {
    const int first_v = chunk / Tiles::kAcross * Tiles::kChunk,
              first_k = chunk % Tiles::kAcross * Tiles::kChunk;
    float total[rows / 2][rows][4] = {}, keys[rows] = {};
    for (int token = begin + slice * Piece::kAllCols; token < end;
         token += Tiles::kSlices * Piece::kAllCols) {
      Piece key, value;
      key.load(k, first_k, token);
      value.load(v, first_v, token);
      key.relu();
      float of_matrix[cols], of_vector[cols];
      if constexpr (kScaled) {
        EFFATTN_UNROLL
        for (int c = 0; c < cols; ++c) {
          const int at = token + Piece::col(c);
          const Words<2> two =
              at < p.tokens ? load_words<Words<2>>(p.scales + 2 * (group * p.tokens + at)) : Words<2>{};
          of_matrix[c] = float_of(two.words[0]);
          of_vector[c] = float_of(two.words[1]);
        }
      }
      key.each([&](float& x, int r, int c) {
        keys[r] += kScaled ? x * of_vector[c] : x;
        // Not of v: where k is zero its scale may be so large that v times it is infinite.
        if constexpr (kScaled) x *= of_matrix[c];
      });
      // From zero, since tensor cores round towards it: a long sum would fall behind.
      float tile[rows / 2][rows][4] = {};
      EFFATTN_UNROLL
      for (int s = 0; s < cols; s += 2) {
        EFFATTN_UNROLL
        for (int j = 0; j < rows; ++j) {
          const float b[2] = {key.x[j][s], key.x[j][s + 1]};
          EFFATTN_UNROLL
          for (int i = 0; i < rows / 2; ++i) {
            const float a[4] = {value.x[2 * i][s], value.x[2 * i + 1][s], value.x[2 * i][s + 1],
                                value.x[2 * i + 1][s + 1]};
            multiply<Piece::kExact, Piece::kExact && !kScaled>(tile[i][j], a, b);
          }
        }
      }
      EFFATTN_UNROLL
      for (int i = 0; i < rows / 2; ++i) {
        EFFATTN_UNROLL
        for (int j = 0; j < rows; ++j) {
          EFFATTN_UNROLL
          for (int e = 0; e < 4; ++e) total[i][j][e] += tile[i][j][e];
        }
      }
    }
    constexpr int neighbours = kTokenMajor ? least(kVector<T>, rows) : 1;
    EFFATTN_UNROLL
    for (int j = 0; j < rows; ++j) {
      EFFATTN_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int col = first_k + position<neighbours, 8>(j, 2 * col_lane() + e);
        EFFATTN_UNROLL
        for (int r = 0; r < rows; ++r) {
          mine[(first_v + Piece::row(r)) * kPadded + col] = total[r / 2][j][r % 2 * 2 + e];
        }
      }
      const float sum = sum_of_cols(keys[j]);
      if (first_v == 0 && col_lane() == 0) mine[kPadded * kPadded + first_k + Piece::row(j)] = sum;
    }
  }
}

enum class Sum { kPlain, kVectors, kScaled };

template <class T, int kPadded, bool kTokenMajor, Sum kKind>
EFFATTN_DEVICE void sum_part(const SumTokens& p, int64_t group, int part, float* shared) {
  if constexpr (kIsNarrow<T> && kKind != Sum::kScaled) {
    sum_narrow_part<T, kPadded, kTokenMajor, kKind == Sum::kVectors>(p, group, part, shared);
  } else {
    sum_wide_part<T, kPadded, kTokenMajor, kKind == Sum::kScaled>(p, group, part, shared);
  }
}

// Where number i of a group's sums stands in shared memory.
template <int kPadded>
EFFATTN_DEVICE int shared_place(int i, int head_dim, int value_dim) {
  const int row = i / head_dim, col = i % head_dim;
  return (row == value_dim ? kPadded : row) * kPadded + col;
}

// The slices of a block's sums, f(number, where it stands in the first slice, sum).
template <int kPadded, class F>
EFFATTN_DEVICE void each_sum(float* shared, int head_dim, int value_dim, F f) {
  using Tiles = SumTiles<kPadded>;
  for (int i = thread_index(); i < (value_dim + 1) * head_dim; i += Tiles::kThreads) {
    float* const at = shared + shared_place<kPadded>(i, head_dim, value_dim);
    float total = *at;
    for (int slice = 1; slice < Tiles::kSlices; ++slice) total += at[slice * Tiles::kFloats];
    f(i, at, total);
  }
}

// The sums of all blocks of a cluster: f(number, sum), each in one of the blocks.
template <int kPadded, class F>
EFFATTN_DEVICE void each_sum_of_cluster(float* shared, int cluster, int head_dim, int value_dim, F f) {
  each_sum<kPadded>(shared, head_dim, value_dim, [](int, float* at, float total) { *at = total; });
  sum_of_cluster<SumTiles<kPadded>::kThreads>(
      cluster, (value_dim + 1) * head_dim,
      [&](int i) { return shared + shared_place<kPadded>(i, head_dim, value_dim); }, f);
}

template <class T, int kPadded, bool kTokenMajor, Sum kKind>
EFFATTN_KERNEL(SumTiles<kPadded>::kThreads, 1)
sum_tokens(EFFATTN_PARAMETERS(SumTokens) p) {
  float* const shared = reinterpret_cast<float*>(shared_memory());
  const int64_t group = block_index() / p.split.parts;
  const int part = static_cast<int>(block_index() % p.split.parts), cluster = p.split.cluster;
  sum_part<T, kPadded, kTokenMajor, kKind>(p, group, part, shared);
  grid_dependency_launch();
  sync_block();
  float* const to = p.sums + (group * p.split.rows() + part / cluster) * (p.value_dim + 1) * p.head_dim;
  if (cluster == 1) {
    each_sum<kPadded>(shared, p.head_dim, p.value_dim, [&](int i, float*, float total) { to[i] = total; });
  } else {
    each_sum_of_cluster<kPadded>(shared, cluster, p.head_dim, p.value_dim,
                                 [&](int i, float total) { to[i] = total; });
  }
}

// --- what uses the sums, a token a row --------------------------------------------------------------

// Rows of a tile are tokens: vectors of them in channel-major, so many in token-major that registers suffice.
// kVectors: of a narrow type, all of whose vectors can be accessed at once.
template <class T, int kPadded, bool kTokenMajor, bool kVectors = false, int kMostRows = 8,
          int kMostAtATime = 8>
struct TokenTiles {
  static constexpr int kWarps = SumTiles<kPadded>::kWarps, kThreads = kWarps * kLanes;
  static constexpr int kWantedRows = kPadded <= 32 ? kVector<T> : most(2, kVector<T> * 32 / kPadded);
  static constexpr int kRows = kTokenMajor ? least(kWantedRows, kMostRows) : kWantedRows;
  static constexpr int kCols = kPadded / 4;
  static constexpr int kTokens = kWarps * 8 * kRows;  // of a block
  // Of a multiprocessor, for what loads vectors: enough of them in flight for memory.
  static constexpr int kBlocks = kPadded > 32 ? 1 : kPadded > 16 ? (std::is_same_v<T, Float16> ? 2 : 3) : 4;
  static constexpr int kRowVector = kTokenMajor ? 1 : least(kVector<T>, kRows);
  // Two columns at least are neighbours: so the registers of a result are those of an operand.
  static constexpr int kColVector = kTokenMajor ? least(kVector<T>, kCols) : 2;
  // A result with all its channels, and what is loaded at a time: all of it where that is vectors, else less,
  // where the result takes most registers.
  static constexpr bool kWhole = kVectors && (std::is_same_v<T, BFloat16> || kPadded <= 64);
  static constexpr int kOfWide = std::is_same_v<T, BFloat16> || (kIsNarrow<T> && kTokenMajor) ? 8 : 4;
  static constexpr int kAtATime = kWhole ? kCols : least(kCols, kPadded >= 64 ? kOfWide : kMostAtATime);
  using Piece = Fragment<T, kRows, kCols, kRowVector, kColVector, !kTokenMajor>;
  using Chunk =
      std::conditional_t<kIsNarrow<T>, PairFragment<T, kRows, kAtATime, kRowVector, kColVector, !kTokenMajor>,
                         Fragment<T, kRows, kAtATime, kRowVector, kColVector, !kTokenMajor>>;
  static constexpr int kChunks = kCols / kAtATime;

  template <bool kHasVector>
  using Operand = StateOperand<T, Piece, Chunk, kPadded, kHasVector>;
  static constexpr int64_t kVectorBytes = 4 * kPadded;
};

// Where the state of a group is: S, a row a channel of v, and z below.
struct State {
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

struct Queries {
  Groups groups;
  View q, grad_out, out;  // out: of the backward grad_q
  const float* sums;      // (groups, rows, value_dim + 1, head_dim), to be added up over the rows
  int rows;
  float* keep;    // what they add up to, or null
  float* scales;  // backward: of each token two, by what the gradients of the sums take it
  int tokens, head_dim, value_dim;
  uint32_t tiles;      // blocks of a group
  int tiles_of_block;  // of tokens, one after the other
  float eps;
};

// The first tile of tokens of a warp in a launch over all groups.
template <class Tiles>
struct Place {
  int64_t group;
  int token;

  EFFATTN_DEVICE explicit Place(uint32_t blocks, int tiles_of_block = 1) {
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

// The output of a warp's tile of queries, of which the first chunk has been asked for; that of the tile at
// `next` is asked for in its place, if it is below `end`.
template <class T, int kPadded, bool kTokenMajor, bool kVectors>
EFFATTN_DEVICE void attend_tile(
    const Queries& p,
    const typename TokenTiles<T, kPadded, kTokenMajor, kVectors>::template Operand<true>& state,
    const Matrix<const T>& q, const Matrix<T>& to, int token, int next, int end,
    typename TokenTiles<T, kPadded, kTokenMajor, kVectors>::Chunk& query) {
  using Tiles = TokenTiles<T, kPadded, kTokenMajor, kVectors>;
  typename Tiles::Piece out;
  out.clear();
  float denominator[Tiles::kRows / 2][4] = {};
  EFFATTN_NOT_UNROLLED
  for (int chunk = 0; chunk < Tiles::kChunks; ++chunk) {
    if (chunk > 0) load_queries<kVectors>(query, q, token, chunk);
    state.template multiply_add<true>(out, denominator, query, chunk);
  }
  float inverse[Tiles::kRows];
  EFFATTN_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) {
    const float x = divisible(denominator[r / 2][r % 2 * 2] + p.eps);
    inverse[r] = kIsNarrow<T> ? approximate_inverse(x) : 1 / x;
  }
  out.each([&](float& x, int r, int) { x *= inverse[r]; });
  // While this one's are stored, where there are registers for both.
  if (kVectors && next < end) load_queries<kVectors>(query, q, next, 0);
  out.template store<kVectors>(to, token, 0);
  if (!kVectors && next < end) load_queries<kVectors>(query, q, next, 0);
}

template <class T, int kPadded, bool kTokenMajor, bool kVectors>
EFFATTN_KERNEL((TokenTiles<T, kPadded, kTokenMajor, kVectors>::kThreads),
               (kVectors ? TokenTiles<T, kPadded, kTokenMajor, kVectors>::kBlocks : 1))
attend(EFFATTN_PARAMETERS(Queries) p) {
  using Tiles = TokenTiles<T, kPadded, kTokenMajor, kVectors>;
  const Place<Tiles> at(p.tiles, p.tiles_of_block);
  typename Tiles::Chunk query;
  const Matrix<const T> q = by_token<const T>(p.q, p.groups, at.group, p.tokens, p.head_dim);
  load_queries<kVectors>(query, q, at.token, 0);
  typename Tiles::template Operand<true> state(shared_memory());
  grid_dependency_wait();
  State sums{p.sums, p.head_dim, p.value_dim};
  sums.data += at.group * p.rows * sums.floats();
  float* const keep = p.keep != nullptr && static_cast<uint32_t>(block_index()) % p.tiles == 0
                          ? p.keep + at.group * sums.floats()
                          : nullptr;
  state.template place<Tiles::kThreads>(
      p.rows,
      [&](int row, int k, int n) {
        return sums.has(n, k) ? sums.data[row * sums.floats() + sums.index(n, k)] : 0.0f;
      },
      [&](int k, int n, float sum) {
        if (keep != nullptr && sums.has(n, k)) keep[sums.index(n, k)] = sum;
      });
  sync_block();
  const Matrix<T> out = by_token<T>(p.out, p.groups, at.group, p.tokens, p.value_dim);
  const int end = least(at.token + p.tiles_of_block * Tiles::kTokens, p.tokens);
  EFFATTN_NOT_UNROLLED
  for (int token = at.token; token < end; token += Tiles::kTokens) {
    attend_tile<T, kPadded, kTokenMajor, kVectors>(p, state, q, out, token, token + Tiles::kTokens, end,
                                                   query);
  }
}

// All of it for a group in one cluster, where its tokens are few: a launch less, or two.
struct AtOnce {
  SumTokens keys;
  Queries queries;  // of the same groups
  float* sums;      // to keep, or null
};

template <class T, int kPadded, bool kTokenMajor>
struct AtOnceTiles : TokenTiles<T, kPadded, kTokenMajor> {
  using Tokens = TokenTiles<T, kPadded, kTokenMajor>;
  using Sums = SumTiles<kPadded>;
  // Where a block's share of the cluster's sums stands, behind the slices of its own; behind it all of them.
  static constexpr int kShare = Sums::kSlices * Sums::kFloats, kAll = (kShare + Sums::kFloats + 3) / 4 * 4;
  static constexpr int64_t kSharedBytes = 4 * kAll + Tokens::template Operand<true>::kSharedBytes;
};

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((TokenTiles<T, kPadded, kTokenMajor>::kThreads), 1)
attend_at_once(EFFATTN_PARAMETERS(AtOnce) p) {
  using Tiles = AtOnceTiles<T, kPadded, kTokenMajor>;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  float* const share = shared + Tiles::kShare;
  const SumTokens& keys = p.keys;
  const int cluster = keys.split.cluster, rank = cluster_rank();
  const int64_t group = block_index() / cluster;
  sum_part<T, kPadded, kTokenMajor, Sum::kPlain>(keys, group, rank, shared);
  sync_block();
  const auto keep = [&](int i, float total) {
    share[i] = total;
    if (p.sums != nullptr) p.sums[group * (keys.value_dim + 1) * keys.head_dim + i] = total;
  };
  if (cluster == 1) {
    each_sum<kPadded>(shared, keys.head_dim, keys.value_dim,
                      [&](int i, float*, float total) { keep(i, total); });
    sync_block();
  } else {
    each_sum_of_cluster<kPadded>(shared, cluster, keys.head_dim, keys.value_dim, keep);
  }
  const Matrix<const T> q =
      by_token<const T>(p.queries.q, p.queries.groups, group, p.queries.tokens, p.queries.head_dim);
  const int first = rank * Tiles::kTokens + warp_index() * Tiles::Piece::kAllRows;
  typename Tiles::Chunk query;  // comes while the sums are added up
  load_queries<false>(query, q, first, 0);
  typename Tiles::template Operand<true> state(shared_memory() + 4 * Tiles::kAll);
  const State sums{share, keys.head_dim, keys.value_dim};
  state.template place<Tiles::kThreads>([&](int k, int n) {
    if (!sums.has(n, k)) return 0.0f;
    const int i = sums.index(n, k);
    return cluster == 1 ? share[i] : of_cluster(share + i, i / Tiles::kThreads % cluster);
  });
  sync_block();
  const Matrix<T> out =
      by_token<T>(p.queries.out, p.queries.groups, group, p.queries.tokens, p.queries.value_dim);
  const int step = cluster * Tiles::kTokens;
  for (int token = first; token < p.queries.tokens; token += step) {
    attend_tile<T, kPadded, kTokenMajor, false>(p.queries, state, q, out, token, token + step,
                                                p.queries.tokens, query);
  }
  if (cluster > 1) sync_cluster();
}

// The vector of a state in shared memory.
template <class Tiles, int kPadded>
EFFATTN_DEVICE const float* place_vector(char* shared, const State& sums) {
  float* const vector = reinterpret_cast<float*>(shared);
  for (int channel = thread_index(); channel < kPadded; channel += Tiles::kThreads) {
    vector[channel] = sums(kZ, channel);
  }
  return vector;
}

EFFATTN_DEVICE State state_of(const float* data, int64_t group, int head_dim, int value_dim) {
  return {data + group * (value_dim + 1) * head_dim, head_dim, value_dim};
}

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((TokenTiles<T, kPadded, kTokenMajor>::kThreads), 1)
query_gradients(EFFATTN_PARAMETERS(Queries) p) {
  using Tiles = TokenTiles<T, kPadded, kTokenMajor>;
  using Chunk = typename Tiles::Chunk;
  using Operand = typename Tiles::template Operand<false>;
  const Place<Tiles> at(p.tiles);
  const Matrix<const T> q = by_token<const T>(p.q, p.groups, at.group, p.tokens, p.head_dim);
  const Matrix<const T> grad_out = by_token<const T>(p.grad_out, p.groups, at.group, p.tokens, p.value_dim);
  Chunk grad, query;
  grad.load(grad_out, at.token, 0);
  Operand state(shared_memory());
  const State sums = state_of(p.sums, at.group, p.head_dim, p.value_dim);
  state.template place<Tiles::kThreads>([&](int k, int n) { return sums(k, n); });
  const float* const vector = place_vector<Tiles, kPadded>(shared_memory() + Operand::kSharedBytes, sums);
  sync_block();
  typename Tiles::Piece of_sums;
  of_sums.clear();
  EFFATTN_NOT_UNROLLED
  for (int chunk = 0; chunk < Tiles::kChunks; ++chunk) {
    if (chunk > 0) grad.load(grad_out, at.token, chunk * Chunk::kAllCols);
    state.template multiply_add<false>(of_sums, grad, chunk);
  }
  float inverse[Tiles::kRows] = {}, along[Tiles::kRows] = {};
  EFFATTN_UNROLL
  for (int first = 0; first < kPadded; first += Chunk::kAllCols) {
    query.load(q, at.token, first);
    query.relu();
    query.each([&](float x, int r, int c) {
      inverse[r] += x * vector[first + Chunk::col(c)];
      along[r] += x * of_sums.x[r][first / 4 + c];
    });
  }
  EFFATTN_UNROLL
  for (int r = 0; r < Tiles::kRows; ++r) {
    inverse[r] = 1 / divisible(sum_of_cols(inverse[r]) + p.eps);
    // -grad . out, with out = relu(q) . sums / denominator
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
      float& gradient = of_sums.x[r][first / 4 + c];
      gradient = x <= 0 ? 0.0f : (gradient + along[r] * vector[first + Chunk::col(c)]) * inverse[r];
    });
  }
  of_sums.store(by_token<T>(p.out, p.groups, at.group, p.tokens, p.head_dim), at.token, 0);
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

struct Keys {
  Groups groups;
  View k, v, grad_k, grad_v;
  const float* grad_sums;
  int tokens, head_dim, value_dim;
  uint32_t tiles;
};

template <class T, int kPadded, bool kTokenMajor>
using KeyTiles = TokenTiles<T, kPadded, kTokenMajor, false, 4, kTokenMajor ? 8 : 4>;

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((KeyTiles<T, kPadded, kTokenMajor>::kThreads), 1)
key_gradients(EFFATTN_PARAMETERS(Keys) p) {
  using Tiles = KeyTiles<T, kPadded, kTokenMajor>;
  using Chunk = typename Tiles::Chunk;
  using Operand = typename Tiles::template Operand<false>;
  const Place<Tiles> at(p.tiles);
  const Matrix<const T> k = by_token<const T>(p.k, p.groups, at.group, p.tokens, p.head_dim);
  const Matrix<const T> v = by_token<const T>(p.v, p.groups, at.group, p.tokens, p.value_dim);
  Chunk value, key;
  value.load(v, at.token, 0);
  if (Tiles::kChunks == 1) key.load(k, at.token, 0);
  grid_dependency_wait();
  const State sums = state_of(p.grad_sums, at.group, p.head_dim, p.value_dim);
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

// When a cluster does all of a group: its blocks are more while they have so many tokens each and the launch
// has fewer blocks than this, and have no more tokens than that. By argument, not by measurement.
constexpr int64_t kTokensAtOnce = 256, kBlocksAtOnce = 256, kMostTokensAtOnce = 512;
// Tiles of queries that a block takes one after the other, so that the state is placed once for them, while
// blocks are more than so many: a few for each multiprocessor of the largest cards.
constexpr int64_t kTilesOfBlock = 4, kBlocksOfTiles = 792;
// Rows of sums that queries add up themselves: each block reads them, so more of them are worth a launch.
constexpr int kMostSummands = 8;
// Channels of a head: the sums stand three times in shared memory, and wider ones take more registers than
// there are.
constexpr int kMostAtOnce = 32;

const RegisteredOperator registered("relu_linear_attention",
                                    {{"channels", kMostChannels}, {"dimensions", kMostGroups + 2}});

// What the launches of a call share.
class Call {
 public:
  Call(const LinearAttentionParams& problem, const Execution& execution)
      : p_(problem), execution_(execution) {
    const int64_t most = max(problem.head_dim, problem.value_dim);
    if (most > kMostChannels) {
      throw std::runtime_error("effattn: the kernels take heads of up to " + std::to_string(kMostChannels) +
                               " channels, not " + std::to_string(most));
    }
    for (const int64_t tokens : {problem.queries, problem.keys}) {
      if (tokens > INT32_MAX / 2) {
        throw std::runtime_error("effattn: the kernels take up to 2^30 tokens, not " +
                                 std::to_string(tokens));
      }
    }
    // The memory order of the first tensor is that of the others, where one can be said to be.
    const Operand& first = problem.queries > 0 ? problem.q : problem.k;
    token_major_ = first.channel_stride == 1 && (first.token_stride != 1 || problem.head_dim == 1);
  }

  // Points views at operands; all tensors of a launch have the same groups.
  template <int kCount>
  Groups take(const Operand* const (&operands)[kCount], View* const (&views)[kCount]) const {
    Groups groups;
    merge(p_.lead_sizes, p_.lead_rank, operands, views, kCount, groups);
    for (View* view : views) view->access = access_of(*view, groups.rank, token_major_, p_.dtype);
    return groups;
  }

  // Fills `sums` with those over the tokens of k and v; or returns summands, rows of each group, which are
  // few enough for who reads them to add them up.
  struct Summands {
    const float* data;
    int rows;
  };
  Summands sum_over(const Operand& k, const Operand& v, int64_t tokens, const float* scales, float* sums,
                    int most_rows = 1) const {
    Summands summands{sums, 1};
    SumTokens s = keys(tokens);
    s.groups = take({&k, &v}, {&s.k, &s.v});
    s.scales = scales;
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      using Tiles = SumTiles<padded()>;
      s.split = split(p_.groups, tokens, Tiles::kTokens * Tiles::kSlices, execution_.card);
      const int64_t rows = s.split.rows();
      s.sums = rows == 1 && sums != nullptr ? sums : execution_.workspace(p_.groups * rows * p_.sums_size());
      auto kernel = scales == nullptr ? sum_tokens<T, padded(), token_major(), Sum::kPlain>
                                      : sum_tokens<T, padded(), token_major(), Sum::kScaled>;
      if constexpr (kIsNarrow<T>) {
        if (scales == nullptr && by_vectors(tokens, s.k, s.v)) {
          kernel = sum_tokens<T, padded(), token_major(), Sum::kVectors>;
        }
      }
      const Grid grid{p_.groups * s.split.parts, Tiles::kThreads, Tiles::kSharedBytes, s.split.cluster};
      launch(kernel, grid, execution_, s);
      if (rows <= most_rows) {
        summands = {s.sums, static_cast<int>(rows)};
      } else {
        if (sums == nullptr) summands.data = sums = execution_.workspace(p_.groups * p_.sums_size());
        add_up(s.sums, sums, p_.groups, rows, p_.sums_size(), execution_);
      }
    });
    return summands;
  }

  // Whether a group's tokens are few enough for one cluster, and how large that is; 0 if not.
  int cluster_at_once() const {
    const int64_t tokens = max(p_.queries, p_.keys);
    if (max(p_.head_dim, p_.value_dim) > kMostAtOnce) return 0;
    const int64_t blocks = min(ceil_div(tokens, kTokensAtOnce), ceil_div(kBlocksAtOnce, p_.groups));
    const int cluster = cluster_of(blocks, execution_.card);
    return tokens <= kMostTokensAtOnce * cluster ? cluster : 0;
  }

  void attend_at_once_to(int cluster, float* sums) const {
    AtOnce s{keys(p_.keys), queries(nullptr), sums};
    s.keys.groups = s.queries.groups =
        take({&p_.k, &p_.v, &p_.q, &p_.out}, {&s.keys.k, &s.keys.v, &s.queries.q, &s.queries.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      if constexpr (padded() <= kMostAtOnce) {
        using Tiles = AtOnceTiles<T, padded(), token_major()>;
        // Whole tiles: what a warp loads at a time is of one part.
        const int64_t part = round_up(ceil_div(p_.keys, cluster), SumTiles<padded()>::kTokens);
        s.keys.split = {static_cast<int>(part), cluster, cluster};
        s.queries.tiles = static_cast<uint32_t>(ceil_div(p_.queries, Tiles::kTokens));
        launch(attend_at_once<T, padded(), token_major()>,
               {p_.groups * cluster, Tiles::kThreads, Tiles::kSharedBytes, cluster}, execution_, s);
      }
    });
  }

  // `keep`: where the sums go that the summands add up to, or null.
  void attend_to(const Summands& summands, float* keep) const {
    Queries s = queries(summands.data);
    s.rows = summands.rows;
    s.keep = summands.rows > 1 ? keep : nullptr;
    s.groups = take({&p_.q, &p_.out}, {&s.q, &s.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      const auto launch_by = [&](auto vectors) {
        using Tiles = TokenTiles<T, padded(), token_major(), vectors()>;
        const int64_t tiles = p_.groups * ceil_div(s.tokens, Tiles::kTokens);
        s.tiles_of_block = static_cast<int>(max(1, min(kTilesOfBlock, tiles / kBlocksOfTiles)));
        launch_tiles<Tiles>(attend<T, padded(), token_major(), vectors()>, s,
                            Tiles::template Operand<true>::kSharedBytes, true, s.tiles_of_block);
      };
      if constexpr (kIsNarrow<T>) {
        if (by_vectors(p_.queries, s.q, s.out)) return launch_by(std::true_type{});
      }
      launch_by(std::false_type{});
    });
  }

  void gradients_of_queries(const float* sums, float* scales) const {
    Queries s = queries(sums);
    s.scales = scales;
    s.groups = take({&p_.q, &p_.grad_out, &p_.grad_q}, {&s.q, &s.grad_out, &s.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      using Tiles = TokenTiles<T, padded(), token_major()>;
      launch_tiles<Tiles>(query_gradients<T, padded(), token_major()>, s,
                          Tiles::template Operand<false>::kSharedBytes + Tiles::kVectorBytes, false);
    });
  }

  void gradients_of_keys(const float* grad_sums) const {
    Keys s{};
    s.grad_sums = grad_sums;
    s.tokens = static_cast<int>(p_.keys);
    s.head_dim = static_cast<int>(p_.head_dim);
    s.value_dim = static_cast<int>(p_.value_dim);
    s.groups = take({&p_.k, &p_.v, &p_.grad_k, &p_.grad_v}, {&s.k, &s.v, &s.grad_k, &s.grad_v});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      using Tiles = KeyTiles<T, padded(), token_major()>;
      launch_tiles<Tiles>(key_gradients<T, padded(), token_major()>, s,
                          Tiles::template Operand<false>::kSharedBytes + Tiles::kVectorBytes, true);
    });
  }

 private:
  template <class F>
  void with_instance(F f) const {
    with_dtype(p_.dtype, [&](auto type) {
      with_channels(max(p_.head_dim, p_.value_dim), [&](auto padded) {
        if (token_major_) {
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
        token_major_ ? p_.head_dim % vector == 0 && p_.value_dim % vector == 0 : tokens % vector == 0;
    return is_whole && a.access == 16 && b.access == 16;
  }

  SumTokens keys(int64_t tokens) const {
    SumTokens s{};
    s.tokens = static_cast<int>(tokens);
    s.head_dim = static_cast<int>(p_.head_dim);
    s.value_dim = static_cast<int>(p_.value_dim);
    return s;
  }

  Queries queries(const float* sums) const {
    Queries s{};
    s.sums = sums;
    s.tokens = static_cast<int>(p_.queries);
    s.head_dim = static_cast<int>(p_.head_dim);
    s.value_dim = static_cast<int>(p_.value_dim);
    s.eps = p_.eps;
    return s;
  }

  // is_dependent: on the launch in front, which is of sums.
  template <class Tiles, class Kernel, class Parameters>
  void launch_tiles(Kernel kernel, Parameters& s, int64_t shared_bytes, bool is_dependent,
                    int tiles_of_block = 1) const {
    const int64_t tiles = ceil_div(s.tokens, Tiles::kTokens * tiles_of_block);
    s.tiles = static_cast<uint32_t>(tiles);
    launch(kernel, {p_.groups * tiles, Tiles::kThreads, shared_bytes, 1, is_dependent}, execution_, s);
  }

  const LinearAttentionParams& p_;
  const Execution& execution_;
  bool token_major_;
};

}  // namespace

void forward(const LinearAttentionParams& problem, float* sums, const Execution& execution) {
  if (problem.groups == 0) return;
  const Call call(problem, execution);
  if (const int cluster = call.cluster_at_once(); cluster > 0) return call.attend_at_once_to(cluster, sums);
  // Without queries nobody adds them up.
  const int most = problem.queries > 0 ? kMostSummands : 1;
  const auto summands = call.sum_over(problem.k, problem.v, problem.keys, nullptr, sums, most);
  call.attend_to(summands, sums);
}

void sum_keys(const LinearAttentionParams& problem, float* sums, const Execution& execution) {
  if (problem.groups == 0) return;
  Call(problem, execution).sum_over(problem.k, problem.v, problem.keys, nullptr, sums);
}

void backward(const LinearAttentionParams& problem, const float* sums, const Execution& execution) {
  if (problem.groups == 0) return;
  const Call call(problem, execution);
  float* const scales = execution.workspace(problem.groups * problem.queries * 2);
  float* const grad_sums = execution.workspace(problem.groups * problem.sums_size());
  call.gradients_of_queries(sums, scales);
  call.sum_over(problem.q, problem.grad_out, problem.queries, scales, grad_sums);
  call.gradients_of_keys(grad_sums);
}

}  // namespace effattn::cuda
