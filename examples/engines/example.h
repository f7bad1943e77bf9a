// What the two programs share: arguments, files of numbers, the comparison with the expected answer, a clock.
#pragma once

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace example {

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

inline std::vector<float> read_floats(const std::string& path) {
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

inline int read_threads(const std::string& argument) {
  int threads = 0;
  const char* const end = argument.data() + argument.size();
  const auto [stop, error] = std::from_chars(argument.data(), end, threads);
  if (error != std::errc() || stop != end || threads < 1) fail("expected a number of at least 1");
  return threads;
}

// Prints the class of each image and the largest difference; throws if that is more than rounding makes.
inline void compare(const float* output, size_t images, size_t classes, const std::vector<float>& expected) {
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

// Calls `classify` with the arguments; what it throws goes to stderr.
template <class Classify>
int run(const char* program, int argc, char** argv, Classify classify) {
  if (argc != 5 && argc != 6) {
    std::cerr << "usage: " << program << " LIBRARY MODEL INPUT EXPECTED [THREADS]\n";
    return 2;
  }
  try {
    classify(argv[1], argv[2], argv[3], argv[4], argc == 6 ? argv[5] : "");
    return 0;
  } catch (const std::exception& error) {
    std::cerr << program << ": " << error.what() << "\n";
    return 1;
  }
}

}  // namespace example
