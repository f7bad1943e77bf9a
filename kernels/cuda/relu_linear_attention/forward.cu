// ReLU linear attention, forward: a kernel for the kv_state, and one for the queries that use it; or one for
// both.
#include "api.h"

#include "../core/limits.h"
#include "launch_plan.h"

namespace effattn::cuda {
namespace linear_attention {
namespace {

// The output of a warp's tile of queries, of which the first chunk has been asked for; that of the tile at
// `next` is asked for in its place, if it is below `end`.
template <class T, int kPadded, bool kTokenMajor, bool kVectors>
EFFATTN_DEVICE void attend_tile(
    const QueryArgs& p,
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
    const float x = clamp_subnormal(denominator[r / 2][r % 2 * 2] + p.eps);
    inverse[r] = kIsNarrow<T> ? rcp_approx(x) : 1 / x;
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
attend(EFFATTN_PARAMETERS(QueryArgs) p) {
  using Tiles = TokenTiles<T, kPadded, kTokenMajor, kVectors>;
  const TileCoord<Tiles> at(p.tiles, p.tiles_of_block);
  typename Tiles::Chunk query;
  const Matrix<const T> q = by_token<const T>(p.q, p.groups, at.group, p.tokens, p.head_dim);
  load_queries<kVectors>(query, q, at.token, 0);
  typename Tiles::template Operand<true> state(shared_memory());
  grid_dependency_wait();
  KvState rows{p.kv_state, p.head_dim, p.value_dim};
  rows.data += at.group * p.rows * rows.floats();
  float* const keep = p.keep != nullptr && static_cast<uint32_t>(block_index()) % p.tiles == 0
                          ? p.keep + at.group * rows.floats()
                          : nullptr;
  state.template place<Tiles::kThreads>(
      p.rows,
      [&](int row, int k, int n) {
        return rows.has(n, k) ? rows.data[row * rows.floats() + rows.index(n, k)] : 0.0f;
      },
      [&](int k, int n, float sum) {
        if (keep != nullptr && rows.has(n, k)) keep[rows.index(n, k)] = sum;
      });
  sync_block();
  const Matrix<T> out = by_token<T>(p.out, p.groups, at.group, p.tokens, p.value_dim);
  const int end = min(at.token + p.tiles_of_block * Tiles::kTokens, p.tokens);
  EFFATTN_NOT_UNROLLED
  for (int token = at.token; token < end; token += Tiles::kTokens) {
    attend_tile<T, kPadded, kTokenMajor, kVectors>(p, state, q, out, token, token + Tiles::kTokens, end,
                                                   query);
  }
}

// Both kernels in one, a group a cluster, where its tokens are few: a launch less, or two.
struct ClusterArgs {
  KvStateArgs keys;
  QueryArgs queries;  // of the same groups
  float* keep;        // where the kv_state goes, or null
};

template <class T, int kPadded, bool kTokenMajor>
struct ClusterTiles : TokenTiles<T, kPadded, kTokenMajor> {
  using Tokens = TokenTiles<T, kPadded, kTokenMajor>;
  using State = KvStateTiles<kPadded>;
  // Shared memory: the slices of the block's sums, its share of the cluster's, the kv_state as an operand.
  static constexpr int kShare = State::kSlices * State::kFloats, kAll = (kShare + State::kFloats + 3) / 4 * 4;
  static constexpr int64_t kSharedBytes = 4 * kAll + Tokens::template Operand<true>::kSharedBytes;
};

template <class T, int kPadded, bool kTokenMajor>
EFFATTN_KERNEL((TokenTiles<T, kPadded, kTokenMajor>::kThreads), 1)
attend_in_cluster(EFFATTN_PARAMETERS(ClusterArgs) p) {
  using Tiles = ClusterTiles<T, kPadded, kTokenMajor>;
  float* const shared = reinterpret_cast<float*>(shared_memory());
  float* const share = shared + Tiles::kShare;
  const KvStateArgs& keys = p.keys;
  const int cluster = keys.split.cluster, rank = cluster_rank();
  const int64_t group = block_index() / cluster;
  accumulate_part<T, kPadded, kTokenMajor, Variant::kPlain>(keys, group, rank, shared);
  sync_block();
  const auto keep = [&](int i, float total) {
    share[i] = total;
    if (p.keep != nullptr) p.keep[group * (keys.value_dim + 1) * keys.head_dim + i] = total;
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
  const KvState sums{share, keys.head_dim, keys.value_dim};
  state.template place<Tiles::kThreads>([&](int k, int n) {
    if (!sums.has(n, k)) return 0.0f;
    const int i = sums.index(n, k);
    return cluster == 1 ? share[i] : load_dsmem(share + i, i / Tiles::kThreads % cluster);
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

// --- launches ---------------------------------------------------------------------------------------

const RegisteredOperator registered("relu_linear_attention",
                                    {{"channels", kMaxChannels}, {"dimensions", kMaxGroups + 2}});

// When a cluster does all of a group: its blocks are more while they have so many tokens each and the launch
// has fewer blocks than this, and have no more tokens than that. By argument, not by measurement.
constexpr int64_t kTokensOfBlock = 256, kBlocksOfClusters = 256, kMaxTokensOfBlock = 512;
// Tiles of queries that a block takes one after the other, so that the kv_state is placed once for them,
// while blocks are more than so many: a few for each multiprocessor of the largest GPUs.
constexpr int64_t kTilesOfBlock = 4, kBlocksOfTiles = 792;
// Rows that each block of queries adds up to the kv_state itself; more of them are worth a launch.
constexpr int kMaxRows = 8;
// Channels of a head that a cluster does: the kv_state stands three times in shared memory, and wider ones
// take more registers than there are.
constexpr int kMaxInCluster = 32;

struct Forward : LaunchPlan {
  using LaunchPlan::LaunchPlan;

  // Whether a group's tokens are few enough for one cluster, and how large that is; 0 if not.
  int cluster_of_group() const {
    const int64_t tokens = max(params.queries, params.keys);
    if (max(params.head_dim, params.value_dim) > kMaxInCluster) return 0;
    const int64_t blocks = min(ceil_div(tokens, kTokensOfBlock), ceil_div(kBlocksOfClusters, params.groups));
    const int cluster = cluster_of(blocks, execution.gpu);
    return tokens <= kMaxTokensOfBlock * cluster ? cluster : 0;
  }

  void attend_in_clusters(int cluster, float* keep) const {
    ClusterArgs s{sizes<KvStateArgs>(params.keys), queries(nullptr), keep};
    s.keys.groups = s.queries.groups = take({&params.k, &params.v, &params.q, &params.out},
                                            {&s.keys.k, &s.keys.v, &s.queries.q, &s.queries.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      if constexpr (padded() <= kMaxInCluster) {
        using Tiles = ClusterTiles<T, padded(), token_major()>;
        // Whole tiles: what a warp loads at a time is of one part.
        const int64_t part = round_up(ceil_div(params.keys, cluster), KvStateTiles<padded()>::kTokens);
        s.keys.split = {static_cast<int>(part), cluster, cluster};
        s.queries.tiles = static_cast<uint32_t>(ceil_div(params.queries, Tiles::kTokens));
        launch(attend_in_cluster<T, padded(), token_major()>,
               {params.groups * cluster, Tiles::kThreads, Tiles::kSharedBytes, cluster}, execution, s);
      }
    });
  }

  // `keep`: where the kv_state goes that the rows add up to, or null.
  void attend_to(const Rows& rows, float* keep) const {
    QueryArgs s = queries(rows.data);
    s.rows = rows.count;
    s.keep = rows.count > 1 ? keep : nullptr;
    s.groups = take({&params.q, &params.out}, {&s.q, &s.out});
    with_instance([&](auto type, auto padded, auto token_major) {
      using T = decltype(type);
      const auto launch_by = [&](auto vectors) {
        using Tiles = TokenTiles<T, padded(), token_major(), vectors()>;
        const int64_t tiles = params.groups * ceil_div(s.tokens, Tiles::kTokens);
        s.tiles_of_block = static_cast<int>(max(1, min(kTilesOfBlock, tiles / kBlocksOfTiles)));
        launch_tiles<Tiles>(attend<T, padded(), token_major(), vectors()>, s,
                            Tiles::template Operand<true>::kSharedBytes, true, s.tiles_of_block);
      };
      if constexpr (kIsNarrow<T>) {
        if (by_vectors(params.queries, s.q, s.out)) return launch_by(std::true_type{});
      }
      launch_by(std::false_type{});
    });
  }
};

}  // namespace
}  // namespace linear_attention

void forward(const LinearAttentionParams& params, float* kv_state, const Execution& execution) {
  if (params.groups == 0) return;
  const linear_attention::Forward plan(params, execution);
  if (const int cluster = plan.cluster_of_group(); cluster > 0)
    return plan.attend_in_clusters(cluster, kv_state);
  // Without queries nobody adds them up.
  const int max_rows = params.queries > 0 ? linear_attention::kMaxRows : 1;
  plan.attend_to(plan.accumulate<false>(params.k, params.v, params.keys, nullptr, kv_state, max_rows),
                 kv_state);
}

void make_kv_state(const LinearAttentionParams& params, float* kv_state, const Execution& execution) {
  if (params.groups == 0) return;
  linear_attention::Forward(params, execution)
      .accumulate<false>(params.k, params.v, params.keys, nullptr, kv_state);
}

}  // namespace effattn::cuda
