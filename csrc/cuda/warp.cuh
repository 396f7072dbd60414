// Warp-level building blocks: asynchronous copies into shared memory, matrix fragments, exchange between
// lanes.
//
// The kernels use nothing of CUDA beside these names, so that a host compiler can run them too: with
// IDCORE_EMULATE, emulate.h gives every name a meaning on the CPU, fragment layouts included.
#pragma once

#include <cstdint>

#if defined(IDCORE_EMULATE)
#include "emulate.h"
#else
#include <cooperative_groups.h>

namespace idcore {
namespace cuda {

extern __shared__ __align__(16) unsigned char dynamic_shared[];

__device__ __forceinline__ unsigned char* shared_memory() { return dynamic_shared; }
__device__ __forceinline__ int thread_index() { return threadIdx.x; }
__device__ __forceinline__ int thread_count() { return blockDim.x; }
__device__ __forceinline__ int block_x() { return blockIdx.x; }
__device__ __forceinline__ int grid_blocks() { return gridDim.x; }
__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Only in a cooperative launch. Memory written before it by any block may be read behind it by all.
__device__ __forceinline__ void sync_grid() { cooperative_groups::this_grid().sync(); }

__device__ __forceinline__ float exchange_xor(float v, int lanes) {
  return __shfl_xor_sync(0xffffffffu, v, lanes);
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes in the background, or writes 16 zero bytes. Both addresses are multiples of 16.
__device__ __forceinline__ void copy16_async(void* shared, const void* global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups of this thread's copies are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane 8 i + r gives the address of row r of matrix i.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 16-bit element types, held as raw bits.
struct Half {
  // Element 0 in the low half of the word.
  static __device__ __forceinline__ uint32_t pack(float e0, float e1) {
    uint32_t r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(e1), "f"(e0));
    return r;
  }
  static __device__ __forceinline__ float low(uint32_t w) { return one(static_cast<uint16_t>(w)); }
  static __device__ __forceinline__ float high(uint32_t w) { return one(static_cast<uint16_t>(w >> 16)); }
  static __device__ __forceinline__ float one(uint16_t bits) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(bits));
    return f;
  }
  // c += a b for a 16x16, b 16x8.
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

struct BFloat16 {
  static __device__ __forceinline__ uint32_t pack(float e0, float e1) {
    uint32_t r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(e1), "f"(e0));
    return r;
  }
  static __device__ __forceinline__ float low(uint32_t w) { return __uint_as_float(w << 16); }
  static __device__ __forceinline__ float high(uint32_t w) { return __uint_as_float(w & 0xffff0000u); }
  static __device__ __forceinline__ float one(uint16_t bits) { return low(bits); }
  static __device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
};

}  // namespace cuda
}  // namespace idcore

#define IDCORE_DEVICE __device__ __forceinline__
#define IDCORE_UNROLL _Pragma("unroll")
#define IDCORE_NO_UNROLL _Pragma("unroll 1")
#define IDCORE_UNROLL_BY_4 _Pragma("unroll 4")
#endif
