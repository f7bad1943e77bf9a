// What was launched last, and for which call: so that an error says where it came from. Of the host; knows no
// CUDA.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <string>

namespace effattn::cuda {

// What stands in `text` after `begin`, as far as one of `ends`.
inline std::string cut(const std::string& text, const std::string& begin, const char* ends) {
  const size_t at = text.find(begin);
  if (at == std::string::npos) return text;
  const size_t from = at + begin.size(), to = text.find_first_of(ends, from);
  return text.substr(from, to == std::string::npos ? to : to - from);
}

// A call of an operator, as the glue describes it: names are literals, sizes those of its first tensor.
struct CallRecord {
  const char* file = "";      // of the glue, which is called like the operator
  const char* function = "";  // of the glue, as the compiler spells it
  const char* dtype = "";
  int rank = 0;  // of which the first kMaxSizes are kept
  int64_t sizes[6] = {};

  static constexpr int kMaxSizes = 6;

  std::string text() const {
    if (*file == '\0') return "a call that nobody described";
    const std::string path = file,
                      spelled = std::string(function).substr(0, std::string(function).find("(const "));
    const size_t slash = path.rfind('/'), name = spelled.find_last_of(": ");
    std::string all = cut(path, slash == std::string::npos ? "" : path.substr(0, slash + 1), ".") + ", ";
    all += spelled.substr(name == std::string::npos ? 0 : name + 1) + ", " + dtype + " (";
    for (int i = 0; i < rank; ++i) {
      all += (i > 0 ? ", " : "") + (i < kMaxSizes ? std::to_string(sizes[i]) : std::string("..."));
      if (i == kMaxSizes) break;
    }
    return all + ")";
  }
};

// Of this thread, from when the glue asks for an execution until it asks for the next.
inline CallRecord& current_call() {
  static thread_local CallRecord call;
  return call;
}

struct LaunchRecord {
  CallRecord call;
  const void* kernel = nullptr;      // for its name
  const char* parameters = nullptr;  // of a function with the type that it takes, the compiler's spelling
  int64_t blocks = 0, shared_bytes = 0;
  int threads = 0, cluster = 1;

  // `name`: the kernel's, or none.
  std::string text(const std::string& name) const {
    if (parameters == nullptr) return "none";
    std::string all = call.text() + ": ";
    all += name.empty() ? "the kernel of " + cut(parameters, "Parameters = ", ";]") : name;
    all += ", " + std::to_string(blocks) + " blocks of " + std::to_string(threads) + " threads";
    if (cluster > 1) all += " in clusters of " + std::to_string(cluster);
    if (shared_bytes > 0) all += ", " + std::to_string(shared_bytes) + " bytes of shared memory";
    return all;
  }
};

// The last two launches of all threads, since an error may be that of the one before.
class LastLaunches {
 public:
  void add(const LaunchRecord& launch) {
    const std::lock_guard<std::mutex> lock(mutex_);
    before_ = last_;
    last_ = launch;
  }
  LaunchRecord last() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return last_;
  }
  LaunchRecord before() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return before_;
  }

 private:
  mutable std::mutex mutex_;
  LaunchRecord last_, before_;
};

inline LastLaunches& last_launches() {
  static LastLaunches record;
  return record;
}

// EFFATTN_CUDA_SYNC=1 or CUDA_LAUNCH_BLOCKING=1: every launch is waited for, and an error is that launch's
// own.
inline bool launches_are_waited_for() {
  static const bool wanted = [] {
    for (const char* name : {"EFFATTN_CUDA_SYNC", "CUDA_LAUNCH_BLOCKING"}) {
      const char* const value = std::getenv(name);
      if (value != nullptr && std::strcmp(value, "1") == 0) return true;
    }
    return false;
  }();
  return wanted;
}

constexpr const char* kAskForSync =
    "; if the error is that of an earlier kernel, EFFATTN_CUDA_SYNC=1 tells of which";

// `error`: what CUDA says before a call launches anything; `last` ran before it and is called `name`.
inline std::string failed_call(const std::string& error, bool is_waited_for, const CallRecord& call,
                               const LaunchRecord& last, const std::string& name) {
  return "effattn: " + error + ", in " + call.text() + "; the launch before it was " + last.text(name) +
         (is_waited_for ? "" : kAskForSync);
}

// `error`: what CUDA says of `launch`, whose kernel is called `name`; `before` ran before it and is called
// `name_before`.
inline std::string failed_launch(const std::string& error, bool is_waited_for, const LaunchRecord& launch,
                                 const std::string& name, const LaunchRecord& before,
                                 const std::string& name_before) {
  std::string text = "effattn: " + error + ", of " + launch.text(name);
  text += "; the launch before it was " + before.text(name_before);
  if (!is_waited_for) text += kAskForSync;
  return text;
}

}  // namespace effattn::cuda
