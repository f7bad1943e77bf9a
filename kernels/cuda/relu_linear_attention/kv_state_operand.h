// The kv_state of linear attention (S, and z below it) as the second operand of products, in shared memory.
//
// It is split in two parts once, when it is placed, and lies in the order in which a warp's products take it:
// a lane reads what it needs of a step as one vector.
#pragma once

#include <type_traits>

#include "../core/mma.h"

namespace effattn::cuda::linear_attention {

// Number `lane` of a step: both registers of the operand, or both of each part.
template <int kRegisters>
using KvStateWords = Words<kRegisters>;

// In place of a column of the state: z.
constexpr int kZ = -1;

// out += x m, where m(k, n) is what channel k of x gives to channel n of out. Out and In are the fragments of
// both; x comes In::kAllCols channels at a time. kHasVector: beside m there is a vector, m(k), whose product
// with x comes in every column of a tile of its own.
template <class T, class Out, class In, int kDepth, bool kHasVector>
class KvStateOperand {
  // bfloat16 multiplies as it is. float16 does not, since a state may be larger than it holds: in TF32, it is
  // exact.
  static constexpr bool kPairs = std::is_same_v<T, BFloat16>;
  static constexpr int kStepDepth = kPairs ? 16 : 8, kStepRegisters = kStepDepth / 4;
  static constexpr int kSteps = kDepth / kStepDepth, kStepsOfChunk = In::kAllCols / kStepDepth;
  static constexpr int kTiles = Out::kColRegisters / 2, kAllTiles = kTiles + (kHasVector ? 1 : 0);
  static constexpr int64_t kPlaces = int64_t{kSteps} * kAllTiles * kLanes;
  // Where both parts are too large, products split what they read.
  static constexpr bool kSplit = kPairs || 16 * kPlaces <= 48 * 1024;
  static constexpr int kWords = kSplit ? 4 : 2;

  const char* shared_;

 public:
  static constexpr int64_t kSharedBytes = 4 * kWords * kPlaces;

  EFFATTN_DEVICE explicit KvStateOperand(char* shared) : shared_(shared) {}

  // By all threads of a block, and there after a barrier. What stands at (k, n) is the sum of get(row, k, n)
  // over the rows, in their order; put(k, n, sum) is called once with it. n is kZ for the vector.
  template <int kThreads, class Get, class Put>
  EFFATTN_DEVICE void place(int rows, Get get, Put put) const {
    // So many at a time, all of whose loads are in flight together.
    constexpr int kInFlight = 3;
    EFFATTN_NOT_UNROLLED
    for (int begin = 0; begin < kPlaces; begin += kInFlight * kThreads) {
      float x[kInFlight][kStepRegisters] = {};
      const auto each = [&](auto f) {
        EFFATTN_UNROLL
        for (int j = 0; j < kInFlight; ++j) {
          const int place = begin + j * kThreads + thread_index();
          if (begin + j * kThreads >= kPlaces || place >= kPlaces) break;
          const int lane = place % kLanes, tile = place / kLanes % kAllTiles,
                    step = place / (kLanes * kAllTiles);
          const int g = lane / 4, n = tile < kTiles ? Out::col_of(2 * tile + g % 2, g / 2) : kZ;
          f(x[j], place, n, tile == kTiles && g > 0, [&](int i) {
            return step / kStepsOfChunk * In::kAllCols +
                   In::col_of(step % kStepsOfChunk * kStepRegisters + i, lane % 4);
          });
        }
      };
      EFFATTN_NOT_UNROLLED
      for (int row = 0; row < rows; ++row) {
        each([&](float (&of)[kStepRegisters], int, int n, bool, auto channel) {
          EFFATTN_UNROLL
          for (int i = 0; i < kStepRegisters; ++i) of[i] += get(row, channel(i), n);
        });
      }
      each([&](const float (&of)[kStepRegisters], int place, int n, bool is_again, auto channel) {
        EFFATTN_UNROLL
        for (int i = 0; i < kStepRegisters; ++i) {
          if (!is_again) put(channel(i), n, of[i]);
        }
        store_words(const_cast<char*>(shared_) + int64_t{4} * kWords * place, words_of(of));
      });
    }
  }
  template <int kThreads, class Get>
  EFFATTN_DEVICE void place(Get get) const {
    place<kThreads>(1, [&](int, int k, int n) { return get(k, n); }, [](int, int, float) {});
  }

  // Of a chunk of x, or of its relu; along: of each row of out, in lane t's 2 t-th column and the next, what
  // the vector gives.
  template <bool kRelu>
  EFFATTN_DEVICE void multiply_add(Out& out, float (&along)[Out::kRowRegisters / 2][4], const In& x,
                                   int chunk) const {
    constexpr int rows = Out::kRowRegisters / 2;
    EFFATTN_UNROLL
    for (int s = 0; s < kStepsOfChunk; ++s) {
      // In place once, or the compiler copies them to neighbouring registers for every product.
      Part a[rows][4];
      EFFATTN_UNROLL
      for (int i = 0; i < rows; ++i) {
        EFFATTN_UNROLL
        for (int e = 0; e < 4; ++e) a[i][e] = part<kRelu>(x, 2 * i + e % 2, 2 * s + e / 2);
      }
      EFFATTN_UNROLL
      for (int j = 0; j < kAllTiles; ++j) {
        const int step = chunk * kStepsOfChunk + s;
        const auto words = shared_words<KvStateWords<kWords>>(
            shared_ + int64_t{4} * kWords * ((step * kAllTiles + j) * kLanes + lane_index()));
        EFFATTN_UNROLL
        for (int i = 0; i < rows; ++i) {
          if (j == kTiles) {
            multiply(along[i], a[i], words);
            continue;
          }
          float (&upper)[Out::kColRegisters] = out.x[2 * i], (&lower)[Out::kColRegisters] = out.x[2 * i + 1];
          float c[4] = {upper[2 * j], upper[2 * j + 1], lower[2 * j], lower[2 * j + 1]};
          multiply(c, a[i], words);
          upper[2 * j] = c[0];
          upper[2 * j + 1] = c[1];
          lower[2 * j] = c[2];
          lower[2 * j + 1] = c[3];
        }
      }
    }
  }
  template <bool kRelu>
  EFFATTN_DEVICE void multiply_add(Out& out, const In& x, int chunk) const {
    static_assert(!kHasVector);
    float nothing[Out::kRowRegisters / 2][4];
    multiply_add<kRelu>(out, nothing, x, chunk);
  }

 private:
  // A register of an operand.
  using Part = std::conditional_t<kPairs, uint32_t, float>;

  EFFATTN_DEVICE static KvStateWords<kWords> words_of(const float (&x)[kStepRegisters]) {
    if constexpr (kPairs) {
      const BFloat16Parts first = split_bf16(x[0], x[1]), second = split_bf16(x[2], x[3]);
      return {{first.high, second.high, first.low, second.low}};
    } else if constexpr (kSplit && kIsNarrow<T>) {
      const Tf32Parts first = split_tf32(x[0]), second = split_tf32(x[1]);
      return {{bits_of(first.high), bits_of(second.high), bits_of(first.low), bits_of(second.low)}};
    } else if constexpr (kSplit) {
      return {{bits_of(tf32_high(x[0])), bits_of(tf32_high(x[1])), bits_of(tf32_low(x[0])),
               bits_of(tf32_low(x[1]))}};
    } else {
      return {{bits_of(x[0]), bits_of(x[1])}};
    }
  }

  template <bool kRelu>
  EFFATTN_DEVICE static Part part(const In& x, int row, int i) {
    if constexpr (kPairs) {
      return kRelu ? relu_pair<T>(x.pair(row, i)) : x.pair(row, i);
    } else {
      return kRelu ? relu(x.get(row, i)) : x.get(row, i);
    }
  }

  EFFATTN_DEVICE static void multiply(float (&c)[4], const Part (&a)[4], const KvStateWords<kWords>& words) {
    if constexpr (kPairs) {
      mma_m16n8k16<BFloat16>(c, a, {words.words[2], words.words[3]});
      mma_m16n8k16<BFloat16>(c, a, {words.words[0], words.words[1]});
    } else {
      const float b[2] = {float_of(words.words[0]), float_of(words.words[1])};
      if constexpr (!kSplit) {
        mma_m16n8k8_float<In::kExact>(c, a, b);
      } else {
        const float rest[2] = {float_of(words.words[2]), float_of(words.words[3])};
        if constexpr (In::kExact) {
          mma_m16n8k8_tf32(c, a, rest);
          mma_m16n8k8_tf32(c, a, b);
        } else {
          mma_m16n8k8_3xtf32(c, a, b, rest);
        }
      }
    }
  }
};

}  // namespace effattn::cuda::linear_attention
