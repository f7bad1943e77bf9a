// Images of any dtype and any strides, to tiles and back.
#pragma once

#include "image.h"
#include "tile.h"

namespace effattn::cpu::EFFATTN_ISA {

template <class T>
Place<T> place(const Image& image, int64_t token) {
  return {static_cast<T*>(image.data) + token * image.token_stride, image.token_stride, image.channel_stride};
}

template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBFloat16:
      return f(BFloat16{});
    case DType::kFloat16:
      return f(Float16{});
    default:
      return f(float{});
  }
}

// `channels` of an image from `token` on.
inline void load_image(DType dtype, const Image& image, int64_t token, int64_t tokens, int64_t channels,
                       const Tile& to) {
  with_type(dtype, [&](auto type) {
    load_tile<false>(to, place<const decltype(type)>(image, token), tokens, channels);
  });
}

inline void store_image(DType dtype, const Image& image, int64_t token, int64_t tokens, int64_t channels,
                        const Tile& from) {
  with_type(dtype,
            [&](auto type) { store_tile(from, place<decltype(type)>(image, token), tokens, channels); });
}

}  // namespace effattn::cpu::EFFATTN_ISA
