// Tiles of tokens in shared memory, as floats, for products that read them many times.
#pragma once

#include "block.h"

namespace effattn::cuda {

// Channels that are staged at once, at most.
constexpr int kTileChannels = 128;

// to[row][col] of some rows and columns of a matrix; what is behind its last row is 0. Vectors are 16 bytes
// along the dimension that is contiguous; `access` says whether they are aligned from the matrix's beginning
// on.
template <int kThreads, class T>
EFFATTN_DEVICE void stage_tile(const Matrix<const T>& from, int first_row, int rows, int first_col, int cols,
                               float* to, int stride) {
  constexpr int vector = kVector<T>;
  const bool along_cols = from.col_stride == 1;
  const int first = along_cols ? first_col : first_row;  // of the dimension that is contiguous
  const int count = along_cols ? cols : rows, others = along_cols ? rows : cols;
  const int whole = from.access == 16 && first % vector == 0
                        ? min(count, (along_cols ? from.cols : from.rows) - first) / vector
                        : 0;
  for_each<kThreads>(others * max(whole, 0), [&](int i) {
    const int other = i / whole, at = i % whole * vector;
    const int row = along_cols ? other : at, col = along_cols ? at : other;
    Packed<T, vector> packed{};
    if (first_row + row < from.rows) {
      packed.template load<16>(from.data + (first_row + row) * from.row_stride +
                               (first_col + col) * from.col_stride);
    }
    EFFATTN_UNROLL
    for (int e = 0; e < vector; ++e)
      to[(along_cols ? row : row + e) * stride + (along_cols ? col + e : col)] = packed.get(e);
  });
  const int done = max(whole, 0) * vector, rest = count - done;
  for_each<kThreads>(others * rest, [&](int i) {
    const int other = i / rest, at = done + i % rest;
    const int row = along_cols ? other : at, col = along_cols ? at : other;
    const bool inside = first_row + row < from.rows;
    to[row * stride + col] =
        inside
            ? to_float(from.data[(first_row + row) * from.row_stride + (first_col + col) * from.col_stride])
            : 0.0f;
  });
}

// The way back, within the matrix's rows.
template <int kThreads, class T>
EFFATTN_DEVICE void unstage_tile(const float* from, int stride, const Matrix<T>& to, int first_row, int rows,
                                 int first_col, int cols) {
  constexpr int vector = kVector<T>;
  const bool along_cols = to.col_stride == 1;
  rows = min(rows, to.rows - first_row);
  const int first = along_cols ? first_col : first_row, count = along_cols ? cols : rows;
  const int others = along_cols ? rows : cols,
            whole = to.access == 16 && first % vector == 0 ? count / vector : 0;
  const auto place = [&](int row, int col) {
    return to.data + (first_row + row) * to.row_stride + (first_col + col) * to.col_stride;
  };
  for_each<kThreads>(others * whole, [&](int i) {
    const int other = i / whole, at = i % whole * vector;
    const int row = along_cols ? other : at, col = along_cols ? at : other;
    Packed<T, vector> packed;
    EFFATTN_UNROLL
    for (int e = 0; e < vector; ++e)
      packed.set(e, from[(along_cols ? row : row + e) * stride + (along_cols ? col + e : col)]);
    packed.template store<16>(place(row, col));
  });
  const int done = whole * vector, rest = count - done;
  for_each<kThreads>(others * rest, [&](int i) {
    const int other = i / rest, at = done + i % rest;
    const int row = along_cols ? other : at, col = along_cols ? at : other;
    *place(row, col) = from_float<T>(from[row * stride + col]);
  });
}

}  // namespace effattn::cuda
