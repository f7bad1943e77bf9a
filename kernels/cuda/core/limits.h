// The largest sizes of a call that an operator's kernels take, registered beside what launches them. The
// library tells callers, who may have other kernels for the rest.
#pragma once

#include <initializer_list>
#include <map>
#include <string>

namespace effattn::cuda {

// Of every operator, the text for callers; in the order of their names, whatever the linker's order is.
inline std::map<std::string, std::string>& registered_limits() {
  static std::map<std::string, std::string> limits;
  return limits;
}

struct Limit {
  const char* size;  // a name of the operator's LIMITED in effattn/ops
  int max;
};

// A static object registers an operator.
struct RegisteredOperator {
  RegisteredOperator(const std::string& name, std::initializer_list<Limit> limits) {
    std::string& text = registered_limits()[name] = name;
    for (const Limit& limit : limits) text += " " + name + "." + limit.size + "=" + std::to_string(limit.max);
  }
};

inline std::string limits_text() {
  std::string text;
  for (const auto& [name, limits] : registered_limits()) text += (text.empty() ? "" : " ") + limits;
  return text;
}

}  // namespace effattn::cuda
