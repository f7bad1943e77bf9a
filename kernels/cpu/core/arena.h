// Memory for kernels to work in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "../../params/sizes.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace effattn::cpu {

constexpr int64_t kKeptFloats = 1 << 20;

// Between pieces of one allocation, into which an address sanitizer cannot see: in a sanitized build pieces
// are followed by a gap that must not be touched, and hold NaN until something is written.
#ifdef __SANITIZE_ADDRESS__
constexpr int64_t kGapFloats = 16;
inline void poison(float* from, int64_t floats) { ASAN_POISON_MEMORY_REGION(from, floats * sizeof(float)); }
inline void spoil(float* piece, int64_t floats) {
  ASAN_UNPOISON_MEMORY_REGION(piece, floats * sizeof(float));
  for (int64_t i = 0; i < floats; ++i) piece[i] = __builtin_nanf("");
}
#else
constexpr int64_t kGapFloats = 0;
inline void poison(float*, int64_t) {}
inline void spoil(float*, int64_t) {}
#endif

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

inline Floats aligned_floats(int64_t count) {
  Floats floats(static_cast<float*>(std::aligned_alloc(64, round_up(max(1, count) * 4, 64))));
  if (floats == nullptr) {
    throw std::runtime_error("effattn: cannot allocate " + std::to_string(4 * count) + " bytes to work in");
  }
  return floats;
}

// Memory that a thread keeps between calls, a piece for each purpose: at most four times what the last one
// needed, or kKeptFloats. Calls of two sizes in turn find it as they left it.
enum class Purpose { kWork, kProjection, kBetweenThreads };
template <Purpose = Purpose::kWork>
inline float* thread_scratch(int64_t floats) {
  thread_local Floats memory;
  thread_local int64_t capacity = 0;
  if (capacity < floats || capacity > max(4 * floats, kKeptFloats)) {
    capacity = 0;
    memory.reset();
    memory = aligned_floats(floats);
    capacity = floats;
  }
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(memory.get(), capacity * sizeof(float));  // passes leave their gaps behind
#endif
  return memory.get();
}

}  // namespace effattn::cpu
