// Runs what export.py compiled, without Python, and compares the answer with that of eager PyTorch:
//
//     classify LIBEFFATTN MODEL INPUT EXPECTED
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Model = torch::inductor::AOTIModelPackageLoader;

constexpr int kRuns = 21;
// Of the largest value. Rounding in float32 makes a few millionths here; more than this would be an error.
constexpr double kLargestDifference = 1e-4;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  (out << ... << parts);
  return out.str();
}

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  throw std::runtime_error(text(parts...));
}

// What f() returns. If it throws, the message names the argument and leaves out torch's stack trace.
template <class F>
auto with(const char* argument, const std::string& path, F f) {
  try {
    return f();
  } catch (const c10::Error& error) {
    fail(argument, " ", path, ": ", error.what_without_backtrace());
  } catch (const std::exception& error) {
    fail(argument, " ", path, ": ", error.what());
  }
}

// The library registers its operators with torch when it is loaded, and stays. Those for GPUs are in another
// one beside it.
void load_operators(const std::string& path) {
  // A name without a slash would be looked for in the system's folders only.
  if (dlopen(std::filesystem::absolute(path).c_str(), RTLD_NOW) == nullptr) fail(dlerror());
  const auto names = c10::Dispatcher::singleton().getAllOpNames();
  const auto is_ours = [](const c10::OperatorName& op) { return op.name.rfind("effattn::", 0) == 0; };
  if (std::none_of(names.begin(), names.end(), is_ours)) {
    fail("expected a library that registers effattn's operators, got one that does not");
  }
}

// A tensor that torch.save() wrote.
at::Tensor read_tensor(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(std::strerror(errno));
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  const c10::IValue value = torch::jit::pickle_load(bytes);
  if (!value.isTensor()) fail("expected a tensor, got ", value.tagKind());
  return value.toTensor();
}

// Of one run: the median of kRuns.
double milliseconds(Model& model, const at::Tensor& input) {
  std::array<double, kRuns> times;
  for (double& time : times) {
    const auto start = std::chrono::steady_clock::now();
    model.run({input});
    time = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

void classify(const std::string& library, const std::string& package, const std::string& input_path,
              const std::string& expected_path) {
  with("LIBEFFATTN", library, [&] { load_operators(library); });
  const at::Tensor input = with("INPUT", input_path, [&] { return read_tensor(input_path); });
  const at::Tensor expected = with("EXPECTED", expected_path, [&] { return read_tensor(expected_path); });
  // Unless told so, a package does not look at an input's shape and type, and reads what is not there.
  setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1);
  const auto model = with("MODEL", package, [&] { return std::make_unique<Model>(package); });
  const std::string run = text(package, ", run on INPUT ", input_path);
  const at::Tensor output = with("MODEL", run, [&] { return model->run({input}).at(0); });

  if (output.dim() != 2 || output.numel() == 0) {
    fail("MODEL ", run, ": expected an output (images, classes) of one image or more, got ", output.sizes());
  }
  if (expected.sizes() != output.sizes() || expected.dtype() != output.dtype()) {
    fail("EXPECTED ", expected_path, ": expected ", output.dtype(), " ", output.sizes(),
         ", as the model gives, got ", expected.dtype(), " ", expected.sizes());
  }
  const double difference = ((output - expected).abs().max() / expected.abs().max()).item<double>();
  const at::Tensor classes = output.argmax(1);
  for (int64_t i = 0; i < classes.size(0); ++i) {
    std::cout << "image " << i << ": class " << classes[i].item<int64_t>() << "\n";
  }
  std::cout << "largest difference, relative to the largest value: " << difference << "\n";
  // Not `>`, which NaN would pass.
  if (!(difference <= kLargestDifference)) {
    fail("EXPECTED ", expected_path, ": expected a difference of at most ", kLargestDifference, ", got ",
         difference);
  }
  std::cout << "time of a run: " << milliseconds(*model, input) << " ms, the median of " << kRuns << ", "
            << at::get_num_threads() << " threads\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5) {
    std::cerr << "usage: classify LIBEFFATTN MODEL INPUT EXPECTED\n";
    return 2;
  }
  try {
    classify(argv[1], argv[2], argv[3], argv[4]);
  } catch (const std::exception& error) {
    std::cerr << "classify: " << error.what() << "\n";
    return 1;
  }
}
