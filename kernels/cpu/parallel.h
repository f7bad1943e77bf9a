// How kernels ask for threads without knowing whose they are.
#pragma once

#include <cstdint>

namespace effattn::cpu {

struct Parallel {
  int threads;  // how many may run at once; changes speed only, never results
  // Calls body(context, begin, end) for disjoint ranges that cover [0, count), none shorter than
  // `grain` unless it is the last, and returns when all are done.
  void (*run)(int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t), const void* context);

  template <class F>
  void operator()(int64_t count, int64_t grain, const F& f) const {
    if (count <= grain || threads <= 1) {
      if (count > 0) f(int64_t{0}, count);
      return;
    }
    run(
        count, grain,
        [](const void* context, int64_t begin, int64_t end) {
          (*static_cast<const F*>(context))(begin, end);
        },
        &f);
  }
};

}  // namespace effattn::cpu
