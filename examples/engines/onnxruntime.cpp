// Runs what export.py wrote, in onnxruntime and without Python, and compares the answer with that of eager
// PyTorch:
//
//     classify_onnxruntime LIBRARY MODEL INPUT EXPECTED [THREADS]
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
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

  const Ort::Env env;
  Ort::SessionOptions options;
  with("LIBRARY", library, [&] {
    // A name without a slash would be looked for in the system's folders only.
    options.RegisterCustomOpsLibrary(std::filesystem::absolute(library).c_str());
  });
  if (!given_threads.empty()) {
    options.SetIntraOpNumThreads(with("THREADS", given_threads, [&] { return read_threads(given_threads); }));
  }
  Ort::Session session =
      with("MODEL", model_path, [&] { return Ort::Session(env, model_path.c_str(), options); });

  // Of one image first, then of all. Sizes that may be any are -1.
  std::vector<int64_t> shape = session.GetInputTypeInfo(0).GetTensorTypeAndShapeInfo().GetShape();
  if (shape.size() != 4 || *std::min_element(shape.begin() + 1, shape.end()) < 1) {
    fail("MODEL ", model_path, ": expected an input (images, channels, height, width) of one size");
  }
  const size_t size = shape[1] * shape[2] * shape[3];
  if (input.size() % size != 0) {
    fail("INPUT ", input_path, ": expected images of ", size, " numbers, as the model takes, got ",
         input.size(), " numbers");
  }
  shape[0] = input.size() / size;
  // No copy: the tensor is where the numbers are.
  const Ort::MemoryInfo memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeDefault);
  const Ort::Value tensor =
      Ort::Value::CreateTensor<float>(memory, input.data(), input.size(), shape.data(), shape.size());
  Ort::AllocatorWithDefaultOptions allocator;
  const Ort::AllocatedStringPtr input_name = session.GetInputNameAllocated(0, allocator);
  const Ort::AllocatedStringPtr output_name = session.GetOutputNameAllocated(0, allocator);
  const auto run = [&, of = input_name.get(), to = output_name.get()] {
    return std::move(session.Run(Ort::RunOptions(), &of, &tensor, 1, &to, 1).front());
  };

  const Ort::Value output = with("MODEL", text(model_path, ", run on INPUT ", input_path), run);
  const std::vector<int64_t> made = output.GetTensorTypeAndShapeInfo().GetShape();
  if (made.size() != 2) {
    fail("MODEL ", model_path, ": expected an output (images, classes), got ", made.size(), " dimensions");
  }
  with("EXPECTED", expected_path,
       [&] { compare(output.GetTensorData<float>(), made[0], made[1], expected); });
  std::cout << "time of a run: " << milliseconds(run) << " ms, the median of " << kRuns
            << ", threads: " << (given_threads.empty() ? "one a core" : given_threads) << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 5 && argc != 6) {
    std::cerr << "usage: classify_onnxruntime LIBRARY MODEL INPUT EXPECTED [THREADS]\n";
    return 2;
  }
  try {
    classify(argv[1], argv[2], argv[3], argv[4], argc == 6 ? argv[5] : "");
  } catch (const std::exception& error) {
    std::cerr << "classify_onnxruntime: " << error.what() << "\n";
    return 1;
  }
}
