// Blocks of networks for CPU tensors: checks, allocation, launch, registration.
#include <algorithm>
#include <array>
#include <map>
#include <memory>
#include <mutex>

#include "../../kernels/cpu/block/plan.h"
#include "../images.h"
#include "block_program.h"
#include "packed.h"

namespace effattn {
namespace {

// What was made of a program, and of images of each size; both serve many calls.
struct Entry {
  CheckedProgram checked;
  using Key = std::array<int64_t, 4>;  // batch, height, width, threads
  std::map<Key, std::shared_ptr<const cpu::BlockPlan>> plans;
};

std::string size_text(const cpu::BlockSize& size) {
  return std::to_string(size.height) + " x " + std::to_string(size.width);
}

int64_t tokens_of(const cpu::BlockSize& size) { return size.height * size.width; }

// Whether the inputs of a step fit each other and, of an attention, its bias.
template <class RequireSame>
void check_inputs(size_t i, const cpu::BlockStep& step, const std::vector<cpu::BlockSize>& sizes,
                  const RequireSame& require_same) {
  using Kind = cpu::BlockStep::Kind;
  const auto require_tokens = [&](int value, int64_t tokens) {
    EFFATTN_REQUIRE(tokens_of(sizes[value]) == tokens, "block: program: %", i + 1, ": expected %", value,
                    " to have ", tokens, " pixels, got ", size_text(sizes[value]));
  };
  switch (step.kind) {
    case Kind::kMultiply:
      return require_tokens(step.inputs[1], 1);
    case Kind::kAttention:
      require_tokens(step.inputs[0], step.queries);
      require_tokens(step.inputs.back(), step.keys);
      if (step.inputs.size() == 3) require_same(i, step.inputs[1], sizes[step.inputs[2]]);
      return;
    default:
      for (size_t input = 1; input < step.inputs.size(); ++input) {
        require_same(i, step.inputs[input], sizes[step.inputs[0]]);
      }
  }
}

// Whether every step has an image, and what it reads fits.
void check_sizes(const cpu::BlockProgram& program, const cpu::BlockSize& x) {
  const std::vector<cpu::BlockSize> sizes = sizes_of(program, x);
  const auto require_same = [&](size_t step, int other, const cpu::BlockSize& own) {
    const cpu::BlockSize& of = sizes[other];
    EFFATTN_REQUIRE(of.height == own.height && of.width == own.width, "block: program: %", step + 1,
                    ": expected %", other, " to be ", size_text(own), ", got ", size_text(of), ", with x of ",
                    size_text(x));
  };
  for (size_t i = 0; i < program.steps.size(); ++i) {
    const cpu::BlockStep& step = program.steps[i];
    const cpu::BlockSize& own = sizes[i + 1];
    EFFATTN_REQUIRE(own.height > 0 && own.width > 0, "block: x: expected a larger image than ", size_text(x),
                    ": nothing is left of it at %", i + 1);
    check_inputs(i, step, sizes, require_same);
    for (const int other : {step.residual, step.addend}) {
      if (other != cpu::BlockStep::kNone) require_same(i, other, own);
    }
  }
}

// Bounded like every cache of ours: models are few, and sizes of images not many.
class Programs {
 public:
  std::pair<std::shared_ptr<Entry>, std::shared_ptr<const cpu::BlockPlan>> find(const std::string& text,
                                                                                const Tensor& x,
                                                                                int threads) {
    const std::lock_guard lock(mutex_);
    auto found = entries_.find(text);
    if (found == entries_.end()) {
      auto entry = std::make_shared<Entry>(Entry{parse_program(text), {}});
      if (entries_.size() >= kMaxPrograms) entries_.clear();
      found = entries_.emplace(text, std::move(entry)).first;
    }
    const std::shared_ptr<Entry>& entry = found->second;
    const cpu::BlockProgram& program = entry->checked.program;
    EFFATTN_REQUIRE(x.size(1) == program.channels, "block: x: expected ", program.channels, " channels, got ",
                    x.size(1));
    const cpu::BlockSize size{x.size(2), x.size(3)};
    const Entry::Key key{x.size(0), size.height, size.width, threads};
    std::shared_ptr<const cpu::BlockPlan>& plan = entry->plans[key];
    if (plan == nullptr) {
      try {
        check_sizes(program, size);
        plan = std::make_shared<const cpu::BlockPlan>(program, size, x.size(0), threads);
      } catch (...) {
        entry->plans.erase(key);
        throw;
      }
      if (entry->plans.size() > kMaxPlans) {
        const auto kept = plan;
        entry->plans.clear();
        entry->plans[key] = kept;
        return {entry, kept};
      }
    }
    return {entry, plan};
  }

 private:
  static constexpr size_t kMaxPrograms = 256, kMaxPlans = 64;
  std::mutex mutex_;
  std::map<std::string, std::shared_ptr<Entry>, std::less<>> entries_;
};

Tensor block(const Tensor& x, std::vector<Tensor> weights, std::string program) {
  static Programs programs;
  require_image("block", x);
  const cpu::Parallel threads = torch_threads();
  const auto [entry, plan] = programs.find(program, x, threads.threads);
  EFFATTN_REQUIRE(weights.size() == 1, "block: weights: expected 1 tensor, got ", weights.size());
  Tensors alive;
  cpu::BlockParams p{};
  p.dtype = kernel_dtype(x);
  p.batch = x.size(0);
  p.size = {x.size(2), x.size(3)};
  p.weights = floats("block", "weights[0]", weights[0], {entry->checked.weights}, alive);
  alive.push_back(with_mergeable_rows(x));
  p.x = image(alive.back());
  const cpu::BlockSize& size = plan->values.back().size;
  Tensor out = new_image(x, {x.size(0), plan->steps.back().channels, size.height, size.width}, p.out);
  if (p.batch > 0) cpu::run_block(*plan, p, threads);
  return out;
}

}  // namespace

EFFATTN_OPERATORS(m) { m.impl("block", TORCH_BOX(&block)); }

}  // namespace effattn
