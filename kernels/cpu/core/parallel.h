// How kernels ask for threads without knowing whose they are.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>

namespace effattn::cpu {

constexpr int64_t kMinWorkPerThread = 200000;  // multiply-adds, about 4 us: below, waking a thread costs more
// Up to so many multiply-adds, about two milliseconds, a thread that has slept is not waited for: it may wake
// up on its caller's core and stay there until the scheduler's next ticks, 4 to 8 ms.
constexpr int64_t kMaxWorkBesideSleepers = 100'000'000;

struct Parallel {
  int threads;    // how many may run at once; changes speed only, never results
  bool sleeping;  // whether all but the caller's have not been used for long
  // Calls body(context, begin, end) for disjoint ranges that cover [0, count), one a thread if there are as
  // many threads, and returns when all are done. `body` throws nothing.
  void (*run)(const void* pool, int64_t count, void (*body)(const void*, int64_t, int64_t),
              const void* context);
  const void* pool;  // handed to `run`: whose threads these are

  // Calls f(begin, end) for disjoint ranges that cover [0, count), of units of so many multiply-adds each. A
  // thread that is done takes a part of what is left, ever smaller parts down to what is worth a thread:
  // cores differ in speed, and one that is disturbed must not hold up the others. What f throws comes out
  // here, whatever pool it goes through; if several threads fail, one of them is heard.
  template <class F>
  void operator()(int64_t count, int64_t unit_work, const F& f) const {
    if (unit_work < 1) unit_work = 1;
    const int64_t grain = unit_work < kMinWorkPerThread ? kMinWorkPerThread / unit_work : 1;
    const int64_t grains = (count + grain - 1) / grain;
    const bool alone = sleeping && count <= kMaxWorkBesideSleepers / unit_work;
    const int64_t workers = alone ? 1 : grains < threads ? grains : threads;
    if (workers <= 1) {
      if (count > 0) f(int64_t{0}, count);
      return;
    }
    struct Shared {
      const F& f;
      int64_t count, grain, workers;
      mutable std::atomic<int64_t> taken{0};
      mutable std::atomic_flag failed{};
      mutable std::exception_ptr error{};

      void work() const {
        try {
          take_parts();
        } catch (...) {
          if (!failed.test_and_set()) error = std::current_exception();
        }
      }
      void take_parts() const {
        int64_t begin = taken.load(std::memory_order_relaxed);
        while (begin < count) {
          const int64_t left = count - begin;
          const int64_t part = left / (2 * workers) < grain ? grain : left / (2 * workers);
          const int64_t end = part < left ? begin + part : count;
          if (taken.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
            f(begin, end);
            begin = end;
          }
        }
      }
    } shared{f, count, grain, workers};
    run(
        pool, workers,
        [](const void* context, int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) static_cast<const Shared*>(context)->work();
        },
        &shared);
    if (shared.error != nullptr) std::rethrow_exception(shared.error);
  }
};

}  // namespace effattn::cpu
