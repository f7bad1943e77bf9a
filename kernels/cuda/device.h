// What a kernel has of a card, in two forms: that of the device, and with EFFATTN_EMULATED one for the host
// (emulator.h), where each thread of a block is a fiber and every barrier, exchange and product of matrices
// is checked. Kernels use nothing of CUDA but what stands here.
#pragma once

#include <cstdint>
#include <limits>

#include "../dtype.h"
#include "../sizes.h"

#ifdef EFFATTN_EMULATED

#include "emulator.h"

#define EFFATTN_UNROLL
#define EFFATTN_NOT_UNROLLED

#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <type_traits>

// `blocks` of a multiprocessor, at least, for which there are registers: left to itself, the assembler spills
// some to make room for another block.
#define EFFATTN_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define EFFATTN_PARAMETERS(type) const __grid_constant__ type
#define EFFATTN_DEVICE __device__ __forceinline__
#define EFFATTN_UNROLL _Pragma("unroll")
#define EFFATTN_NOT_UNROLLED _Pragma("unroll 1")

namespace effattn::cuda {

EFFATTN_DEVICE int thread_index() { return static_cast<int>(threadIdx.x); }
EFFATTN_DEVICE int64_t block_index() { return blockIdx.x; }
EFFATTN_DEVICE void sync_block() { __syncthreads(); }
EFFATTN_DEVICE void sync_warp() { __syncwarp(); }
// Of the lane whose number differs in these bits.
EFFATTN_DEVICE float exchange(float x, int bits) { return __shfl_xor_sync(0xffffffffu, x, bits); }

// The block's, as many bytes as it was launched with.
EFFATTN_DEVICE char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// Blocks of a cluster run at the same time and see each other's shared memory. Without clusters, one.
EFFATTN_DEVICE int cluster_rank() {
#if __CUDA_ARCH__ >= 900
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
#else
  return 0;
#endif
}
EFFATTN_DEVICE void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  __syncwarp();  // it is for warps that are together
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// What stands at this address of another block's shared memory.
EFFATTN_DEVICE float of_cluster(const float* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  uint32_t address;
  float x;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(address)
      : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(shared))), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(address) : "memory");
  return x;
#else
  return *shared;
#endif
}

EFFATTN_DEVICE uint32_t bits_of(float x) { return __float_as_uint(x); }
EFFATTN_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }

EFFATTN_DEVICE float exponential(float x) { return expf(x); }

EFFATTN_DEVICE float widened(float x) { return x; }
EFFATTN_DEVICE float widened(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
EFFATTN_DEVICE float widened(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
// To nearest even.
template <class T>
EFFATTN_DEVICE T narrowed(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return {__half_as_ushort(__float2half_rn(x))};
  }
}

// Memory that no thread writes while the kernel runs, 4, 8 or 16 bytes at once.
template <class Words>
EFFATTN_DEVICE Words load_words(const void* from) {
  if constexpr (sizeof(Words) == 16) {
    const uint4 x = __ldg(static_cast<const uint4*>(from));
    return {{x.x, x.y, x.z, x.w}};
  } else if constexpr (sizeof(Words) == 8) {
    const uint2 x = __ldg(static_cast<const uint2*>(from));
    return {{x.x, x.y}};
  } else {
    return {{__ldg(static_cast<const uint32_t*>(from))}};
  }
}
template <class Words>
EFFATTN_DEVICE void store_words(void* to, const Words& x) {
  if constexpr (sizeof(Words) == 16) {
    *static_cast<uint4*>(to) = make_uint4(x.words[0], x.words[1], x.words[2], x.words[3]);
  } else if constexpr (sizeof(Words) == 8) {
    *static_cast<uint2*>(to) = make_uint2(x.words[0], x.words[1]);
  } else {
    *static_cast<uint32_t*>(to) = x.words[0];
  }
}

// c += a b, of a warp: a 16 x 8, b 8 x 8, in TF32, whose last 13 bits of a float are zero. With g = lane / 4
// and t = lane % 4, a lane holds a(g, t), a(g + 8, t), a(g, t + 4), a(g + 8, t + 4); b(t, g), b(t + 4, g);
// c(g, 2 t), c(g, 2 t + 1), c(g + 8, 2 t), c(g + 8, 2 t + 1).
EFFATTN_DEVICE void multiply_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])), "r"(bits_of(b[0])),
        "r"(bits_of(b[1])));
}

}  // namespace effattn::cuda

#endif

namespace effattn::cuda {

constexpr int kLanes = 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

EFFATTN_DEVICE int lane_index() { return thread_index() % kLanes; }
EFFATTN_DEVICE int warp_index() { return thread_index() / kLanes; }

}  // namespace effattn::cuda
