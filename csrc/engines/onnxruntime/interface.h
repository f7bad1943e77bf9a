// What this library uses of onnxruntime's C interface, in its version 17 (onnxruntime 1.17). The headers are
// in no wheel, and the interface is stable: a function keeps its place in the table for ever, a struct of
// version 17 its layout. Later versions of onnxruntime give out the tables of earlier ones.
#pragma once

#include <cstddef>
#include <cstdint>

namespace effattn::engines::ort {

constexpr uint32_t kVersion = 17;
constexpr uint32_t kOldestVersion = 1;  // which can make an error at least

struct Status;
struct SessionOptions;
struct CustomOpDomain;
struct KernelInfo;
struct KernelContext;
struct ShapeInferContext;
struct TensorInfo;  // OrtTensorTypeAndShapeInfo
struct Value;
struct OpAttr;

enum ErrorCode : int { kFail = 1 };
enum ElementType : int { kFloat = 1 };
enum AttributeType : int { kInt = 1, kFloatAttribute = 3 };
enum Characteristic : int { kRequired = 0, kVariadic = 2 };

struct ApiBase {
  const void* const* (*get_api)(uint32_t version);
  const char* (*version)();
};

// A function of the table, by its place there.
template <size_t kPlace, class Result, class... Arguments>
struct Function {
  Result operator()(const void* const* table, Arguments... arguments) const {
    return reinterpret_cast<Result (*)(Arguments...)>(const_cast<void*>(table[kPlace]))(arguments...);
  }
};
template <size_t kPlace, class... Arguments>
using Call = Function<kPlace, Status*, Arguments...>;

inline constexpr Call<0, ErrorCode, const char*> create_status;
inline constexpr Function<93, void, Status*> release_status;
inline constexpr Call<26, const char*, CustomOpDomain**> create_domain;
inline constexpr Call<27, CustomOpDomain*, const struct CustomOp*> add_to_domain;
inline constexpr Call<28, SessionOptions*, CustomOpDomain*> add_domain;
inline constexpr Call<51, Value*, void**> tensor_data;
inline constexpr Call<57, TensorInfo**> create_tensor_info;
inline constexpr Call<58, TensorInfo*, ElementType> set_element_type;
inline constexpr Call<59, TensorInfo*, const int64_t*, size_t> set_dimensions;
inline constexpr Call<61, const TensorInfo*, size_t*> dimension_count;
inline constexpr Call<62, const TensorInfo*, int64_t*, size_t> dimensions;
inline constexpr Call<63, const TensorInfo*, const char**, size_t> symbolic_dimensions;
inline constexpr Call<65, const Value*, TensorInfo**> tensor_info;
inline constexpr Call<85, const KernelInfo*, const char*, float*> float_attribute;
inline constexpr Call<86, const KernelInfo*, const char*, int64_t*> integer_attribute;
inline constexpr Call<88, const KernelContext*, size_t*> input_count;
inline constexpr Call<90, const KernelContext*, size_t, const Value**> input;
inline constexpr Call<91, KernelContext*, size_t, const int64_t*, size_t, Value**> output;
inline constexpr Function<99, void, TensorInfo*> release_tensor_info;
inline constexpr Call<230, const KernelInfo*, size_t*> kernel_input_count;
inline constexpr Call<249, const KernelInfo*, size_t, int*, const Value**> constant_input;
inline constexpr Call<267, const ShapeInferContext*, size_t*> inferred_input_count;
inline constexpr Call<268, const ShapeInferContext*, size_t, TensorInfo**> inferred_input;
inline constexpr Call<269, const ShapeInferContext*, const char*, const OpAttr**> inferred_attribute;
inline constexpr Call<270, const ShapeInferContext*, size_t, const TensorInfo*> set_inferred_output;
inline constexpr Call<271, TensorInfo*, const char**, size_t> set_symbolic_dimensions;
inline constexpr Call<272, const OpAttr*, AttributeType, void*, size_t, size_t*> read_attribute;
inline constexpr Call<274, const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*> parallel_for;

// OrtCustomOp. Members that are null here are asked for by none that is version 17 and has the ones behind
// them.
struct CustomOp {
  uint32_t version = kVersion;
  void* (*create_kernel)(const CustomOp*, const void* const*, const KernelInfo*) = nullptr;
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  ElementType (*input_type)(const CustomOp*, size_t);
  size_t (*input_type_count)(const CustomOp*);
  ElementType (*output_type)(const CustomOp*, size_t);
  size_t (*output_type_count)(const CustomOp*);
  void (*compute)(void*, KernelContext*) = nullptr;
  void (*destroy_kernel)(void*);
  Characteristic (*input_characteristic)(const CustomOp*, size_t);
  Characteristic (*output_characteristic)(const CustomOp*, size_t);
  int (*input_memory_type)(const CustomOp*, size_t);
  int (*variadic_input_min_arity)(const CustomOp*);
  int (*variadic_input_homogeneity)(const CustomOp*);
  int (*variadic_output_min_arity)(const CustomOp*);
  int (*variadic_output_homogeneity)(const CustomOp*);
  Status* (*create_kernel_v2)(const CustomOp*, const void* const*, const KernelInfo*, void**);
  Status* (*compute_v2)(void*, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, ShapeInferContext*);
  int (*start_version)(const CustomOp*);
  int (*end_version)(const CustomOp*);
  // Of version 18; room for who looks at them all the same.
  size_t (*may_inplace)(int**, int**) = nullptr;
  void (*release_may_inplace)(int*, int*) = nullptr;
  size_t (*alias_map)(int**, int**) = nullptr;
  void (*release_alias_map)(int*, int*) = nullptr;
};

}  // namespace effattn::engines::ort
