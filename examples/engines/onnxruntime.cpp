// Runs what export.py wrote, in onnxruntime and without Python, and compares the answer with that of eager
// PyTorch:
//
//     classify_onnxruntime LIBRARY MODEL INPUT EXPECTED [THREADS]
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <filesystem>
#include <utility>

#include "example.h"

namespace {

using namespace example;

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

int main(int argc, char** argv) { return example::run("classify_onnxruntime", argc, argv, classify); }
