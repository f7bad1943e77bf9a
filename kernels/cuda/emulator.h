// The host's form of device.h, for tests: blocks run one after the other, clusters of them together, each
// thread a fiber. Shared memory is exactly as large as a launch says, and full of NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../dtype.h"

#define EFFATTN_KERNEL(threads, blocks) void
#define EFFATTN_PARAMETERS(type) const type&
#define EFFATTN_DEVICE inline

namespace effattn::cuda {

int thread_index();
int64_t block_index();
int cluster_rank();
char* shared_memory();
void sync_block();
void sync_warp();
void sync_cluster();
float exchange(float x, int bits);
float of_cluster(const float* shared, int rank);
void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]);

// Runs `body` in every thread of every block. EFFATTN_EMULATOR_ORDER=backwards has the last thread of a block
// go first, which changes nothing unless a barrier is missing.
void emulate(int64_t blocks, int threads, int64_t shared_bytes, int cluster, void (*body)(const void*),
             const void* context);

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float exponential(float x) { return std::exp(x); }

inline float widened(float x) { return x; }
inline float widened(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
float widened(Float16 x);
template <class T>
T narrowed(float x);

template <class Words>
Words load_words(const void* from) {
  return *static_cast<const Words*>(from);  // of a type that is aligned: sanitizers look
}
template <class Words>
void store_words(void* to, const Words& x) {
  *static_cast<Words*>(to) = x;
}

}  // namespace effattn::cuda
