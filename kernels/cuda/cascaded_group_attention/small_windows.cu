// Cascaded group attention of narrow types in windows of up to 64 tokens, forward.
//
// A block has the tokens of one window, or of several small ones, in 64 rows, and a warp 16 of these: the
// logits of its queries never leave its registers, where their softmax is the first operand of the product
// with v. Everything else is in shared memory, float32 in two parts of bfloat16. A head's weights are
// prefetched some rows at a time, while those before are multiplied.
#include <type_traits>

#include "../core/launch.h"
#include "../core/narrow_tile.h"
#include "../core/tensors.h"
#include "cascade.h"

namespace effattn::cuda::cascade {
namespace {

constexpr int kRows = 64, kWarps = kRows / 16, kThreads = kWarps * kLanes;
// A row of a window that a thread convolves at once.
constexpr int kMaxWidth = 8;
constexpr float kLog2E = 1.4426950408889634f;

struct SmallWindows {
  Cascade of;
  int weight_rows;  // outputs whose weights are in shared memory at a time, 16 or 32
  int max_taps;     // of a channel
  int query_stride;
  bool by_pairs;  // two neighbouring channels at once
};

// Shared memory: offsets of rows in x and out; operands in two parts; what the convolution reads; weights and
// taps as they are prefetched.
struct Memory {
  int64_t* offsets;
  SplitTile feats, keys, values, queries, weights;
  float *convolved, *prefetched, *taps;

  EFFATTN_DEVICE explicit Memory(const SmallWindows& p)
      : offsets(reinterpret_cast<int64_t*>(shared_memory())),
        feats(SplitTile::in(shared_memory() + 16 * kRows, kRows, p.of.value_dim)),
        keys(SplitTile::in(behind(feats, kRows), kRows, p.of.key_dim)),
        values(SplitTile::in(behind(keys, kRows), kRows, p.of.value_dim)),
        queries(SplitTile::in(behind(values, kRows), kRows, p.of.key_dim)),
        weights(SplitTile::in(behind(queries, kRows), p.weight_rows, p.of.value_dim)),
        convolved(reinterpret_cast<float*>(behind(weights, p.weight_rows))),
        prefetched(convolved + floats(p.of.windows_per_block * p.of.key_dim * p.query_stride)),
        taps(prefetched + floats(p.weight_rows * p.of.value_dim)) {}

  EFFATTN_INLINE static constexpr int64_t bytes(const SmallWindows& p) {
    const Cascade& c = p.of;
    return 16 * kRows + 2 * SplitTile::bytes(kRows, c.value_dim) + 2 * SplitTile::bytes(kRows, c.key_dim) +
           SplitTile::bytes(p.weight_rows, c.value_dim) +
           int64_t{4} *
               (floats(int64_t{c.windows_per_block} * c.key_dim * p.query_stride) +
                floats(int64_t{p.weight_rows} * c.value_dim) + floats(int64_t{c.key_dim} * p.max_taps));
  }

 private:
  EFFATTN_DEVICE static char* behind(const SplitTile& tile, int rows) {
    return reinterpret_cast<char*>(tile.data + 2 * rows * tile.stride);
  }
  // What begins behind is aligned.
  EFFATTN_INLINE static constexpr int64_t floats(int64_t count) { return round_up(count, 4); }
};

// Numbers that follow each other, from memory to shared memory; there after the wait and a barrier.
EFFATTN_DEVICE void prefetch(float* to, const float* from, int count) {
  const int whole = reinterpret_cast<uintptr_t>(from) % 16 == 0 ? count / 4 : 0;
  for_each<kThreads>(whole, [&](int i) { cp_async_16(to + 4 * i, from + 4 * i, true); });
  for_each<kThreads>(count - 4 * whole, [&](int i) { to[4 * whole + i] = from[4 * whole + i]; });
}

// Two neighbouring channels of a pixel, the second one 0 behind the last; and the way back.
template <class T>
struct Pair {
  float first, second;
};
template <class T>
EFFATTN_DEVICE Pair<T> load_pair(const SmallWindows& p, int64_t at, int channel, int channels) {
  const Image& image = p.of.x;
  const T* const from = static_cast<const T*>(image.data) + at + channel * image.channel_stride;
  if (p.by_pairs) {
    const uint32_t both = load_words<Words<1>>(from).words[0];
    return {half_of<T>(both, 0), half_of<T>(both, 1)};
  }
  return {to_float(from[0]), channel + 1 < channels ? to_float(from[image.channel_stride]) : 0.0f};
}
template <class T>
EFFATTN_DEVICE void store_pair(const SmallWindows& p, int64_t at, int channel, int channels, float first,
                               float second) {
  const Image& image = p.of.out;
  T* const to = static_cast<T*>(image.data) + at + channel * image.channel_stride;
  if (p.by_pairs) return store_words(to, Words<1>{{pack<T>(first, second)}});
  to[0] = from_float<T>(first);
  if (channel + 1 < channels) to[image.channel_stride] = from_float<T>(second);
}

// Where the token of each row is in x and in out, negative outside of the image.
template <int kSlot>
EFFATTN_DEVICE void find_offsets(const Cascade& p, int64_t window0, int windows, int64_t* offsets) {
  for_each<kThreads>(kRows, [&](int row) {
    const int token = row % kSlot;
    int64_t pixel = -1, batch = 0;
    if (row / kSlot < windows && token < p.tokens()) {
      const Window window(p, window0 + row / kSlot);
      pixel = window.pixel(p, token);
      batch = window.batch;
    }
    const auto place = [&](const Image& image) {
      return pixel < 0 ? -1 : batch * image.batch_stride + pixel * image.token_stride;
    };
    offsets[row] = place(p.x);
    offsets[kRows + row] = place(p.out);
  });
}

// What the first head takes: its channels of x, a warp its own rows.
template <class T>
EFFATTN_DEVICE void load_feats(const SmallWindows& p, const Memory& memory) {
  const int row = warp_index() * 16 + lane_index() % 16, value_dim = p.of.value_dim;
  const int64_t at = memory.offsets[row];
  for (int c = lane_index() / 16 * 2; c < value_dim; c += 4) {
    Pair<T> x{};
    if (at >= 0) x = load_pair<T>(p, at, c, value_dim);
    memory.feats.put(row, c, x.first, x.second);
  }
}

// The weights of some of a head's outputs.
EFFATTN_DEVICE void prefetch_weights(const SmallWindows& p, const Memory& memory, int head, int first) {
  const int rows = min(p.weight_rows, p.of.outputs() - first), value_dim = p.of.value_dim;
  prefetch(memory.prefetched, p.of.weights[head].qkv + static_cast<int64_t>(first) * value_dim,
           rows * value_dim);
  cp_async_commit();
}
EFFATTN_DEVICE void prefetch_taps(const SmallWindows& p, const Memory& memory, int head) {
  const int kernel = p.of.kernels[head];
  prefetch(memory.taps, p.of.weights[head].depthwise, p.of.key_dim * kernel * kernel);
  cp_async_commit();
}

// What was prefetched, in two parts; zeros behind.
EFFATTN_DEVICE void split_weights(const SmallWindows& p, const Memory& memory, int first) {
  const int rows = p.of.outputs() - first, value_dim = p.of.value_dim;
  const int pairs = static_cast<int>(round_up(value_dim, 16)) / 2;
  for_each<kThreads>(p.weight_rows * pairs, [&](int i) {
    const int row = i / pairs, col = i % pairs * 2;
    const float* const from = memory.prefetched + row * value_dim + col;
    const bool inside = row < rows;
    memory.weights.put(row, col, inside && col < value_dim ? from[0] : 0.0f,
                       inside && col + 1 < value_dim ? from[1] : 0.0f);
  });
}

// A warp's rows of some outputs, to q, k or v.
template <int kSlot>
EFFATTN_DEVICE void project(const SmallWindows& p, const Memory& memory, int head, int first, int windows) {
  const Cascade& c = p.of;
  const int row0 = warp_index() * 16, depth = static_cast<int>(round_up(c.value_dim, 16));
  for (int col0 = 0; col0 < p.weight_rows && first + col0 < c.outputs(); col0 += 16) {
    float sum[2][4] = {};
    EFFATTN_NOT_UNROLLED
    for (int k = 0; k < depth; k += 16) {
      SplitOperand a, b;
      memory.feats.load_a<false>(a, row0, k);
      memory.weights.load_b<false>(b, col0, k);
      mma_m16n16k16_split(sum, a, b);
    }
    EFFATTN_UNROLL
    for (int j = 0; j < 2; ++j) {
      const int output = first + col0 + 8 * j + 2 * col_lane();
      const float* const biases = c.weights[head].qkv_bias;
      float bias[2];
      EFFATTN_UNROLL
      for (int e = 0; e < 2; ++e)
        bias[e] = biases != nullptr && output + e < c.outputs() ? biases[output + e] : 0.0f;
      EFFATTN_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int row = row0 + row_lane() + 8 * half;
        const float x[2] = {sum[j][2 * half] + bias[0], sum[j][2 * half + 1] + bias[1]};
        if (output >= 2 * c.key_dim) {
          // Behind the last channel both factors of the sum are 0.
          if (output < c.outputs()) memory.values.put(row, output - 2 * c.key_dim, x[0], x[1]);
          continue;
        }
        EFFATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int at = output + e, window = row / kSlot;
          if (at >= c.key_dim) {
            memory.keys.put(row, at - c.key_dim, x[e]);
          } else if (window < windows && row % kSlot < c.tokens()) {
            memory.convolved[(window * c.key_dim + at) * p.query_stride + row % kSlot] = x[e];
          }
        }
      }
    }
  }
}

// A row of a window of a channel, as scaled queries.
template <int kKernel>
EFFATTN_DEVICE void convolve_row(const Cascade& c, const float* image, const float* taps, int row, float bias,
                                 const SplitTile& queries, int to_row, int channel) {
  constexpr int halo = kKernel / 2;
  float total[kMaxWidth] = {};
  EFFATTN_NOT_UNROLLED
  for (int i = 0; i < kKernel; ++i) {
    const int at = row + i - halo;
    if (at < 0 || at >= c.window_height) continue;
    float x[kMaxWidth];
    EFFATTN_UNROLL
    for (int e = 0; e < kMaxWidth; ++e) x[e] = e < c.window_width ? image[at * c.window_width + e] : 0.0f;
    EFFATTN_UNROLL
    for (int j = 0; j < kKernel; ++j) {
      const float tap = taps[i * kKernel + j];
      EFFATTN_UNROLL
      for (int e = 0; e < kMaxWidth; ++e) {
        if (e + j - halo >= 0 && e + j - halo < kMaxWidth) total[e] += tap * x[e + j - halo];
      }
    }
  }
  EFFATTN_UNROLL
  for (int e = 0; e < kMaxWidth; ++e) {
    if (e < c.window_width) queries.put(to_row + e, channel, c.scale * (total[e] + bias));
  }
}

template <int kSlot>
EFFATTN_DEVICE void convolve_queries(const SmallWindows& p, const Memory& memory, int head, int windows) {
  const Cascade& c = p.of;
  const int kernel = c.kernels[head];
  const float* const biases = c.weights[head].depthwise_bias;
  const bool by_rows = c.window_width <= kMaxWidth && (kernel == 3 || kernel == 5 || kernel == 7);
  const int of_channel = by_rows ? c.window_height : c.tokens();
  for_each<kThreads>(windows * c.key_dim * of_channel, [&](int i) {
    const int at = i % of_channel, channel = i / of_channel % c.key_dim,
              window = i / (of_channel * c.key_dim);
    const float* const image = memory.convolved + (window * c.key_dim + channel) * p.query_stride;
    const float* const taps = memory.taps + channel * kernel * kernel;
    const float bias = biases != nullptr ? biases[channel] : 0.0f;
    if (by_rows) {
      const int to_row = window * kSlot + at * c.window_width;
      if (kernel == 3) return convolve_row<3>(c, image, taps, at, bias, memory.queries, to_row, channel);
      if (kernel == 5) return convolve_row<5>(c, image, taps, at, bias, memory.queries, to_row, channel);
      return convolve_row<7>(c, image, taps, at, bias, memory.queries, to_row, channel);
    }
    const float total = convolved<1>(c, kernel, taps, image, 1, at, bias);
    memory.queries.put(window * kSlot + at, channel, c.scale * total);
  });
}

// The logits of a warp's queries, as the tiles of a product have them, and then their softmax without its
// division.
template <int kSlot>
struct Logits {
  float x[kSlot / 8][4], inverse[2];

  EFFATTN_DEVICE void compute(const SmallWindows& p, const Memory& memory, int head, int row0,
                              int window_row) {
    const Cascade& c = p.of;
    const int tokens = c.tokens(), depth = static_cast<int>(round_up(c.key_dim, 16));
    EFFATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int token = row0 - window_row + row_lane() + 8 * half;
      const float* const bias =
          c.bias + (static_cast<int64_t>(head) * tokens + min(token, tokens - 1)) * tokens;
      EFFATTN_UNROLL
      for (int j = 0; j < kSlot / 8; ++j) {
        EFFATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          const int key = 8 * j + 2 * col_lane() + e;
          x[j][2 * half + e] = key < tokens ? bias[key] : 0.0f;
        }
      }
    }
    EFFATTN_NOT_UNROLLED
    for (int k = 0; k < depth; k += 16) {
      SplitOperand a;
      memory.queries.load_a<false>(a, row0, k);
      EFFATTN_UNROLL
      for (int j = 0; j < kSlot / 8; j += 2) {
        SplitOperand b;
        memory.keys.load_b<false>(b, window_row + 8 * j, k);
        mma_m16n16k16_split(*reinterpret_cast<float (*)[2][4]>(&x[j]), a, b);
      }
    }
    EFFATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      float largest = -kInfinity, total = 0;
      EFFATTN_UNROLL
      for (int j = 0; j < kSlot / 8; ++j) {
        EFFATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& logit = x[j][2 * half + e];
          if (8 * j + 2 * col_lane() + e >= tokens) logit = -kInfinity;
          largest = larger_or_nan(logit, largest);
        }
      }
      largest = larger_or_nan(shfl_xor(largest, 1), largest);
      largest = larger_or_nan(shfl_xor(largest, 2), largest);
      EFFATTN_UNROLL
      for (int j = 0; j < kSlot / 8; ++j) {
        EFFATTN_UNROLL
        for (int e = 0; e < 2; ++e) {
          float& logit = x[j][2 * half + e];
          total += logit = exp2_approx((logit - largest) * kLog2E);
        }
      }
      inverse[half] = rcp_approx(sum_of_cols(total));
    }
  }
  // Of keys 16 step and the next 15, as the first operand.
  EFFATTN_DEVICE void part(int step, SplitOperand& a) const {
    EFFATTN_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float (&of)[4] = x[2 * step + i / 2];
      a.set(i, of[i % 2 * 2], of[i % 2 * 2 + 1]);
    }
  }

 private:
  EFFATTN_DEVICE static float larger_or_nan(float x, float than) { return x > than || x != x ? x : than; }
};

// A warp's rows of a head's output: to out, and with the next channels of x to what the next head takes.
template <class T, int kSlot>
EFFATTN_DEVICE void attend(const SmallWindows& p, const Memory& memory, int head) {
  const Cascade& c = p.of;
  const int row0 = warp_index() * 16, window_row = row0 / kSlot * kSlot;
  Logits<kSlot> logits;
  logits.compute(p, memory, head, row0, window_row);
  SplitOperand softmax[kSlot / 16];
  EFFATTN_UNROLL
  for (int step = 0; step < kSlot / 16; ++step) logits.part(step, softmax[step]);
  const bool is_last = head + 1 == c.heads;
  EFFATTN_NOT_UNROLLED
  for (int col0 = 0; col0 < c.value_dim; col0 += 16) {
    // Prefetched before the product.
    Pair<T> next[2][2] = {};
    EFFATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int64_t at = memory.offsets[row0 + row_lane() + 8 * half];
      EFFATTN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int channel = col0 + 8 * j + 2 * col_lane();
        if (!is_last && at >= 0 && channel < c.value_dim) {
          next[half][j] = load_pair<T>(p, at, (head + 1) * c.value_dim + channel, (head + 2) * c.value_dim);
        }
      }
    }
    float sum[2][4] = {};
    EFFATTN_UNROLL
    for (int step = 0; step < kSlot / 16; ++step) {
      SplitOperand b;
      memory.values.load_b<true>(b, window_row + 16 * step, col0);
      mma_m16n16k16_split(sum, softmax[step], b);
    }
    EFFATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int row = row0 + row_lane() + 8 * half;
      const int64_t to = memory.offsets[kRows + row];
      EFFATTN_UNROLL
      for (int j = 0; j < 2; ++j) {
        const int channel = col0 + 8 * j + 2 * col_lane();
        if (channel >= c.value_dim) continue;
        const float first = sum[j][2 * half] * logits.inverse[half],
                    second = sum[j][2 * half + 1] * logits.inverse[half];
        if (to >= 0) {
          store_pair<T>(p, to, head * c.value_dim + channel, (head + 1) * c.value_dim, first, second);
        }
        // Tokens of a window beyond the image are not written, but the next head reads them.
        const bool is_token = row - window_row < c.tokens();
        if (!is_last) {
          memory.feats.put(row, channel, is_token ? first + next[half][j].first : 0.0f,
                           is_token && channel + 1 < c.value_dim ? second + next[half][j].second : 0.0f);
        }
      }
    }
  }
}

template <class T, int kSlot>
EFFATTN_KERNEL(kThreads, 2)
small_windows(EFFATTN_PARAMETERS(SmallWindows) p) {
  const Cascade& c = p.of;
  const Memory memory(p);
  const int64_t window0 = block_index() * c.windows_per_block;
  const int windows = static_cast<int>(min(c.windows_per_block, c.windows - window0));
  prefetch_weights(p, memory, 0, 0);
  prefetch_taps(p, memory, 0);
  // Rows and columns that nobody writes are factors of sums all the same.
  const int64_t parts = SplitTile::bytes(kRows, c.value_dim) + SplitTile::bytes(kRows, c.key_dim);
  for_each<kThreads>(static_cast<int>(2 * parts / 16), [&](int i) {
    store_words(reinterpret_cast<char*>(memory.feats.data) + int64_t{16} * i, Words<4>{});
  });
  find_offsets<kSlot>(c, window0, windows, memory.offsets);
  sync_block();
  load_feats<T>(p, memory);
  for (int head = 0; head < c.heads; ++head) {
    for (int first = 0; first < c.outputs(); first += p.weight_rows) {
      cp_async_wait<0>();
      sync_block();
      split_weights(p, memory, first);
      sync_block();
      if (first + p.weight_rows < c.outputs()) {
        prefetch_weights(p, memory, head, first + p.weight_rows);
      } else if (head + 1 < c.heads) {
        prefetch_weights(p, memory, head + 1, 0);
      }
      project<kSlot>(p, memory, head, first, windows);
    }
    sync_block();
    convolve_queries<kSlot>(p, memory, head, windows);
    sync_block();
    if (head + 1 < c.heads) prefetch_taps(p, memory, head + 1);
    attend<T, kSlot>(p, memory, head);
    sync_warp();
  }
}

}  // namespace

bool cascade_of_small_windows(Cascade& c, const Execution& execution) {
  if (c.dtype == DType::kFloat32 || c.tokens() > kRows) return false;
  const int slot = c.tokens() <= 16 ? 16 : c.tokens() <= 32 ? 32 : 64;
  // More windows in a block only where all multiprocessors have one.
  const int64_t enough = ceil_div(c.windows, execution.gpu.multiprocessors);
  c.windows_per_block = static_cast<int>(max(1, min(enough, kRows / slot)));
  SmallWindows p{c, 32, 1, 0, false};
  for (int h = 0; h < c.heads; ++h) p.max_taps = max(p.max_taps, c.kernels[h] * c.kernels[h]);
  p.query_stride = c.tokens() | 1;  // odd, or channels would meet in one bank
  if (Memory::bytes(p) > kMaxSharedBytes) p.weight_rows = 16;
  if (Memory::bytes(p) > kMaxSharedBytes) return false;
  const auto has_pairs = [&](const Image& image) {
    return image.channel_stride == 1 && c.value_dim % 2 == 0 &&
           alignment(image.data, {image.batch_stride, image.token_stride}, c.dtype) > 0;
  };
  p.by_pairs = has_pairs(c.x) && has_pairs(c.out);
  const Grid grid{ceil_div(c.windows, c.windows_per_block), kThreads, Memory::bytes(p)};
  with_dtype(c.dtype, [&](auto type) {
    using T = decltype(type);
    if constexpr (kIsNarrow<T>) {
      launch(slot == 16   ? small_windows<T, 16>
             : slot == 32 ? small_windows<T, 32>
                          : small_windows<T, 64>,
             grid, execution, p);
    }
  });
  return true;
}

}  // namespace effattn::cuda::cascade
