// A program is a line a step:
//
//   %0 = image(channels=16)
//   %1 = convolution(%0, channels=64, activation=hardswish)
//   %2 = depthwise(%1, kernel=3, stride=2, activation=hardswish)
//   %3 = convolution(%2, channels=16, residual=%0)
//
// effattn/ops/block.py writes it.
#include "block_program.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "../../kernels/cpu/block/ukernels.h"
#include "../tensor.h"

namespace effattn {
namespace {

using cpu::Activation;
using cpu::BlockProgram;
using cpu::BlockStep;
using Kind = BlockStep::Kind;

constexpr std::array kActivations = {
    std::pair{"none", Activation::kNone},          std::pair{"relu", Activation::kRelu},
    std::pair{"relu6", Activation::kRelu6},        std::pair{"hardswish", Activation::kHardswish},
    std::pair{"silu", Activation::kSilu},          std::pair{"gelu", Activation::kGelu},
    std::pair{"gelu_tanh", Activation::kGeluTanh}, std::pair{"sigmoid", Activation::kSigmoid},
};

// Far above every model's, and products of a few are far from overflowing.
constexpr int64_t kMaxKernel = 31, kMaxSteps = 10'000, kMaxTokens = 1 << 20, kMaxWindow = 1 << 10,
                  kMaxWeights = int64_t{1} << 40;

// One line, from left to right.
class Line {
 public:
  Line(std::string_view text, size_t number) : text_(text), number_(number) {}

  template <class... Parts>
  [[noreturn]] void wrong(const Parts&... parts) const {
    fail("block: program: line ", number_ + 1, ": ", parts..., " in '", text_, "'");
  }

  void expect(std::string_view token) {
    skip_spaces();
    if (text_.substr(at_, token.size()) != token) wrong("expected '", token, "' at column ", at_ + 1);
    at_ += token.size();
  }
  bool take(std::string_view token) {
    skip_spaces();
    const bool is_next = text_.substr(at_, token.size()) == token;
    if (is_next) at_ += token.size();
    return is_next;
  }
  std::string_view word() {
    skip_spaces();
    size_t end = at_;
    while (end < text_.size() &&
           (std::isalnum(static_cast<unsigned char>(text_[end])) || text_[end] == '_')) {
      ++end;
    }
    if (end == at_) wrong("expected a name at column ", at_ + 1);
    const size_t begin = std::exchange(at_, end);
    return text_.substr(begin, end - begin);
  }
  template <class Number>
  Number number() {
    skip_spaces();
    Number value{};
    const auto [end, error] = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
    if (error != std::errc{}) wrong("expected a number at column ", at_ + 1);
    at_ = end - text_.data();
    return value;
  }
  void expect_end() {
    skip_spaces();
    if (at_ != text_.size()) wrong("expected nothing more at column ", at_ + 1);
  }

 private:
  void skip_spaces() {
    while (at_ < text_.size() && text_[at_] == ' ') ++at_;
  }

  std::string_view text_;
  size_t number_, at_ = 0;
};

class Parser {
 public:
  CheckedProgram parse(std::string_view text) {
    size_t number = 0;
    while (!text.empty()) {
      const size_t end = text.find('\n');
      Line line(text.substr(0, end), number);
      if (static_cast<int64_t>(number) > kMaxSteps) line.wrong("expected at most ", kMaxSteps, " steps");
      add(line, number++);
      text.remove_prefix(end == std::string_view::npos ? text.size() : end + 1);
    }
    if (number < 2) fail("block: program: expected an image and a step, got ", number, " lines");
    return {std::move(program_), weights_};
  }

 private:
  void add(Line& line, size_t number) {
    line.expect("%");
    if (line.number<size_t>() != number) line.wrong("expected value %", number);
    line.expect("=");
    const std::string_view name = line.word();
    BlockStep step = read_arguments(line, number);
    if (number == 0) {
      if (name != "image" || step.channels == 0 || !step.inputs.empty()) {
        line.wrong("expected %0 = image(channels=...)");
      }
      program_.channels = step.channels;
      return;
    }
    const auto* const operation =
        std::find_if(kOperations.begin(), kOperations.end(), [&](const auto& o) { return o.name == name; });
    if (operation == kOperations.end()) line.wrong("unknown operation '", name, "'");
    step.kind = operation->kind;
    const int64_t given = step.channels, count = static_cast<int64_t>(step.inputs.size());
    if (count < operation->min_inputs || count > operation->max_inputs) {
      line.wrong("expected ", operation->min_inputs, " to ", operation->max_inputs, " inputs");
    }
    const int64_t inputs = program_.channels_of(step.inputs[0]);
    (this->*operation->check)(line, step, inputs);
    if (given != 0 && given != step.channels) line.wrong("expected channels=", step.channels);
    if (step.residual != BlockStep::kNone && !operation->adds) line.wrong("expected no residual");
    if (step.addend != BlockStep::kNone && step.kind != Kind::kAttention) line.wrong("expected no addend");
    for (const int other : {step.residual, step.addend}) {
      if (other != BlockStep::kNone && program_.channels_of(other) != step.channels) {
        line.wrong("expected %", other, " to have ", step.channels, " channels");
      }
    }
    step.weights = weights_;
    for (const int64_t size : cpu::weight_sizes(step, inputs)) {
      if (size > kMaxWeights - weights_) line.wrong("expected at most ", kMaxWeights, " weights");
      weights_ += size;
    }
    program_.steps.push_back(std::move(step));
  }

  BlockStep read_arguments(Line& line, size_t number) const {
    BlockStep step{};
    std::optional<int64_t> padding;
    line.expect("(");
    for (bool is_first = true; !line.take(")"); is_first = false) {
      if (!is_first) line.expect(",");
      if (line.take("%")) {
        step.inputs.push_back(value(line, number));
        continue;
      }
      const std::string_view option = line.word();
      line.expect("=");
      const auto size = [&](int64_t least, int64_t most) {
        const auto found = line.number<int64_t>();
        if (found < least || found > most) line.wrong("expected ", option, " from ", least, " to ", most);
        return found;
      };
      const auto real = [&] {
        const auto found = line.number<double>();
        if (!fits_float(found)) line.wrong("expected ", option, " to be a finite float32");
        return static_cast<float>(found);
      };
      const auto other = [&] {
        line.expect("%");
        return value(line, number);
      };
      if (option == "channels") {
        step.channels = size(1, kMaxDim);
      } else if (option == "kernel") {
        step.kernel = size(1, kMaxKernel);
      } else if (option == "stride") {
        step.stride = size(1, 2);
      } else if (option == "padding") {
        padding = size(0, kMaxKernel);
      } else if (option == "groups") {
        step.groups = size(1, kMaxDim);
      } else if (option == "activation") {
        step.activation = activation(line);
      } else if (option == "residual") {
        step.residual = other();
      } else if (option == "addend") {
        step.addend = other();
      } else if (option == "eps") {
        step.eps = real();
      } else if (option == "scale") {
        step.scale = real();
      } else if (option == "heads") {
        step.heads = size(1, kMaxDim);
      } else if (option == "head_dim") {
        step.head_dim = size(1, kMaxDim);
      } else if (option == "value_dim") {
        step.value_dim = size(1, kMaxDim);
      } else if (option == "queries") {
        step.queries = size(1, kMaxTokens);
      } else if (option == "keys") {
        step.keys = size(1, kMaxTokens);
      } else if (option == "talking_heads") {
        step.talking_heads = size(0, 1) == 1;
      } else if (option == "kernels") {
        do {
          step.kernels.push_back(size(1, kMaxKernel));
        } while (line.take("x"));
      } else if (option == "window") {
        step.window_height = size(1, kMaxWindow);
        line.expect("x");
        step.window_width = size(1, kMaxWindow);
      } else {
        line.wrong("unknown option '", option, "'");
      }
    }
    line.expect_end();
    step.padding = padding.value_or(step.kernel / 2);
    if (step.padding >= step.kernel) line.wrong("expected a padding below the kernel");
    return step;
  }

  // --- operations: what each takes, and the channels of its result
  // ------------------------------------------

  using Check = void (Parser::*)(const Line&, BlockStep&, int64_t inputs) const;
  struct Operation {
    std::string_view name;
    Kind kind;
    int64_t min_inputs, max_inputs;
    bool adds;  // a residual
    Check check;
  };
  static const std::array<Operation, 10> kOperations;

  void check_convolution(const Line& line, BlockStep& step, int64_t inputs) const {
    const bool fits = step.groups == 1 || (inputs == step.channels && inputs % step.groups == 0 &&
                                           inputs / step.groups % cpu::kBlock == 0);
    if (step.channels == 0) line.wrong("expected channels");
    if (!fits) {
      line.wrong("expected groups of as many outputs as inputs, a multiple of ", cpu::kBlock, ", of ", inputs,
                 " inputs");
    }
  }
  void check_as_input(const Line&, BlockStep& step, int64_t inputs) const { step.channels = inputs; }
  void check_pool(const Line& line, BlockStep& step, int64_t inputs) const {
    if (step.kernel % 2 == 0 || step.padding != step.kernel / 2 || step.stride != 1) {
      line.wrong("expected an odd kernel, padding that keeps the size and no stride");
    }
    step.channels = inputs;
  }
  void check_norm(const Line& line, BlockStep& step, int64_t inputs) const {
    if (!(step.eps >= 0.0f)) line.wrong("expected eps from 0 on");
    step.channels = inputs;
  }
  void check_multiply(const Line& line, BlockStep& step, int64_t inputs) const {
    if (program_.channels_of(step.inputs[1]) != inputs) line.wrong("expected inputs of as many channels");
    step.channels = inputs;
  }
  void check_linear_attention(const Line& line, BlockStep& step, int64_t inputs) const {
    if (step.head_dim % cpu::kBlock != 0 || step.head_dim == 0 || inputs % (3 * step.head_dim) != 0) {
      line.wrong("expected a head_dim, a multiple of ", cpu::kBlock, ", that goes into ", inputs,
                 " / 3 channels");
    }
    if (!(step.eps >= 0.0f)) line.wrong("expected eps from 0 on");
    for (const int input : step.inputs) {
      if (program_.channels_of(input) != inputs) line.wrong("expected inputs of as many channels");
    }
    step.channels = static_cast<int64_t>(step.inputs.size()) * (inputs / 3);
    if (step.channels > kMaxDim) line.wrong("expected at most ", kMaxDim, " channels");
  }
  void check_attention(const Line& line, BlockStep& step, int64_t) const {
    if (step.heads == 0 || step.head_dim == 0 || step.value_dim == 0 || step.queries == 0 || step.keys == 0) {
      line.wrong("expected heads, head_dim, value_dim, queries and keys");
    }
    if (step.inputs.size() < 3 && step.queries != step.keys) {
      line.wrong("expected q of its own for queries=", step.queries, " and keys=", step.keys);
    }
    const int64_t keys = step.heads * step.key_stride(), values = step.heads * step.value_stride();
    if (keys > kMaxDim || values > kMaxDim || 2 * keys + values > kMaxDim) {
      line.wrong("expected at most ", kMaxDim, " channels");
    }
    const std::vector<int64_t> expected = step.inputs.size() == 1   ? std::vector{2 * keys + values}
                                          : step.inputs.size() == 2 ? std::vector{2 * keys, values}
                                                                    : std::vector{keys, keys, values};
    for (size_t i = 0; i < expected.size(); ++i) {
      if (program_.channels_of(step.inputs[i]) != expected[i]) {
        line.wrong("expected %", step.inputs[i], " to have ", expected[i], " channels");
      }
    }
    step.channels = values;
  }
  void check_cascade(const Line& line, BlockStep& step, int64_t inputs) const {
    step.heads = static_cast<int64_t>(step.kernels.size());
    if (step.heads == 0 || step.head_dim == 0 || step.window_height == 0) {
      line.wrong("expected kernels, head_dim and window");
    }
    for (const int64_t kernel : step.kernels) {
      if (kernel % 2 == 0) line.wrong("expected odd kernels");
    }
    step.value_dim = inputs / step.heads;
    if (inputs % step.heads != 0 || step.value_dim % cpu::kBlock != 0) {
      line.wrong("expected ", step.heads, " heads of a multiple of ", cpu::kBlock, " channels, of ", inputs);
    }
    step.channels = inputs;
  }

  static int value(Line& line, size_t number) {
    const auto found = line.number<int64_t>();
    if (found < 0 || found >= static_cast<int64_t>(number)) line.wrong("%", found, " is no value so far");
    return static_cast<int>(found);
  }
  static Activation activation(Line& line) {
    const std::string_view name = line.word();
    for (const auto& [known, of] : kActivations) {
      if (name == known) return of;
    }
    line.wrong("unknown activation '", name, "'");
  }

  BlockProgram program_;
  int64_t weights_ = 0;
};

// Of the options channels is checked where it is given; others that an operation has no use for are ignored.
const std::array<Parser::Operation, 10> Parser::kOperations = {{
    {"convolution", Kind::kConvolution, 1, 1, true, &Parser::check_convolution},
    {"depthwise", Kind::kDepthwise, 1, 1, true, &Parser::check_as_input},
    {"pool_mixer", Kind::kPoolMixer, 1, 1, false, &Parser::check_pool},
    {"layer_norm", Kind::kLayerNorm, 1, 1, false, &Parser::check_norm},
    {"mean", Kind::kMean, 1, 1, false, &Parser::check_as_input},
    {"multiply", Kind::kMultiply, 2, 2, false, &Parser::check_multiply},
    {"upsample", Kind::kUpsample, 1, 1, false, &Parser::check_as_input},
    {"linear_attention", Kind::kLinearAttention, 1, 64, false, &Parser::check_linear_attention},
    {"attention", Kind::kAttention, 1, 3, false, &Parser::check_attention},
    {"cascade", Kind::kCascade, 1, 1, false, &Parser::check_cascade},
}};

}  // namespace

CheckedProgram parse_program(const std::string& text) { return Parser().parse(text); }

}  // namespace effattn
