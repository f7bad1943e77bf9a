// Runs what export.py wrote, in OpenVINO and without Python, and compares the answer with that of eager
// PyTorch:
//
//     classify_openvino LIBRARY MODEL INPUT EXPECTED [THREADS]
#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <openvino/openvino.hpp>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

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

// What f() returns. If it throws, the message names the argument.
template <class F>
auto with(const char* argument, const std::string& value, F f) {
  try {
    return f();
  } catch (const std::exception& error) {
    fail(argument, " ", value, ": ", error.what());
  }
}

std::vector<float> read_floats(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(std::strerror(errno));
  const std::vector<char> bytes(std::istreambuf_iterator<char>(file), {});
  if (bytes.empty() || bytes.size() % sizeof(float) != 0) {
    fail("expected numbers of ", sizeof(float), " bytes, got ", bytes.size(), " bytes");
  }
  std::vector<float> floats(bytes.size() / sizeof(float));
  std::memcpy(floats.data(), bytes.data(), bytes.size());
  return floats;
}

int read_threads(const std::string& argument) {
  int threads = 0;
  const char* const end = argument.data() + argument.size();
  const auto [stop, error] = std::from_chars(argument.data(), end, threads);
  if (error != std::errc() || stop != end || threads < 1) fail("expected a number of at least 1");
  return threads;
}

// Prints the class of each image and the largest difference; throws if that is more than rounding makes.
void compare(const float* output, size_t images, size_t classes, const std::vector<float>& expected) {
  if (expected.size() != images * classes) {
    fail("expected ", images, " x ", classes, " numbers, as the model gives, got ", expected.size());
  }
  double difference = 0;
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    const double of_one = std::abs(double{output[i]} - expected[i]);
    // Of which NaN is the largest.
    if (!std::isnan(difference) && !(of_one <= difference)) difference = of_one;
    largest = std::max(largest, std::abs(double{expected[i]}));
  }
  difference /= largest;
  for (size_t i = 0; i < images; ++i) {
    const float* const scores = output + i * classes;
    std::cout << "image " << i << ": class " << std::max_element(scores, scores + classes) - scores << "\n";
  }
  std::cout << "largest difference, relative to the largest value: " << difference << "\n";
  // Not `>`, which NaN would pass.
  if (!(difference <= kLargestDifference)) {
    fail("expected a difference of at most ", kLargestDifference, ", got ", difference);
  }
}

// Of one run: the median of kRuns.
template <class F>
double milliseconds(F run) {
  std::array<double, kRuns> times;
  for (double& time : times) {
    const auto start = std::chrono::steady_clock::now();
    run();
    time = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  }
  std::nth_element(times.begin(), times.begin() + kRuns / 2, times.end());
  return times[kRuns / 2];
}

void classify(const std::string& library, const std::string& model_path, const std::string& input_path,
              const std::string& expected_path, const std::string& given_threads) {
  std::vector<float> input = with("INPUT", input_path, [&] { return read_floats(input_path); });
  const std::vector<float> expected =
      with("EXPECTED", expected_path, [&] { return read_floats(expected_path); });

  // Before the model, to outlive it: with the core goes the library, which has the code of the model's
  // operations.
  ov::Core core;
  // A name without a slash would be looked for in the system's folders only.
  with("LIBRARY", library, [&] { core.add_extension(std::filesystem::absolute(library).string()); });
  // One image after the other, not several at a time. Processors that have bfloat16 would compute in it
  // unless told not to, and miss the answer of float32.
  ov::AnyMap config = {ov::hint::performance_mode(ov::hint::PerformanceMode::LATENCY),
                       ov::hint::inference_precision(ov::element::f32)};
  if (!given_threads.empty()) {
    config.insert(ov::inference_num_threads(
        with("THREADS", given_threads, [&] { return read_threads(given_threads); })));
  }
  ov::CompiledModel model = with(
      "MODEL", model_path, [&] { return core.compile_model(core.read_model(model_path), "CPU", config); });

  // Of one image first, then of all.
  ov::PartialShape shape = model.input().get_partial_shape();
  if (shape.size() == 4) shape[0] = 1;
  if (shape.size() != 4 || shape.is_dynamic()) {
    fail("MODEL ", model_path, ": expected an input (images, channels, height, width) of one size, got ",
         shape);
  }
  const size_t size = ov::shape_size(shape.to_shape());
  if (input.size() % size != 0) {
    fail("INPUT ", input_path, ": expected images of ", size, " numbers, as the model takes, got ",
         input.size(), " numbers");
  }
  shape[0] = input.size() / size;
  ov::InferRequest request = model.create_infer_request();
  with("MODEL", text(model_path, ", run on INPUT ", input_path), [&] {
    // No copy: the tensor is where the numbers are.
    request.set_input_tensor(ov::Tensor(ov::element::f32, shape.to_shape(), input.data()));
    request.infer();
  });

  const ov::Tensor output = request.get_output_tensor();
  if (output.get_shape().size() != 2) {
    fail("MODEL ", model_path, ": expected an output (images, classes), got ", output.get_shape());
  }
  with("EXPECTED", expected_path,
       [&] { compare(output.data<float>(), output.get_shape()[0], output.get_shape()[1], expected); });
  std::cout << "time of a run: " << milliseconds([&] { request.infer(); }) << " ms, the median of " << kRuns
            << ", threads: " << model.get_property(ov::inference_num_threads) << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5 && argc != 6) {
    std::cerr << "usage: classify_openvino LIBRARY MODEL INPUT EXPECTED [THREADS]\n";
    return 2;
  }
  try {
    classify(argv[1], argv[2], argv[3], argv[4], argc == 6 ? argv[5] : "");
  } catch (const std::exception& error) {
    std::cerr << "classify_openvino: " << error.what() << "\n";
    return 1;
  }
}
