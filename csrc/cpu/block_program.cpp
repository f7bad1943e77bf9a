// A program is a line a step:
//
//   %0 = image(channels=16)
//   %1 = convolution(%0, channels=64, activation=hardswish)
//   %2 = depthwise(%1, kernel=3, stride=2, activation=hardswish)
//   %3 = convolution(%2, channels=16, residual=%0)
//
// effattn/ops/block.py writes it.
#include "block_program.h"

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
    std::pair{"none", Activation::kNone},           std::pair{"relu", Activation::kRelu},
    std::pair{"relu6", Activation::kRelu6},         std::pair{"hardswish", Activation::kHardswish},
    std::pair{"silu", Activation::kSilu},           std::pair{"gelu", Activation::kGelu},
    std::pair{"gelu_tanh", Activation::kGeluTanh},
};

// Far above every model's, and products of a few are far from overflowing.
constexpr int64_t kMaxKernel = 31, kMaxSteps = 10'000, kMaxWeights = int64_t{1} << 40;

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
    while (end < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[end])) || text_[end] == '_')) {
      ++end;
    }
    if (end == at_) wrong("expected a name at column ", at_ + 1);
    return text_.substr(std::exchange(at_, end), end - at_);
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
    line.expect("(");
    BlockStep step{};
    std::optional<int64_t> channels, padding;
    for (bool is_first = true; !line.take(")"); is_first = false) {
      if (!is_first) line.expect(",");
      if (line.take("%")) {
        step.inputs.push_back(value(line, number));
        continue;
      }
      const std::string_view option = line.word();
      line.expect("=");
      if (option == "channels") {
        channels = within(line, option, 1, kMaxDim);
      } else if (option == "kernel") {
        step.kernel = within(line, option, 1, kMaxKernel);
      } else if (option == "stride") {
        step.stride = within(line, option, 1, 2);
      } else if (option == "padding") {
        padding = within(line, option, 0, kMaxKernel);
      } else if (option == "groups") {
        step.groups = within(line, option, 1, kMaxDim);
      } else if (option == "head_dim") {
        step.head_dim = within(line, option, 1, kMaxDim);
      } else if (option == "eps") {
        const double eps = line.number<double>();
        if (!(eps >= 0.0) || !fits_float(eps)) line.wrong("expected eps to be a finite float32 from 0 on");
        step.eps = static_cast<float>(eps);
      } else if (option == "residual") {
        line.expect("%");
        step.residual = value(line, number);
      } else if (option == "activation") {
        step.activation = activation(line);
      } else {
        line.wrong("unknown option '", option, "'");
      }
    }
    line.expect_end();
    step.padding = padding.value_or(step.kernel / 2);
    if (step.padding >= step.kernel) line.wrong("expected a padding below the kernel");
    if (number == 0) {
      if (name != "image" || !channels || !step.inputs.empty()) line.wrong("expected %0 = image(channels=...)");
      program_.channels = *channels;
      return;
    }
    if (step.inputs.empty()) line.wrong("expected an input");
    const int64_t inputs = program_.channels_of(step.inputs[0]);
    if (name == "convolution") {
      step.kind = Kind::kConvolution;
      if (!channels) line.wrong("expected channels");
      step.channels = *channels;
      const bool fits = step.groups == 1 || (inputs == step.channels && inputs % step.groups == 0 &&
                                             inputs / step.groups % cpu::kBlock == 0);
      if (!fits) {
        line.wrong("expected groups of as many outputs as inputs, a multiple of ", cpu::kBlock, ", of ", inputs,
                   " inputs");
      }
    } else if (name == "depthwise") {
      step.kind = Kind::kDepthwise;
      step.channels = inputs;
      if (channels && *channels != inputs) line.wrong("expected the ", inputs, " channels of the input");
    } else if (name == "linear_attention") {
      step.kind = Kind::kLinearAttention;
      if (step.head_dim % cpu::kBlock != 0 || step.head_dim == 0 || inputs % (3 * step.head_dim) != 0) {
        line.wrong("expected a head_dim, a multiple of ", cpu::kBlock, ", that goes into ", inputs,
                   " / 3 channels");
      }
      for (const int input : step.inputs) {
        if (program_.channels_of(input) != inputs) line.wrong("expected inputs of as many channels");
      }
      step.channels = static_cast<int64_t>(step.inputs.size()) * (inputs / 3);
      if (step.channels > kMaxDim) line.wrong("expected at most ", kMaxDim, " channels");
    } else {
      line.wrong("unknown operation '", name, "'");
    }
    if (step.kind != Kind::kLinearAttention && step.inputs.size() != 1) line.wrong("expected one input");
    if (step.kind == Kind::kLinearAttention && step.residual != BlockStep::kNone) {
      line.wrong("expected no residual");
    }
    if (step.residual != BlockStep::kNone && program_.channels_of(step.residual) != step.channels) {
      line.wrong("expected a residual of ", step.channels, " channels");
    }
    take_weights(line, step, inputs);
    program_.steps.push_back(std::move(step));
  }

  static int value(Line& line, size_t number) {
    const auto found = line.number<int64_t>();
    if (found < 0 || found >= static_cast<int64_t>(number)) line.wrong("%", found, " is no value so far");
    return static_cast<int>(found);
  }
  static int64_t within(Line& line, std::string_view option, int64_t least, int64_t most) {
    const auto found = line.number<int64_t>();
    if (found < least || found > most) line.wrong("expected ", option, " from ", least, " to ", most);
    return found;
  }
  static Activation activation(Line& line) {
    const std::string_view name = line.word();
    for (const auto& [known, of] : kActivations) {
      if (name == known) return of;
    }
    line.wrong("unknown activation '", name, "'");
  }

  void take_weights(const Line& line, BlockStep& step, int64_t inputs) {
    const cpu::WeightSizes sizes = cpu::weight_sizes(step, inputs);
    step.weight = weights_;
    step.bias = step.weight + sizes.weight;
    weights_ = step.bias + sizes.bias;
    if (weights_ > kMaxWeights) line.wrong("expected at most ", kMaxWeights, " weights");
  }

  BlockProgram program_;
  int64_t weights_ = 0;
};

}  // namespace

CheckedProgram parse_program(const std::string& text) { return Parser().parse(text); }

}  // namespace effattn
