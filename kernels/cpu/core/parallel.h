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
constexpr int64_t kMaxOwners = 64;  // of parts of a call: more threads share theirs

struct Parallel {
  int threads;    // how many may run at once; changes speed only, never results
  bool sleeping;  // whether all but the caller's have not been used for long
  // Calls body(context, begin, end) for disjoint ranges that cover [0, count), one a thread if there are as
  // many threads, and returns when all are done. `body` throws nothing.
  void (*run)(const void* pool, int64_t count, void (*body)(const void*, int64_t, int64_t),
              const void* context);
  const void* pool;  // handed to `run`: whose threads these are

  // Calls f(begin, end) for disjoint ranges that cover [0, count), of units of so many multiply-adds each. A
  // thread first takes what is its own, the same part of [0, count) in every call, so that it finds in its
  // cache what it left there; then parts of what others have left, ever smaller ones down to what is worth a
  // thread: cores differ in speed, and one that is disturbed must not hold up the others. What f throws comes
  // out here, whatever pool it goes through; if several threads fail, one of them is heard.
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
      struct alignas(64) Own {
        std::atomic<int64_t> taken;
        int64_t end;
      };
      const F& f;
      const int64_t grain, owners;
      mutable Own own[kMaxOwners];
      mutable std::atomic_flag failed{};
      mutable std::exception_ptr error{};

      Shared(const F& of, int64_t count, int64_t of_grain, int64_t workers)
          : f(of), grain(of_grain), owners(workers < kMaxOwners ? workers : kMaxOwners) {
        for (int64_t i = 0; i < owners; ++i) {
          own[i].taken.store(count * i / owners, std::memory_order_relaxed);
          own[i].end = count * (i + 1) / owners;
        }
      }

      void work(int64_t worker) const {
        try {
          for (int64_t i = 0; i < owners; ++i) take_parts(own[(worker + i) % owners]);
        } catch (...) {
          if (!failed.test_and_set()) error = std::current_exception();
        }
      }
      void take_parts(Own& of) const {
        int64_t begin = of.taken.load(std::memory_order_relaxed);
        while (begin < of.end) {
          const int64_t left = of.end - begin;
          const int64_t part = left / 2 < grain ? grain : left / 2;
          const int64_t end = part < left ? begin + part : of.end;
          if (of.taken.compare_exchange_weak(begin, end, std::memory_order_relaxed)) {
            f(begin, end);
            begin = end;
          }
        }
      }
    } shared{f, count, grain, workers};
    run(
        pool, workers,
        [](const void* context, int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) static_cast<const Shared*>(context)->work(i);
        },
        &shared);
    if (shared.error != nullptr) std::rethrow_exception(shared.error);
  }
};

}  // namespace effattn::cpu
