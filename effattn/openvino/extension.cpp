// Every operation of the C interface as an operation of OpenVINO, for models in ONNX (domain "effattn") and
// in IR. It works in the arena of whoever runs it, so that INFERENCE_NUM_THREADS holds. Compiled against the
// headers that the openvino package brings (effattn/openvino): an extension belongs to one version of
// OpenVINO.
#include <algorithm>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include <tbb/parallel_for.h>
#include <tbb/task_arena.h>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/node_context.hpp>
#include <openvino/frontend/onnx/extension/conversion.hpp>
#include <openvino/op/constant.hpp>
#include <openvino/op/op.hpp>

#include "effattn_kernels.h"

namespace {

void require(const char* error) {
  if (error != nullptr) OPENVINO_THROW(error);
}

// The name of an operation, and the attributes of one node, in the order of the specification; `format`
// first.
struct Kind {
  ov::DiscreteTypeInfo type;
  std::vector<effattn_attribute_spec> attributes;

  explicit Kind(const char* name) : type(name, "effattn", &ov::op::Op::get_type_info_static()) {
    attributes.push_back({"format", 1, 1});
    for (const effattn_attribute_spec* spec = effattn_attributes(name); spec->name != nullptr; ++spec)
      attributes.push_back(*spec);
    type.hash();
  }
};

struct Destroy {
  void operator()(effattn_operation* operation) const { effattn_destroy(operation); }
};

class Operation : public ov::op::Op {
 public:
  explicit Operation(const Kind& kind) : kind_(kind), values_(kind.attributes.size()) {}
  Operation(const Kind& kind, const ov::OutputVector& inputs, std::vector<double> values)
      : Op(inputs), kind_(kind), values_(std::move(values)) {
    constructor_validate_and_infer_types();
  }

  const ov::DiscreteTypeInfo& get_type_info() const override { return kind_.type; }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    for (size_t i = 0; i < values_.size(); ++i) {
      const effattn_attribute_spec& spec = kind_.attributes[i];
      if (spec.is_integer) {
        int64_t value = static_cast<int64_t>(values_[i]);
        visitor.on_attribute(spec.name, value);
        values_[i] = static_cast<double>(value);
      } else {
        visitor.on_attribute(spec.name, values_[i]);
      }
    }
    return true;
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<Operation>(kind_, inputs, values_);
  }

  void validate_and_infer_types() override {
    operation_ = create();
    std::vector<std::vector<int64_t>> shapes;
    bool are_known = true;
    for (size_t i = 0; i < get_input_size(); ++i) {
      const ov::element::Type type = get_input_element_type(i);
      NODE_VALIDATION_CHECK(this, type == ov::element::f32 || type.is_dynamic(), "input ", i,
                            ": expected f32, got ", type);
      const ov::PartialShape& shape = get_input_partial_shape(i);
      are_known = are_known && shape.rank().is_static();
      shapes.emplace_back();
      for (int64_t dim = 0; are_known && dim < shape.rank().get_length(); ++dim)
        shapes.back().push_back(shape[dim].is_static() ? shape[dim].get_length() : -1);
    }
    if (!are_known || shapes.empty()) {
      set_output_type(0, ov::element::f32, ov::PartialShape::dynamic());
      return;
    }
    std::vector<effattn_tensor> inputs;
    for (const auto& shape : shapes) inputs.push_back(view(nullptr, shape));
    std::vector<int64_t> out(shapes[0].size());
    const char* const error = effattn_shape(operation_.get(), inputs.data(), count(inputs), out.data());
    NODE_VALIDATION_CHECK(this, error == nullptr, error);
    ov::PartialShape shape = get_input_partial_shape(0);  // with its symbols and bounds where a size is kept
    for (size_t dim = 0; dim < out.size(); ++dim)
      if (out[dim] >= 0 || shape[dim].is_static()) shape[dim] = out[dim];
    set_output_type(0, ov::element::f32, shape);
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& given) const override {
    std::vector<std::vector<int64_t>> shapes;
    std::vector<effattn_tensor> inputs;
    for (const ov::Tensor& tensor : given) {
      OPENVINO_ASSERT(tensor.get_element_type() == ov::element::f32, kind_.type.name, ": expected f32, got ",
                      tensor.get_element_type());
      shapes.emplace_back(tensor.get_shape().begin(), tensor.get_shape().end());
    }
    for (size_t i = 0; i < given.size(); ++i)
      inputs.push_back(view(const_cast<void*>(given[i].data()), shapes[i]));
    std::call_once(packing_, [&] {
      if (weights_are_constant()) require(effattn_pack(operation_.get(), inputs.data(), count(inputs)));
    });
    std::vector<int64_t> shape(shapes.at(0).size());
    require(effattn_shape(operation_.get(), inputs.data(), count(inputs), shape.data()));
    outputs.at(0).set_shape(ov::Shape(shape.begin(), shape.end()));
    const effattn_tensor output = view(outputs[0].data(), shape);
    const effattn_threads threads{tbb::this_task_arena::max_concurrency(), nullptr, &run};
    require(effattn_run(operation_.get(), inputs.data(), count(inputs), &output, &threads));
    return true;
  }

 private:
  static effattn_tensor view(void* data, const std::vector<int64_t>& shape) {
    return {data, EFFATTN_FLOAT32, static_cast<int32_t>(shape.size()), shape.data(), nullptr};
  }
  static int32_t count(const std::vector<effattn_tensor>& inputs) {
    return static_cast<int32_t>(inputs.size());
  }

  static void run(void*, int64_t count, void (*task)(void*, int64_t), void* context) {
    // A thread that waits for the tasks takes no others meanwhile.
    tbb::this_task_arena::isolate([&] {
      tbb::parallel_for(int64_t{0}, count, [&](int64_t i) { task(context, i); }, tbb::simple_partitioner());
    });
  }

  std::unique_ptr<effattn_operation, Destroy> create() const {
    const int64_t format = static_cast<int64_t>(values_[0]);
    OPENVINO_ASSERT(format == effattn_format(), "effattn ", effattn_version(), ": ", kind_.type.name,
                    ": reads models of format ", effattn_format(), ", this one is of format ", format,
                    "; export it again with this version, or load the library that belongs to it");
    std::vector<effattn_attribute> attributes;
    for (size_t i = 1; i < values_.size(); ++i) attributes.push_back({kind_.attributes[i].name, values_[i]});
    effattn_operation* created = nullptr;
    require(effattn_create(kind_.type.name, attributes.data(), static_cast<int32_t>(attributes.size()),
                           &created));
    return std::unique_ptr<effattn_operation, Destroy>(created);
  }

  bool weights_are_constant() const {
    for (size_t i = effattn_activations(kind_.type.name); i < get_input_size(); ++i)
      if (!ov::is_type<ov::op::v0::Constant>(get_input_node_ptr(i))) return false;
    return true;
  }

  const Kind& kind_;
  std::vector<double> values_;
  std::unique_ptr<effattn_operation, Destroy> operation_;
  mutable std::once_flag packing_;
};

// Of models in IR.
class Extension : public ov::BaseOpExtension {
 public:
  explicit Extension(const Kind& kind) : kind_(kind) {}
  const ov::DiscreteTypeInfo& get_type_info() const override { return kind_.type; }
  ov::OutputVector create(const ov::OutputVector& inputs, ov::AttributeVisitor& visitor) const override {
    const auto made = std::make_shared<Operation>(kind_);
    made->set_arguments(inputs);
    if (made->visit_attributes(visitor)) made->constructor_validate_and_infer_types();
    return made->outputs();
  }
  std::vector<ov::Extension::Ptr> get_attached_extensions() const override { return {}; }

 private:
  const Kind& kind_;
};

ov::OutputVector convert(const Kind& kind, const ov::frontend::NodeContext& node) {
  ov::OutputVector inputs;
  for (size_t i = 0; i < node.get_input_size(); ++i) inputs.push_back(node.get_input(static_cast<int>(i)));
  std::vector<double> values;
  for (const effattn_attribute_spec& spec : kind.attributes) {
    const bool is_given = node.has_attribute(spec.name);
    OPENVINO_ASSERT(is_given || !spec.is_required, kind.type.name, ": expected an attribute ", spec.name);
    values.push_back(!is_given         ? 0
                     : spec.is_integer ? static_cast<double>(node.get_attribute<int64_t>(spec.name))
                                       : static_cast<double>(node.get_attribute<float>(spec.name)));
  }
  return std::make_shared<Operation>(kind, inputs, values)->outputs();
}

std::vector<ov::Extension::Ptr> all() {
  OPENVINO_ASSERT(effattn_interface() == EFFATTN_INTERFACE,
                  "effattn: this extension does not fit the libeffattn_kernels of effattn ",
                  effattn_version());
  // Operations refer to them for as long as there are any.
  static const std::vector<std::unique_ptr<const Kind>> kinds = [] {
    std::vector<std::unique_ptr<const Kind>> made;
    for (const char* const* name = effattn_operations(); *name != nullptr; ++name)
      made.push_back(std::make_unique<const Kind>(*name));
    return made;
  }();
  std::vector<ov::Extension::Ptr> extensions;
  for (const auto& kind : kinds) {
    const Kind* const of = kind.get();
    extensions.push_back(std::make_shared<Extension>(*of));
    extensions.push_back(std::make_shared<ov::frontend::onnx::ConversionExtension>(
        of->type.name, "effattn",
        [of](const ov::frontend::NodeContext& node) { return convert(*of, node); }));
  }
  return extensions;
}

}  // namespace

OPENVINO_CREATE_EXTENSIONS(all())
