// All that kernels use of CUDA, in two forms: that of the device, and with EFFATTN_EMULATED one for the host
// (emulator.h), where each thread of a block is a fiber and every barrier, exchange and product of matrices
// is checked. Kernels use nothing of CUDA but what stands here.
#pragma once

#include <cstdint>
#include <limits>

#include "../../params/dtype.h"
#include "../../params/sizes.h"

#ifdef EFFATTN_EMULATED

#include "emulated/emulator.h"

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
EFFATTN_DEVICE float shfl_xor(float x, int bits) { return __shfl_xor_sync(0xffffffffu, x, bits); }

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
EFFATTN_DEVICE float load_dsmem(const float* shared, int rank) {
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
// 2^x, to 2^-22.
EFFATTN_DEVICE float exp2_approx(float x) {
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
}
// To 2^-23, and 0 where the inverse is subnormal: for results that are narrow.
EFFATTN_DEVICE float rcp_approx(float x) {
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(x) : "f"(x));
  return x;
}

EFFATTN_DEVICE float to_float(float x) { return x; }
EFFATTN_DEVICE float to_float(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }
EFFATTN_DEVICE float to_float(Float16 x) { return __half2float(__ushort_as_half(x.bits)); }
// To nearest even.
template <class T>
EFFATTN_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
  } else {
    return {__half_as_ushort(__float2half_rn(x))};
  }
}

EFFATTN_DEVICE float fma_rn(float x, float y, float z) { return __fmaf_rn(x, y, z); }

// Pairs of a narrow type, the first in the low half.
template <class T>
EFFATTN_DEVICE uint32_t pack(float first, float second) {
  uint32_t pair;
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(second), "f"(first));
  }
  return pair;
}
// Of two words the halves, the first word's in the low one.
EFFATTN_DEVICE uint32_t low_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x5410);
}
EFFATTN_DEVICE uint32_t high_halves(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x7632);
}
// Of NaN, NaN.
template <class T>
EFFATTN_DEVICE uint32_t relu_pair(uint32_t x) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(x) : "r"(x), "r"(0));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(x) : "r"(x), "r"(0));
  }
  return x;
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
// Memory that is written too.
template <class Words>
EFFATTN_DEVICE Words shared_words(const void* from) {
  if constexpr (sizeof(Words) == 16) {
    const uint4 x = *static_cast<const uint4*>(from);
    return {{x.x, x.y, x.z, x.w}};
  } else if constexpr (sizeof(Words) == 8) {
    const uint2 x = *static_cast<const uint2*>(from);
    return {{x.x, x.y}};
  } else {
    return {{*static_cast<const uint32_t*>(from)}};
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
EFFATTN_DEVICE void mma_m16n8k8_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(bits_of(a[0])), "r"(bits_of(a[1])), "r"(bits_of(a[2])), "r"(bits_of(a[3])), "r"(bits_of(b[0])),
        "r"(bits_of(b[1])));
}

// c += a b, of a warp: a 16 x 16, b 16 x 8, of a narrow type; products are exact, sums float32. A register is
// a pair (k, k + 1) of the depth: a(g, 2 t), a(g + 8, 2 t), a(g, 2 t + 8), a(g + 8, 2 t + 8); b(2 t, g), b(2
// t + 8, g); c as above.
template <class T>
EFFATTN_DEVICE void mma_m16n8k16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#define EFFATTN_MMA(type)                                                             \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                       \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
  if constexpr (std::is_same_v<T, BFloat16>) {
    EFFATTN_MMA("bf16");
  } else {
    EFFATTN_MMA("f16");
  }
#undef EFFATTN_MMA
}

// Four 8 x 8 matrices of 16-bit elements from shared memory to a warp: lane 8 i + r gives the address of row
// r of matrix i, 16 bytes, aligned. Register i of a lane is the pair (g, 2 t), (g, 2 t + 1) of matrix i; of
// its transpose with kTransposed.
template <bool kTransposed>
EFFATTN_DEVICE void ldmatrix_x4(uint32_t (&x)[4], const void* row) {
  const auto address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(address)
                 : "memory");
  }
}

// 16 bytes to shared memory without registers, or zeros; there after the wait of this thread, and for others
// after a barrier behind it.
EFFATTN_DEVICE void cp_async_16(void* shared, const void* global, bool inside) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   static_cast<uint32_t>(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(inside ? 16 : 0)
               : "memory");
}
EFFATTN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// For all but the last kPending groups.
template <int kPending>
EFFATTN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Programmatic dependent launch: blocks of a launch that depends on the one before it may begin early, and
// wait here until that one is complete. Every thread of such a launch does, or the launch after it could not
// rely on what came before.
EFFATTN_DEVICE void grid_dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
// The launch that depends on this one may begin once all blocks have come here or are done.
EFFATTN_DEVICE void grid_dependency_launch() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

}  // namespace effattn::cuda

#endif

namespace effattn::cuda {

// Of int as int: those of sizes.h would count in 64 bits.
template <class A, class B>
EFFATTN_INLINE constexpr auto min(A a, B b) {
  return a < b ? a : b;
}
template <class A, class B>
EFFATTN_INLINE constexpr auto max(A a, B b) {
  return a > b ? a : b;
}

constexpr int kLanes = 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

EFFATTN_DEVICE int lane_index() { return thread_index() % kLanes; }
EFFATTN_DEVICE int warp_index() { return thread_index() / kLanes; }

}  // namespace effattn::cuda
