// Products of 16-bit types (bfloat16, float16) on tensor cores, 16 rows by some 16 columns a warp, in steps
// of 16 of the depth (mma_m16n8k16). Sums are float32.
//
// An operand is exact, or each number of it is the sum of two parts of bfloat16.
#pragma once

#include <type_traits>

#include "narrow_tile.h"

namespace effattn::cuda {

// Columns of a product that a warp takes together.
constexpr int kGroupCols = 16;
// Of the depth, what is summed up as one chain: tensor cores round towards zero, by up to 2^-24 a step.
constexpr int kNarrowDepth = 1024;

// A tile as an operand of products (NarrowTile::lane_row), whose address goes on with the depth.
template <int kTileParts, bool kIsFirst, bool kDepthDown>
class TileOperand {
  const uint16_t* at_;
  int step_, across_, part_;  // elements to the next step of the depth, column of the product, part

 public:
  static constexpr int kParts = kTileParts;

  // From a row, or column, of the product on.
  EFFATTN_DEVICE TileOperand(const NarrowTile<kTileParts>& tile, int first)
      : step_(kNarrowStep * (kDepthDown ? tile.stride : 1)),
        across_(kDepthDown ? 1 : tile.stride),
        part_(tile.part) {
    at_ = tile.template lane_row<kIsFirst, kDepthDown>(0, 0) + first * across_;
  }
  // 16 rows or columns, from `first` of them on.
  EFFATTN_DEVICE void load(uint32_t (&x)[kTileParts][4], int first = 0) const {
    EFFATTN_UNROLL
    for (int part = 0; part < kTileParts; ++part) {
      ldmatrix_x4<kDepthDown>(x[part], at_ + part * part_ + first * across_);
    }
  }
  EFFATTN_DEVICE void go_on() { at_ += step_; }
};

// Rows of words with both parts of a number (split_word) as the first operand, in shared or in
// global memory.
class SplitRows {
  const float *upper_, *lower_;

 public:
  static constexpr int kParts = 2;
  // Words from row to row, so that four rows meet in no bank; they are read up to whole steps.
  EFFATTN_INLINE static constexpr int stride(int depth) { return whole_steps(depth) + 8; }

  // 16 rows, from one on that is there; in place of those behind the last, that one.
  EFFATTN_DEVICE SplitRows(const float* from, int64_t stride, int row, int rows) {
    const auto at = [&](int r) { return from + min(r, rows - 1) * stride + 2 * col_lane(); };
    upper_ = at(row + row_lane());
    lower_ = at(row + row_lane() + 8);
  }
  EFFATTN_DEVICE void load(uint32_t (&x)[2][4]) const {
    EFFATTN_UNROLL
    for (int e = 0; e < 4; ++e) {
      const auto pair = shared_words<Words<2>>((e % 2 == 0 ? upper_ : lower_) + e / 2 * 8);
      x[0][e] = high_halves(pair.words[0], pair.words[1]);
      x[1][e] = low_halves(pair.words[0], pair.words[1]);
    }
  }
  EFFATTN_DEVICE void go_on() {
    upper_ += kNarrowStep;
    lower_ += kNarrowStep;
  }
};

// What a warp has of a product, 16 rows by kGroups times 16 columns.
template <int kGroups>
struct NarrowSums {
  float x[kGroups][2][4];

  EFFATTN_DEVICE void clear() {
    each_register(x, [](float& sum) { sum = 0; });
  }
  // Adds them to others, and begins anew; of those that the other one has not, it must have none.
  template <int kOthers>
  EFFATTN_DEVICE void add_to(NarrowSums<kOthers>& others) {
    EFFATTN_UNROLL
    for (int i = 0; i < min(kGroups, kOthers); ++i) {
      EFFATTN_UNROLL
      for (int j = 0; j < 2; ++j) {
        EFFATTN_UNROLL
        for (int e = 0; e < 4; ++e) {  // one register after the other: cleared as a whole, one spills on 8.0
          others.x[i][j][e] += x[i][j][e];
          x[i][j][e] = 0;
        }
      }
    }
  }

  // += a b over the depth, of the first `groups` groups. T: of operands that are exact.
  template <class T, class A, class B>
  EFFATTN_DEVICE void multiply_add(A a, B b, int groups, int depth) {
    constexpr bool exact = A::kParts == 1 && B::kParts == 1;
    static_assert(exact || std::is_same_v<T, BFloat16> || (A::kParts == 2 && B::kParts == 2));
    using Part = std::conditional_t<exact, T, BFloat16>;
    EFFATTN_NOT_UNROLLED
    for (int k = 0; k < depth; k += kNarrowStep, a.go_on(), b.go_on()) {
      uint32_t of_a[A::kParts][4];
      a.load(of_a);
      EFFATTN_UNROLL
      for (int i = 0; i < kGroups; ++i) {
        if (i >= groups) break;
        uint32_t of_b[B::kParts][4];
        b.load(of_b, kGroupCols * i);
        // The small products first. That of two low parts is of one sign with the whole: left out, it would
        // be a bias.
        EFFATTN_UNROLL
        for (int low = A::kParts + B::kParts - 2; low >= 0; --low) {
          EFFATTN_UNROLL
          for (int part = 0; part < A::kParts; ++part) {
            const int other = low - part;
            if (other < 0 || other >= B::kParts) continue;
            EFFATTN_UNROLL
            for (int j = 0; j < 2; ++j) {
              mma_m16n8k16<Part>(x[i][j], of_a[part], {of_b[other][2 * j], of_b[other][2 * j + 1]});
            }
          }
        }
      }
    }
  }

  // f(row) is asked for both rows of a lane; it gives what is asked (col) for each sum of the row, and the
  // sum becomes that.
  template <class F>
  EFFATTN_DEVICE void fill(int row, int col, int groups, F f) {
    each_place(row, col, groups, f, [&](auto& g, int at, int i, int j, int half) {
      EFFATTN_UNROLL
      for (int e = 0; e < 2; ++e) x[i][j][2 * half + e] = g(at + e);
    });
  }
  // The same, with f(col, sums of two neighbours from an even column on, the same of others).
  template <class F>
  EFFATTN_DEVICE void each_pair(const NarrowSums& others, int row, int col, int groups, F f) const {
    each_place(row, col, groups, f, [&](auto& g, int at, int i, int j, int half) {
      const float (&a)[4] = x[i][j], (&b)[4] = others.x[i][j];
      g(at, {a[2 * half], a[2 * half + 1]}, {b[2 * half], b[2 * half + 1]});
    });
  }
  template <class F>
  EFFATTN_DEVICE void each_pair(int row, int col, int groups, F f) const {
    each_place(row, col, groups, f, [&](auto& g, int at, int i, int j, int half) {
      g(at, {x[i][j][2 * half], x[i][j][2 * half + 1]});
    });
  }

 private:
  template <class F, class G>
  EFFATTN_DEVICE static void each_place(int row, int col, int groups, F f, G g) {
    EFFATTN_UNROLL
    for (int half = 0; half < 2; ++half) {
      auto of_row = f(row + row_lane() + 8 * half);
      EFFATTN_UNROLL
      for (int i = 0; i < kGroups; ++i) {
        if (i >= groups) break;
        EFFATTN_UNROLL
        for (int j = 0; j < 2; ++j) g(of_row, col + kGroupCols * i + 8 * j + 2 * col_lane(), i, j, half);
      }
    }
  }
};

}  // namespace effattn::cuda
