// The schedules of multi-scale aggregation and attention: which group goes through which passes, where.
//
// Forward, each head of each scale is a group of linear attention: its keys and values are aggregated strip
// by strip for the sums, its queries for the output, so each channel is aggregated once and nothing is kept
// or computed again. Backward, a thread takes a head with all its scales, since their gradients meet in the
// same channels of qkv; it aggregates again what the forward pass did not keep.
#include "launch.h"

namespace effattn::cpu {
namespace {

// --- gradients of weights ---------------------------------------------------------------------------------

// The gradients of all weights, once for each image of the batch, so that threads never add to the same.
class WeightGradients {
 public:
  explicit WeightGradients(const MultiScaleParams& p) : p_(p), channels_(3 * p.heads * p.head_dim) {
    for (int s = 0; s < p.scales; ++s) for_parts(s, [&](float*, int64_t count) { floats_ += count; });
    memory_ = aligned_floats(p.batch * floats_);
    clear(memory_.get(), p.batch * floats_);
  }

  ScaleWeights<float> of(int64_t batch, int scale, int64_t group) const {
    float* at = memory_.get() + batch * floats_;
    for (int s = 0; s < scale; ++s) for_parts(s, [&](float*, int64_t count) { at += count; });
    float* parts[4] = {};
    int i = 0;
    for_parts(scale, [&](float* wanted, int64_t count) {
      parts[i++] = wanted == nullptr ? nullptr : at;
      at += count;
    });
    return of_group(ScaleWeights<float>{parts[0], parts[1], parts[2], parts[3]}, p_.kernels[scale],
                    p_.head_dim, group);
  }

  // Adds up the images in order, into the gradients that the problem asks for.
  void finish() const {
    const float* at = memory_.get();
    for (int s = 0; s < p_.scales; ++s) {
      for_parts(s, [&](float* to, int64_t count) {
        if (count > 0 && p_.batch == 0) clear(to, count);
        for (int64_t b = 0; b < p_.batch && count > 0; ++b) {
          const float* const part = at + b * floats_;
          b == 0 ? copy(to, part, count) : add(to, part, count);
        }
        at += count;
      });
    }
  }

 private:
  // Calls f(where it goes, floats) for each of a scale's gradients; none where there is no bias.
  template <class F>
  void for_parts(int scale, const F& f) const {
    const ScaleWeights<float>& to = p_.gradients[scale];
    f(to.depthwise, channels_ * p_.kernels[scale] * p_.kernels[scale]);
    f(to.pointwise, channels_ * p_.head_dim);
    f(to.depthwise_bias, to.depthwise_bias == nullptr ? 0 : channels_);
    f(to.pointwise_bias, to.pointwise_bias == nullptr ? 0 : channels_);
  }

  const MultiScaleParams& p_;
  int64_t channels_, floats_ = 0;
  Floats memory_;
};

}  // namespace

MultiScalePlan plan(const MultiScaleParams& p) {
  const Call call(p);
  MultiScalePlan plan;
  plan.rows = call.rows;
  plan.scratch_floats = call.attend_floats();
  plan.scratch_floats_backward = call.attend_backward_floats();
  plan.flops_aggregation = 2 * p.batch * aggregation_work(p, 3 * p.heads * p.head_dim);
  return plan;
}

// --- aggregation alone ---------------------------------------------------------------------------

void aggregate(const MultiScaleParams& p, const Parallel& parallel) {
  const int64_t groups = 3 * p.heads, units = p.batch * (1 + p.scales) * groups;
  if (units * p.tokens() * p.head_dim == 0) return;
  const Call call(p);
  parallel(units, aggregation_work(p, groups * p.head_dim) / (groups * (1 + p.scales)),
           [&](int64_t begin, int64_t end) {
             Carver memory{thread_scratch(call.aggregate_floats())};
             const Worker worker(call, memory);
             const Plane<float> tile{memory.floats(call.tile_floats()), call.strip_stride};
             for (int64_t unit = begin; unit < end; ++unit) {
               const int64_t batch = unit / ((1 + p.scales) * groups),
                             slot = unit % ((1 + p.scales) * groups);
               const int64_t scale = slot / groups - 1, group = slot % groups;
               const Image out = channels_from(p, p.out, batch, slot * p.head_dim);
               for_strips(call, 0, p.tokens(), [&](int64_t first, int64_t rows) {
                 const int64_t token = first * p.width, tokens = rows * p.width;
                 if (scale < 0) {
                   const Image image = channels_from(p, p.qkv, batch, group * p.head_dim);
                   call.passes.load(p.dtype, image, token, tokens, p.head_dim, tile);
                 } else {
                   worker.aggregate(static_cast<int>(scale), batch, group, first, rows, tile);
                 }
                 call.passes.store(p.dtype, out, token, tokens, p.head_dim, tile);
               });
             }
           });
}

void aggregate_backward(const MultiScaleParams& p, const Parallel& parallel) {
  const int64_t groups = 3 * p.heads;
  const WeightGradients weights(p);
  if (p.batch * groups * p.tokens() * p.head_dim > 0) {
    const Call call(p);
    const int64_t plane = call.plane_floats();
    parallel(p.batch * groups, max(kMinWorkPerThread, aggregation_work(p, p.head_dim)),
             [&](int64_t begin, int64_t end) {
               Carver memory{thread_scratch(call.aggregate_backward_floats())};
               const Worker worker(call, memory);
               const Plane<float> grad{memory.floats(call.tile_floats()), call.strip_stride};
               const Plane<float> own_input{memory.floats(plane), call.plane_stride()};
               const Plane<float> grad_in{memory.floats(plane), call.plane_stride()};
               const Plane<float> grad_mixed{memory.floats(plane), call.plane_stride()};
               for (int64_t unit = begin; unit < end; ++unit) {
                 const int64_t batch = unit / groups, group = unit % groups;
                 const Image image = channels_from(p, p.qkv, batch, group * p.head_dim);
                 Plane<const float> input{own_input.data, own_input.stride};
                 if (is_plane(p, image)) {
                   input = {static_cast<const float*>(image.data), image.channel_stride};
                 } else {
                   call.passes.load(p.dtype, image, 0, p.tokens(), p.head_dim, own_input);
                 }
                 call.passes.load(p.dtype, channels_from(p, p.grad_out, batch, group * p.head_dim), 0,
                                  p.tokens(), p.head_dim, grad_in);
                 for (int s = 0; s < p.scales; ++s) {
                   const Image from =
                       channels_from(p, p.grad_out, batch, ((1 + s) * groups + group) * p.head_dim);
                   const auto scale = of_group(p.weights[s], p.kernels[s], p.head_dim, group);
                   const auto gradients = weights.of(batch, s, group);
                   for_strips(call, 0, p.tokens(), [&](int64_t first, int64_t rows) {
                     const int64_t token = first * p.width, tokens = rows * p.width;
                     worker.convolve(s, group, input, first, rows, worker.mixed);
                     call.passes.load(p.dtype, from, token, tokens, p.head_dim, grad);
                     call.passes.pointwise_backward(
                         p, scale, gradients, tokens, {worker.mixed.data, worker.mixed.stride},
                         {grad.data, grad.stride}, {grad_mixed.data + token, grad_mixed.stride},
                         worker.pass_memory);
                   });
                   call.passes.depthwise_backward(p, p.kernels[s], call.rows, scale, gradients, input,
                                                  {grad_mixed.data, grad_mixed.stride}, grad_in,
                                                  worker.pass_memory);
                 }
                 call.passes.store(p.dtype, channels_from(p, p.grad_qkv, batch, group * p.head_dim), 0,
                                   p.tokens(), p.head_dim, grad_in);
               }
             });
  }
  weights.finish();
}

// --- with the attention --------------------------------------------------------------------------

namespace {

// The heads of qkv itself, in the problem's dtype and where they lie.
struct OwnHeads {
  int64_t sizes[2];
  int64_t qkv_strides[2], out_strides[2];
  LinearAttentionParams problem;

  OwnHeads(const Call& call) {
    const MultiScaleParams& p = call.p;
    const int64_t d = p.head_dim;
    sizes[0] = p.batch;
    sizes[1] = p.heads;
    qkv_strides[0] = p.qkv.batch_stride;
    qkv_strides[1] = 3 * d * p.qkv.channel_stride;
    out_strides[0] = p.out.batch_stride;
    out_strides[1] = d * p.out.channel_stride;
    problem = call.heads_of(p.tokens());
    problem.dtype = p.dtype;
    problem.lead_rank = 2;
    problem.lead_sizes = sizes;
    problem.groups = p.batch * p.heads;
    Operand* const operands[] = {&problem.q, &problem.k, &problem.v};
    for (int64_t i = 0; i < 3; ++i) {
      *operands[i] = {channels_from(p, p.qkv, 0, i * d).data, qkv_strides, p.qkv.token_stride,
                      p.qkv.channel_stride};
    }
    problem.out = {p.out.data, out_strides, p.out.token_stride, p.out.channel_stride};
  }
};

}  // namespace

void attend(const MultiScaleParams& p, float* sums, const Parallel& parallel) {
  const int64_t groups = p.batch * p.all_heads();
  if (groups * p.tokens() * p.head_dim == 0) {
    if (sums != nullptr) clear(sums, groups * p.head_dim * (p.head_dim + 1));
    return;
  }
  const Call call(p);
  const OwnHeads own(call);
  const ReluLinearAttentionPasses& own_passes = relu_linear_attention_passes(active_isa(), p.dtype);
  const int64_t work =
      aggregation_work(p, 3 * p.head_dim) / max(1, p.scales) + 2 * p.tokens() * p.head_dim * (p.head_dim + 1);
  const Schedule schedule{groups,           p.tokens(),           p.tokens(), call.strip,
                          call.sums_size(), call.attend_floats(), work};
  // The same range of the problem of qkv's own heads.
  const auto own_range = [&](const Range& r) {
    const auto own_group = [&](int64_t g) { return g / p.all_heads() * p.heads + g % p.all_heads(); };
    Range range = r;
    range.group = own_group(r.group);
    range.next_group = own_group(r.next_group);
    if (r.next_group % p.all_heads() >= p.heads) range.next = Range::Next::kNothing;
    return range;
  };
  reduce_then_use(
      schedule, sums, parallel,
      [&](const Range& r, float* part, float* scratch) {
        const int64_t slot = r.group % p.all_heads(), head = slot % p.heads;
        Carver memory{scratch};
        const Worker worker(call, memory);
        if (slot < p.heads) {
          return own_passes.sum_keys(own.problem, own_range(r), call.tile, part, worker.attention_memory);
        }
        const int scale = static_cast<int>(slot / p.heads) - 1;
        const int64_t batch = r.group / p.all_heads();
        const int64_t first = r.begin / p.width, rows = (r.end - r.begin) / p.width;
        const Plane<float> k{memory.floats(call.tile_floats()), call.strip_stride};
        const Plane<float> v{memory.floats(call.tile_floats()), call.strip_stride};
        worker.aggregate(scale, batch, 3 * head + 1, first, rows, k);
        worker.aggregate(scale, batch, 3 * head + 2, first, rows, v);
        LinearAttentionParams problem = call.heads_of(r.end - r.begin);
        problem.k = operand(k, 0);
        problem.v = operand(v, 0);
        call.attention.sum_keys(problem, {0, 0, r.end - r.begin}, call.tile, part, worker.attention_memory);
      },
      [&](const Range& r, const float* total, float* scratch) {
        const int64_t slot = r.group % p.all_heads(), head = slot % p.heads;
        Carver memory{scratch};
        const Worker worker(call, memory);
        if (slot < p.heads) {
          return own_passes.apply_queries(own.problem, own_range(r), call.tile, total,
                                          worker.attention_memory);
        }
        const int scale = static_cast<int>(slot / p.heads) - 1;
        const int64_t batch = r.group / p.all_heads();
        const Image to = channels_from(p, p.out, batch, ((1 + scale) * p.heads + head) * p.head_dim);
        const Plane<float> q{memory.floats(call.tile_floats()), call.strip_stride};
        const Plane<float> out{memory.floats(call.tile_floats()), call.strip_stride};
        for_strips(call, r.begin, r.end, [&](int64_t first, int64_t rows) {
          const int64_t token = first * p.width, tokens = rows * p.width;
          worker.aggregate(scale, batch, 3 * head, first, rows, q);
          LinearAttentionParams problem = call.heads_of(tokens);
          problem.q = operand(q, 0);
          if (p.dtype == DType::kFloat32) {
            problem.out = {static_cast<float*>(to.data) + token * to.token_stride, nullptr, to.token_stride,
                           to.channel_stride};
          } else {
            problem.out = operand(out, 0);
          }
          call.attention.apply_queries(problem, {0, 0, tokens}, call.tile, total, worker.attention_memory);
          if (p.dtype != DType::kFloat32) call.passes.store(p.dtype, to, token, tokens, p.head_dim, out);
        });
      });
}

void attend_backward(const MultiScaleParams& p, const float* sums, const Parallel& parallel) {
  const WeightGradients weights(p);
  const int64_t units = p.batch * p.heads, d = p.head_dim;
  if (units * p.tokens() * d > 0) {
    const Call call(p);
    const int64_t stride = call.plane_stride(), size = call.sums_size();
    parallel(units, max(kMinWorkPerThread, aggregation_work(p, 3 * d)), [&](int64_t begin, int64_t end) {
      Carver memory{thread_scratch(call.attend_backward_floats())};
      const Worker worker(call, memory);
      const auto tile = [&] { return Plane<float>{memory.floats(call.tile_floats()), call.strip_stride}; };
      const Plane<float> mixed_v = tile(), a = tile(), b = tile(), grad_a = tile(), grad_b = tile();
      const auto plane = [&](int64_t channels) {
        return Plane<float>{memory.floats(channels * stride), stride};
      };
      const Plane<float> own_input = plane(3 * d), own_grad_in = plane(3 * d), grad_mixed = plane(3 * d),
                         own_grad_out = plane(d);
      float* const grad_sums = memory.floats(size);
      float* const part = memory.floats(size);

      for (int64_t unit = begin; unit < end; ++unit) {
        const int64_t batch = unit / p.heads, head = unit % p.heads;
        // Float32 whose tokens are contiguous is read and written where it lies.
        const auto in_float = [&](const Image& image, int64_t channels, const Plane<float>& copy_of_it) {
          if (is_plane(p, image)) return Plane<float>{static_cast<float*>(image.data), image.channel_stride};
          call.passes.load(p.dtype, image, 0, p.tokens(), channels, copy_of_it);
          return copy_of_it;
        };
        const Plane<float> in = in_float(channels_from(p, p.qkv, batch, 3 * head * d), 3 * d, own_input);
        const Image to = channels_from(p, p.grad_qkv, batch, 3 * head * d);
        const Plane<float> grad_in =
            is_plane(p, to) ? Plane<float>{static_cast<float*>(to.data), to.channel_stride} : own_grad_in;
        const auto part_of = [&](const Plane<float>& planes, int64_t i) {
          return Plane<float>{planes.data + i * d * planes.stride, planes.stride};
        };

        for (int slot = 0; slot <= p.scales; ++slot) {
          const int64_t out_head = slot * p.heads + head;
          const float* const own_sums = sums + (batch * p.all_heads() + out_head) * size;
          const Plane<float> grad_out =
              in_float(channels_from(p, p.grad_out, batch, out_head * d), d, own_grad_out);
          const int s = slot - 1;
          const auto backward_through = [&](int64_t i, int64_t token, int64_t tokens,
                                            const Plane<float>& mixed, const Plane<float>& grad) {
            const int64_t group = 3 * head + i;
            call.passes.pointwise_backward(
                p, of_group(p.weights[s], p.kernels[s], d, group), weights.of(batch, s, group), tokens,
                {mixed.data, mixed.stride}, {grad.data, grad.stride},
                {part_of(grad_mixed, i).data + token, grad_mixed.stride}, worker.pass_memory);
          };
          const auto again = [&](int64_t i, int64_t first, int64_t rows, const Plane<float>& mixed,
                                 const Plane<float>& result) {
            const Plane<float> from = part_of(in, i);
            worker.convolve(s, 3 * head + i, {from.data, from.stride}, first, rows, mixed);
            worker.mix(s, 3 * head + i, rows * p.width, mixed, result);
          };

          clear(grad_sums, size);
          for_strips(call, 0, p.tokens(), [&](int64_t first, int64_t rows) {
            const int64_t token = first * p.width, tokens = rows * p.width;
            LinearAttentionParams problem = call.heads_of(tokens);
            problem.grad_out = operand(grad_out, token);
            if (slot == 0) {
              problem.q = operand(part_of(in, 0), token);
              problem.grad_q = operand(part_of(grad_in, 0), token);
            } else {
              again(0, first, rows, worker.mixed, a);
              problem.q = operand(a, 0);
              problem.grad_q = operand(grad_a, 0);
            }
            call.attention.grad_queries(problem, {0, 0, tokens}, call.tile, own_sums, part,
                                        worker.attention_memory);
            add(grad_sums, part, size);
            if (slot > 0) backward_through(0, token, tokens, worker.mixed, grad_a);
          });
          for_strips(call, 0, p.tokens(), [&](int64_t first, int64_t rows) {
            const int64_t token = first * p.width, tokens = rows * p.width;
            LinearAttentionParams problem = call.heads_of(tokens);
            if (slot == 0) {
              problem.k = operand(part_of(in, 1), token);
              problem.v = operand(part_of(in, 2), token);
              problem.grad_k = operand(part_of(grad_in, 1), token);
              problem.grad_v = operand(part_of(grad_in, 2), token);
            } else {
              again(1, first, rows, worker.mixed, a);
              again(2, first, rows, mixed_v, b);
              problem.k = operand(a, 0);
              problem.v = operand(b, 0);
              problem.grad_k = operand(grad_a, 0);
              problem.grad_v = operand(grad_b, 0);
            }
            call.attention.grad_keys(problem, {0, 0, tokens}, call.tile, grad_sums, worker.attention_memory);
            if (slot > 0) {
              backward_through(1, token, tokens, worker.mixed, grad_a);
              backward_through(2, token, tokens, mixed_v, grad_b);
            }
          });
          for (int64_t i = 0; i < 3 && slot > 0; ++i) {
            const int64_t group = 3 * head + i;
            const Plane<float> from = part_of(in, i), grads = part_of(grad_mixed, i);
            call.passes.depthwise_backward(
                p, p.kernels[s], call.rows, of_group(p.weights[s], p.kernels[s], d, group),
                weights.of(batch, s, group), {from.data, from.stride}, {grads.data, grads.stride},
                part_of(grad_in, i), worker.pass_memory);
          }
        }
        if (!is_plane(p, to)) call.passes.store(p.dtype, to, 0, p.tokens(), 3 * d, grad_in);
      }
    });
  }
  weights.finish();
}

const MultiScalePasses& multi_scale_passes(Isa isa) {
  switch (isa) {
#define EFFATTN_ROW(name, lanes) \
  case Isa::name:                \
    return name::multi_scale_passes();
    EFFATTN_ISA_LIST(EFFATTN_ROW)
#undef EFFATTN_ROW
  }
  __builtin_unreachable();
}

}  // namespace effattn::cpu
