// How a program is run on images of one size: which steps are taken together, in which parts, and where every
// value lies.
//
// A pass is a run of steps that a thread takes part by part, so that what lies between the steps stays in its
// cache. Parts are slices of channels of whole images, or tiles of images with all their channels; of a
// tile's inner values a few rows are kept, and going down the image each row is made once. Large images go by
// tiles, small ones, whose weights are many, by slices.
#pragma once

#include "program.h"
#include "ukernels.h"

namespace effattn::cpu {

// Rows, or columns, [begin, end).
struct Span {
  int64_t begin, end;
};
// Those of a step's input that a span of its result is made of; outside of the image lie zeros.
inline Span input_span(const BlockStep& step, const Span& out) {
  return {out.begin * step.stride - step.padding, (out.end - 1) * step.stride - step.padding + step.kernel};
}
// Part i of n that differ by one at most.
inline Span part_of(int64_t size, int64_t n, int64_t i) { return {size * i / n, size * (i + 1) / n}; }
inline Span clipped(const Span& span, int64_t size) { return {max(span.begin, 0), min(span.end, size)}; }

// What a part of a pass makes of a value: of what lies outside of the image, zeros.
struct PartSpans {
  Span rows{}, cols{};
};

// A value of the program.
struct ValuePlan {
  BlockSize size;
  int64_t blocks;         // of channels
  int64_t border = 0;     // columns of zeros on either side
  bool is_local = false;  // of a thread, or whole
  // Offset in floats into the thread's memory, or into that of an image; strides in floats.
  int64_t offset = 0, row_stride = 0, block_stride = 0;
  int64_t rows = 0;  // that are kept: row y lies in place y % rows

  int64_t pixels() const { return size.height * size.width; }
};

struct PassPlan {
  enum class Parts { kSlices, kTiles, kWhole };
  int first = 0, last = 0;  // steps
  Parts parts = Parts::kWhole;
  int64_t slice_blocks = 0;              // kSlices
  int64_t tile_rows = 0, tile_cols = 0;  // kTiles: of the last value, at most
  int64_t down = 0, across = 0;          // kTiles: how many
  int64_t units = 0;                     // of an image
  int64_t unit_work = 0;                 // multiply-adds
  int64_t local_floats = 0;
};

// Whether a step's result is made of whole images, not of parts.
bool is_of_whole_images(const BlockStep& step);

class EFFATTN_EXPORT BlockPlan {
 public:
  BlockPlan(const BlockProgram& program, const BlockSize& size, int64_t batch, int threads);

  // The program's with kLoad in front and kStore behind; value i is the result of step i.
  std::vector<BlockStep> steps;
  std::vector<ValuePlan> values;
  std::vector<PassPlan> passes;
  int64_t image_floats = 0;  // of an image's whole values
  int64_t zero_floats = 0;   // of a row of zeros, as long as any

  // What a step reads.
  template <class F>
  void for_inputs(const BlockStep& step, const F& f) const {
    for (const int input : step.inputs) f(input);
    if (step.residual != BlockStep::kNone) f(step.residual);
    if (step.addend != BlockStep::kNone) f(step.addend);
  }

  // Of every value of a pass, from its first on: what a part of its last value is made of.
  void spans_of_part(const PassPlan& pass, Span rows, Span cols, PartSpans* spans) const;

 private:
  int64_t work_of_row(int step) const;
  int last_of_tiles(int first) const;
  int last_of_slices(int first) const;
  int64_t floats_of_weights(int step) const;
  void add_pass(int first, int64_t batch, int threads);
  double cost_of_tiles(const PassPlan& pass, int64_t batch, int threads) const;
  double cost_of_slices(const PassPlan& pass, int last, int64_t batch, int threads) const;
  PassPlan by_slices(int first) const;
  PassPlan by_tiles(int first, int last, int64_t batch, int threads);
  void place_local(PassPlan& pass);
  void place_whole();
};

}  // namespace effattn::cpu
