// Runs what export.py wrote, in OpenVINO and without Python, and compares the answer with that of eager
// PyTorch:
//
//     classify_openvino LIBRARY MODEL INPUT EXPECTED [THREADS]
#include <filesystem>
#include <openvino/openvino.hpp>

#include "example.h"

namespace {

using namespace example;

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

int main(int argc, char** argv) { return example::run("classify_openvino", argc, argv, classify); }
