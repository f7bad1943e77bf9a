/* effattn's CPU kernels for other hosts than PyTorch: the C interface of libeffattn_kernels.
 *
 * An operation is created by its name and attributes (docs/guide/hosts.md lists them), may be given its
 * weights once, and then run on tensors from any number of threads at once. Memory and threads are the
 * caller's.
 *
 * Functions that can fail return NULL, or what is wrong: a text that is valid until the same thread's next
 * call.
 */
#ifndef EFFATTN_KERNELS_H
#define EFFATTN_KERNELS_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define EFFATTN_API __attribute__((visibility("default")))

/* Of the structs and the meaning of the functions below. A host compares it with effattn_interface(). */
#define EFFATTN_INTERFACE 1

/* Of the operations' inputs and attributes: what an exported model says it was written in. */
#define EFFATTN_FORMAT 1

typedef enum { EFFATTN_FLOAT32 = 0, EFFATTN_BFLOAT16 = 1, EFFATTN_FLOAT16 = 2 } effattn_dtype;

typedef struct {
  void* data;
  effattn_dtype dtype;
  int32_t rank;
  const int64_t* shape;   /* outermost first */
  const int64_t* strides; /* in elements; NULL: dense, the last dimension innermost */
} effattn_tensor;

typedef struct {
  const char* name;
  double value;
} effattn_attribute;

/* An attribute that an operation has. One that is not required is 0 where it is not given. */
typedef struct {
  const char* name;
  int32_t is_integer;
  int32_t is_required;
} effattn_attribute_spec;

/* Whose threads a call may use. `run` calls task(context, i) once for every i from 0 to count - 1, in any
 * order and on any threads, and returns when all are done; a task throws nothing. How many threads there are
 * changes how fast a result comes, never its bits. */
typedef struct {
  int32_t count; /* the most tasks that can run at once */
  void* pool;    /* handed to `run` */
  void (*run)(void* pool, int64_t count, void (*task)(void* context, int64_t i), void* context);
} effattn_threads;

typedef struct effattn_operation effattn_operation;

/* EFFATTN_INTERFACE and EFFATTN_FORMAT of the library, and the version of effattn, "0.1.0". */
EFFATTN_API int32_t effattn_interface(void);
EFFATTN_API int32_t effattn_format(void);
EFFATTN_API const char* effattn_version(void);

/* The names of all operations, NULL behind the last. */
EFFATTN_API const char* const* effattn_operations(void);

/* The attributes of one, a name of NULL behind the last; NULL for a name that is none. */
EFFATTN_API const effattn_attribute_spec* effattn_attributes(const char* operation);

/* How many of its inputs, the first ones, are activations, and no weights; 0 for a name that is none. */
EFFATTN_API int32_t effattn_activations(const char* operation);

EFFATTN_API const char* effattn_create(const char* operation, const effattn_attribute* attributes,
                                       int32_t count, effattn_operation** created);
EFFATTN_API void effattn_destroy(effattn_operation* operation);

/* Takes weights that do not change any more: `inputs` are all inputs, of which activations are ignored. They
 * are laid out for the processor once, which every call would do else. Not while the operation runs. The
 * weights must outlive it, and are given to effattn_run as before. */
EFFATTN_API const char* effattn_pack(effattn_operation* operation, const effattn_tensor* inputs,
                                     int32_t count);

/* Writes the shape of the output: as many dimensions as the first input has. Sizes that are negative are
 * unknown, and come out as -1. Data is not looked at. */
EFFATTN_API const char* effattn_shape(const effattn_operation* operation, const effattn_tensor* inputs,
                                      int32_t count, int64_t* shape);

/* `output` has the shape that effattn_shape says and the dtype of the first input; `threads` may be NULL: the
 * caller's alone. Activations are of one dtype, weights float32 and dense. Memory of inputs and output does
 * not overlap. */
EFFATTN_API const char* effattn_run(const effattn_operation* operation, const effattn_tensor* inputs,
                                    int32_t count, const effattn_tensor* output,
                                    const effattn_threads* threads);

#ifdef __cplusplus
}
#endif

#endif
