/* The C interface from C: threads of its own, every error, and one operation against a plain loop. Prints
 * what failed; returns 0 if nothing did. */
#include <math.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "effattn_kernels.h"

static int failures = 0;

static void expect(int holds, const char* what) {
  if (holds) return;
  printf("failed: %s\n", what);
  ++failures;
}

/* That a call fails, and says this. */
static void expect_error(const char* error, const char* text) {
  if (error != NULL && strstr(error, text) != NULL) return;
  printf("failed: expected \"%s\", got \"%s\"\n", text, error == NULL ? "NULL" : error);
  ++failures;
}

/* A pool that starts a thread for every task, the last first. */
typedef struct {
  void (*task)(void*, int64_t);
  void* context;
  int64_t i;
} job;

static void* work(void* of) {
  const job* const one = of;
  one->task(one->context, one->i);
  return NULL;
}

static int runs = 0;

static void run(void* pool, int64_t count, void (*task)(void*, int64_t), void* context) {
  pthread_t threads[64];
  job jobs[64];
  ++*(int*)pool;
  for (int64_t i = count; i-- > 0;) {
    jobs[i].task = task;
    jobs[i].context = context;
    jobs[i].i = i;
    pthread_create(&threads[i], NULL, work, &jobs[i]);
  }
  for (int64_t i = 0; i < count; ++i) pthread_join(threads[i], NULL);
}

enum { kGroups = 6, kQueries = 300, kKeys = 200, kDim = 16, kValues = 8 };
static float q[kGroups][kQueries][kDim], k[kGroups][kKeys][kDim], v[kGroups][kKeys][kValues];
static float out[kGroups][kQueries][kValues], again[kGroups][kQueries][kValues];
/* Long enough for several threads to sum up parts of a group. */
enum { kLongGroups = 3, kLongTokens = 20000 };
static float outer_in[kLongGroups][kLongTokens][kDim], inner_in[kLongGroups][kLongTokens][kDim];
static float outer_out[kLongGroups][kLongTokens][kDim], outer_again[kLongGroups][kLongTokens][kDim];
static float inner_out[kLongGroups][kLongTokens][kDim];

/* Runs its tasks, and then another call on the same thread, before it returns. */
typedef struct {
  effattn_operation* operation;
  const effattn_tensor* inputs;
  effattn_tensor output;
  int calls, is_inside;
} nested;

static void run_nested(void* pool, int64_t count, void (*task)(void*, int64_t), void* context) {
  nested* const inner = pool;
  for (int64_t i = 0; i < count; ++i) task(context, i);
  if (inner->is_inside) return;
  const effattn_threads same = {4, inner, run_nested};
  inner->is_inside = 1;
  expect(effattn_run(inner->operation, inner->inputs, 3, &inner->output, &same) == NULL, "the inner call");
  inner->is_inside = 0;
  ++inner->calls;
}

static void fill(float* numbers, size_t count) {
  static unsigned state = 1;
  for (size_t i = 0; i < count; ++i) {
    state = state * 1664525u + 1013904223u;
    numbers[i] = (float)(state >> 8) / (1 << 23) - 1.0f;
  }
}

static double relu(double x) { return x > 0 ? x : 0; }

static double largest_error(void) {
  double largest = 0;
  for (int g = 0; g < kGroups; ++g) {
    for (int n = 0; n < kQueries; ++n) {
      double sums[kValues] = {0}, weight_sum = 1e-5;
      for (int m = 0; m < kKeys; ++m) {
        double weight = 0;
        for (int d = 0; d < kDim; ++d) weight += relu(q[g][n][d]) * relu(k[g][m][d]);
        for (int d = 0; d < kValues; ++d) sums[d] += weight * v[g][m][d];
        weight_sum += weight;
      }
      for (int d = 0; d < kValues; ++d) {
        const double error = fabs(out[g][n][d] - sums[d] / weight_sum);
        if (!(error <= largest)) largest = error;
      }
    }
  }
  return largest;
}

/* The operation's name comes from outside: that of linear attention of (..., tokens, channels). */
int main(int count, char** arguments) {
  if (count != 2) return 2;
  const int64_t q_shape[] = {kGroups, kQueries, kDim}, k_shape[] = {kGroups, kKeys, kDim};
  const int64_t v_shape[] = {kGroups, kKeys, kValues}, out_shape[] = {kGroups, kQueries, kValues};
  const char* const name = arguments[1];
  const effattn_attribute eps = {"eps", 1e-5}, unknown = {"epsilon", 1e-5}, negative = {"eps", -1};
  effattn_tensor inputs[] = {{q, EFFATTN_FLOAT32, 3, q_shape, NULL},
                             {k, EFFATTN_FLOAT32, 3, k_shape, NULL},
                             {v, EFFATTN_FLOAT32, 3, v_shape, NULL}};
  effattn_tensor output = {out, EFFATTN_FLOAT32, 3, out_shape, NULL};
  const effattn_threads threads = {4, &runs, run};
  effattn_operation* operation = NULL;
  int64_t shape[3] = {0};

  expect(effattn_interface() == EFFATTN_INTERFACE, "the header is that of the library");
  expect(effattn_format() == EFFATTN_FORMAT, "the format is that of the library");
  expect(strlen(effattn_version()) >= 5, "a version");
  expect(effattn_attributes("none") == NULL && effattn_activations("none") == 0, "no such operation");
  int found = 0;
  for (const char* const* one = effattn_operations(); *one != NULL; ++one) {
    found += strcmp(*one, name) == 0;
    expect(effattn_attributes(*one) != NULL && effattn_activations(*one) > 0, *one);
  }
  expect(found == 1, "the operation is known");

  expect_error(effattn_create("none", NULL, 0, &operation), "has no operation none");
  expect_error(effattn_create(NULL, NULL, 0, &operation), "has no operation NULL");
  expect_error(effattn_create(name, NULL, 0, &operation), "expected an attribute eps");
  expect_error(effattn_create(name, &unknown, 1, &operation), "has no attribute epsilon");
  expect_error(effattn_create(name, &negative, 1, &operation), "eps: expected a number >= 0");
  expect_error(effattn_create(name, NULL, 1, &operation), "expected attributes, got NULL");
  expect_error(effattn_create(name, &eps, -1, &operation), "expected attributes");
  expect_error(effattn_create(name, &eps, 1, NULL), "expected where to put the operation, got NULL");
  expect(operation == NULL, "nothing was created");
  expect(effattn_create(name, &eps, 1, &operation) == NULL && operation != NULL, "an operation");

  fill(&q[0][0][0], sizeof q / sizeof(float));
  fill(&k[0][0][0], sizeof k / sizeof(float));
  fill(&v[0][0][0], sizeof v / sizeof(float));
  expect(effattn_shape(operation, inputs, 3, shape) == NULL, "a shape");
  expect(memcmp(shape, out_shape, sizeof shape) == 0, "the shape");
  expect(effattn_run(operation, inputs, 3, &output, &threads) == NULL, "a call");
  expect(runs > 0, "the threads were used");
  expect(largest_error() < 1e-5, "the result");
  output.data = again;
  expect(effattn_run(operation, inputs, 3, &output, NULL) == NULL, "a call without threads");
  expect(memcmp(out, again, sizeof out) == 0, "the same bits without threads");

  expect_error(effattn_run(operation, inputs, 2, &output, NULL), "expected inputs, at least 3, got 2");
  expect_error(effattn_shape(operation, inputs, -1, shape), "expected inputs");
  inputs[1].shape = v_shape;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "k: expected size 16 of dimension 2, got 8");
  inputs[1].shape = k_shape;
  inputs[2].data = NULL;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "input 2: expected data, got NULL");
  inputs[2].data = v;
  inputs[2].dtype = EFFATTN_FLOAT16;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL),
               "input 2: expected activations of one dtype");
  inputs[2].dtype = EFFATTN_FLOAT32;
  inputs[0].rank = 1;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "q: expected shape (..., N, D)");
  inputs[0].rank = -1;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "input 0: expected up to 64 dimensions");
  inputs[0].rank = 3;
  output.shape = q_shape;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "output: expected shape (6, 300, 8)");
  output.shape = out_shape;
  output.data = NULL;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "output: expected data, got NULL");
  const int64_t huge[] = {INT64_MAX / 4, INT64_MAX / 4, kDim};
  inputs[0].shape = inputs[1].shape = inputs[2].shape = huge;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "elements can be counted");
  const int64_t below_zero[] = {-5, kQueries, kDim};
  inputs[0].shape = inputs[1].shape = inputs[2].shape = below_zero;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "input 0: expected sizes");

  inputs[0].shape = NULL;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "input 0: expected a shape, got NULL");
  inputs[0].shape = q_shape;
  inputs[1].shape = k_shape;
  inputs[2].shape = v_shape;
  expect_error(effattn_shape(operation, inputs, 3, NULL), "expected where to put the shape, got NULL");
  expect_error(effattn_run(operation, inputs, 3, NULL, NULL), "output: expected a tensor");
  expect_error(effattn_run(NULL, inputs, 3, &output, NULL), "expected an operation, got NULL");
  output.shape = NULL;
  output.data = again;
  expect_error(effattn_run(operation, inputs, 3, &output, NULL), "output: expected a tensor with a shape");
  output.shape = out_shape;

  /* A pool whose waiting thread begins another call, as those that steal work do. */
  const int64_t long_shape[] = {kLongGroups, kLongTokens, kDim};
  fill(&outer_in[0][0][0], sizeof outer_in / sizeof(float));
  fill(&inner_in[0][0][0], sizeof inner_in / sizeof(float));
  const effattn_tensor of_outer = {outer_in, EFFATTN_FLOAT32, 3, long_shape, NULL};
  const effattn_tensor of_inner = {inner_in, EFFATTN_FLOAT32, 3, long_shape, NULL};
  const effattn_tensor outer_inputs[] = {of_outer, of_outer, of_outer};
  const effattn_tensor inner_inputs[] = {of_inner, of_inner, of_inner};
  effattn_tensor long_output = {outer_out, EFFATTN_FLOAT32, 3, long_shape, NULL};
  expect(effattn_run(operation, outer_inputs, 3, &long_output, NULL) == NULL, "a long call");
  nested inner = {operation, inner_inputs, {inner_out, EFFATTN_FLOAT32, 3, long_shape, NULL}, 0, 0};
  const effattn_threads stealing = {4, &inner, run_nested};
  long_output.data = outer_again;
  expect(effattn_run(operation, outer_inputs, 3, &long_output, &stealing) == NULL, "a call with one inside");
  expect(inner.calls > 0, "one inside");
  expect(memcmp(outer_out, outer_again, sizeof outer_out) == 0, "the same bits around another call");

  effattn_destroy(operation);
  effattn_destroy(NULL);
  if (failures == 0) printf("passed\n");
  return failures != 0;
}
