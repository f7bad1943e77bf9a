// The memory that kernels work in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "rows.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace effattn::cpu {

// Hands out pieces of one allocation, each on a cache line of its own. Without memory it counts: a struct
// that takes its pieces in its constructor also tells how many floats it needs (floats_of).
//
// AddressSanitizer knows allocations only. So in a sanitized build a piece holds NaN until it is written, a
// gap that must not be touched follows it, and nothing behind the last piece may be touched.
class Arena {
 public:
  static constexpr int64_t kAlignment = 16;  // floats of a cache line
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kGap = kAlignment;
#else
  static constexpr int64_t kGap = 0;
#endif
  static constexpr int64_t kMaxOverhead = kAlignment + kGap;  // of a piece

  EFFATTN_INLINE Arena() {}
  EFFATTN_INLINE Arena(float* memory, int64_t floats) : memory_(memory), floats_(floats) {
    poison(0, floats);
  }

  EFFATTN_INLINE float* floats(int64_t count) {
    const int64_t first = taken_, whole = round_up(count, kAlignment);
    taken_ += whole + kGap;
    if (memory_ == nullptr) return nullptr;
    hand_out(first, whole);
    return memory_ + first;
  }
  // An arena inside of this one.
  EFFATTN_INLINE Arena part(int64_t count) { return {floats(count), count}; }
  EFFATTN_INLINE int64_t taken() const { return taken_; }

#ifdef __SANITIZE_ADDRESS__
  // A copy hands the rest to a callee. It is poisoned, so that nobody reads what an earlier callee left
  // there.
  EFFATTN_INLINE Arena(const Arena& other)
      : memory_(other.memory_), floats_(other.floats_), taken_(other.taken_) {
    poison(taken_, floats_ - taken_);
  }
  Arena& operator=(const Arena&) = default;

 private:
  EFFATTN_INLINE void poison(int64_t first, int64_t count) {
    if (memory_ != nullptr) ASAN_POISON_MEMORY_REGION(memory_ + first, count * sizeof(float));
  }
  EFFATTN_INLINE void hand_out(int64_t first, int64_t count) {
    if (taken_ > floats_) __builtin_trap();
    ASAN_UNPOISON_MEMORY_REGION(memory_ + first, count * sizeof(float));
    for (int64_t i = first; i < first + count; ++i) memory_[i] = __builtin_nanf("");
    poison(first + count, kGap);
  }
#else

 private:
  EFFATTN_INLINE void poison(int64_t, int64_t) {}
  EFFATTN_INLINE void hand_out(int64_t, int64_t) {}
#endif

  float* memory_ = nullptr;
  int64_t floats_ = 0, taken_ = 0;
};

// The floats that Pieces(arguments..., arena) takes.
template <class Pieces, class... Arguments>
EFFATTN_INLINE int64_t floats_of(const Arguments&... arguments) {
  Arena counting;
  static_cast<void>(Pieces(arguments..., counting));
  return counting.taken();
}

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Floats = std::unique_ptr<float, Free>;

inline Floats allocate(int64_t count) {
  Floats floats(static_cast<float*>(std::aligned_alloc(64, round_up(max(1, count) * 4, 64))));
  if (floats == nullptr) {
    throw std::runtime_error("effattn: cannot allocate " + std::to_string(4 * count) + " bytes to work in");
  }
  return floats;
}

constexpr int64_t kMaxKeptFloats = 1 << 20;

// Memory that a thread keeps between calls: at most four times what the last one needed, or kMaxKeptFloats.
// Calls of two sizes in turn find it as they left it.
enum class Use { kOwn, kShared };
template <Use>
float* kept_by_thread(int64_t floats) {
  thread_local Floats memory;
  thread_local int64_t capacity = 0;
  if (capacity < floats || capacity > max(4 * floats, kMaxKeptFloats)) {
    capacity = 0;
    memory.reset();
    memory = allocate(floats);
    capacity = floats;
  }
  return memory.get();
}

// What one thread works in. A second call returns the same memory.
inline Arena thread_arena(int64_t floats) { return {kept_by_thread<Use::kOwn>(floats), floats}; }

template <class Pieces, class... Arguments>
Pieces in_thread_arena(const Arguments&... arguments) {
  Arena arena = thread_arena(floats_of<Pieces>(arguments...));
  return Pieces(arguments..., arena);
}

// Whether a thread's shared memory is free. It is not where a pool lets a thread that waits for a call's
// tasks begin another call.
class SharedClaim {
 public:
  SharedClaim() : is_first_(!taken()) { taken() = true; }
  ~SharedClaim() {
    if (is_first_) taken() = false;
  }
  SharedClaim(const SharedClaim&) = delete;
  SharedClaim& operator=(const SharedClaim&) = delete;
  bool is_first() const { return is_first_; }

 private:
  static bool& taken() {
    thread_local bool is_taken = false;
    return is_taken;
  }
  bool is_first_;
};

// Pieces that all threads of a call see. The calling thread keeps their memory unless there is much of it.
template <class Pieces>
class InSharedArena {
 public:
  template <class... Arguments>
  explicit InSharedArena(const Arguments&... arguments)
      : floats_(floats_of<Pieces>(arguments...)),
        large_(floats_ > kMaxKeptFloats || !claim_.is_first() ? allocate(floats_) : nullptr),
        arena_(large_ ? large_.get() : kept_by_thread<Use::kShared>(floats_), floats_),
        pieces_(arguments..., arena_) {}

  const Pieces& operator*() const { return pieces_; }
  const Pieces* operator->() const { return &pieces_; }

 private:
  SharedClaim claim_;
  int64_t floats_;
  Floats large_;
  Arena arena_;
  Pieces pieces_;
};

// What threads sum up in parts, whose number depends on the sizes alone: the parts are then added up in
// order, so that the sum is the same bits for every number of threads.
class PartialSums {
 public:
  float* take(int64_t count, Arena& arena) {
    pieces_.push_back({arena.floats(count), count});
    return pieces_.back().first;
  }
  void clear_all() const {
    for (const auto& [data, count] : pieces_) clear(data, count);
  }
  void add_all(const PartialSums& other) const {
    for (size_t i = 0; i < pieces_.size(); ++i)
      add(pieces_[i].first, other.pieces_[i].first, pieces_[i].second);
  }

 private:
  std::vector<std::pair<float*, int64_t>> pieces_;
};

template <class Sums>
void clear_all(const std::vector<Sums>& parts) {
  for (const Sums& part : parts) part.clear_all();
}
// Adds them all to the first.
template <class Sums>
const Sums& total(const std::vector<Sums>& parts) {
  for (size_t part = 1; part < parts.size(); ++part) parts[0].add_all(parts[part]);
  return parts[0];
}

}  // namespace effattn::cpu
