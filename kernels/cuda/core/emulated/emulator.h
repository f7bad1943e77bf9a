// The host's form of device.h, for tests: blocks run one after the other, clusters of them together, each
// thread a fiber. Shared memory is exactly as large as a launch says, and full of NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#include "../../../params/dtype.h"

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
float shfl_xor(float x, int bits);
float load_dsmem(const float* shared, int rank);
void mma_m16n8k8_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]);
template <class T>
void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <bool kTransposed>
void ldmatrix_x4(uint32_t (&x)[4], const void* row);
// What is asked for lands when this thread waits for it, and not before.
void cp_async_16(void* shared, const void* global, bool inside);
void cp_async_commit();
void cp_async_wait(int pending);
template <int kPending>
void cp_async_wait() {
  cp_async_wait(kPending);
}
void grid_dependency_wait();
inline void grid_dependency_launch() {}

struct EmulatedLaunch {
  int64_t blocks = 0;
  int threads = 0;
  int64_t shared_bytes = 0;
  int cluster = 1;
  bool is_dependent = false;
  std::function<void()> body;  // of a thread
};

// A launch begins as late as it may: when another one has to wait for it, or a call ends. A dependent launch
// begins before those in front of it, which run when all threads of its first cluster wait, so that what
// these do too early shows. EFFATTN_EMULATOR_ORDER=backwards has the last thread of a block go first, which
// changes nothing unless a barrier is missing.
void emulate(EmulatedLaunch launch);
void run_launches();

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
inline float exp2_approx(float x) { return std::exp2(x); }
inline float rcp_approx(float x) { return 1 / x; }

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
float to_float(Float16 x);
template <class T>
T from_float(float x);

inline float fma_rn(float x, float y, float z) { return std::fma(x, y, z); }
template <class T>
uint32_t pack(float first, float second) {
  return from_float<T>(first).bits | static_cast<uint32_t>(from_float<T>(second).bits) << 16;
}
inline uint32_t low_halves(uint32_t first, uint32_t second) { return (first & 0xffff) | second << 16; }
inline uint32_t high_halves(uint32_t first, uint32_t second) { return first >> 16 | (second & 0xffff0000u); }
template <class T>
uint32_t relu_pair(uint32_t x) {
  const auto half = [](uint32_t bits) {
    const T one{static_cast<uint16_t>(bits)};
    return to_float(one) <= 0 ? 0u : uint32_t{one.bits};
  };
  return half(x & 0xffff) | half(x >> 16) << 16;
}

template <class Words>
Words load_words(const void* from) {
  return *static_cast<const Words*>(from);  // of a type that is aligned: sanitizers look
}
template <class Words>
Words shared_words(const void* from) {
  return load_words<Words>(from);
}
template <class Words>
void store_words(void* to, const Words& x) {
  *static_cast<Words*>(to) = x;
}

}  // namespace effattn::cuda
