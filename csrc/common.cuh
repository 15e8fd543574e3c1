// What every .cu here shares: 16-byte vectors, sums over a block, launches on PyTorch's current stream.
//
// Only libtorch's stable ABI and header-only parts are included, so a build needs no CUDA version of PyTorch and one
// binary serves every PyTorch from 2.10 on. A macro's own header stands here: which header brings which one along has
// changed from release to release. With POTSTILL_ON_CPU (tests/cuda_on_cpu.h) the same sources compile with a
// C++ compiler, each CUDA thread a coroutine: that is how they are tested where there is no GPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <optional>
#include <type_traits>

#ifndef POTSTILL_ON_CPU
#include <cuda_runtime.h>
#define POTSTILL_KEY CUDA
#define DYNAMIC_SHARED(type, name)                            \
  extern __shared__ __align__(16) unsigned char name##_raw[]; \
  type* name = reinterpret_cast<type*>(name##_raw)
#endif

namespace potstill {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int WARP = 32;

// N values moved as one access: 16 bytes for Vec<float, 4> and Vec<BFloat16, 8>.
template <typename T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};

template <typename T>
constexpr int LANES = 16 / sizeof(T);  // how many T fill a 128-bit access

// The sums of each of the K numbers over all threads of the block; every thread gets them.
template <int K>
__device__ __forceinline__ void block_sum(float (&value)[K]) {
  __shared__ float partial[K][WARP];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = (blockDim.x + WARP - 1) / WARP;
#pragma unroll
  for (int k = 0; k < K; ++k) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value[k] += __shfl_xor_sync(0xffffffffu, value[k], step);
  }
  __syncthreads();  // the last call's partial sums have been read
  if (lane == 0) {
#pragma unroll
    for (int k = 0; k < K; ++k) partial[k][warp] = value[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < K; ++k) {
    value[k] = 0.0f;
    for (int w = 0; w < warps; ++w) value[k] += partial[k][w];
  }
}

// kernel<<<grid, block, shared>>>(args...) on the current stream of the device `on` lives on.
template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, unsigned block, size_t shared, const Tensor& on, Args... args) {
#ifdef POTSTILL_ON_CPU
  (void)on;
  cuda_on_cpu::launch([=] { kernel(static_cast<Params>(args)...); }, grid, block, shared);
#else
  const int32_t device = on.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  if (shared > 48 * 1024) {  // more than this has to be asked for
    STD_CUDA_CHECK(cudaFuncSetAttribute(
        reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)));
  }
  kernel<<<grid, block, shared, static_cast<cudaStream_t>(stream)>>>(static_cast<Params>(args)...);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
#endif
}

template <typename T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
T* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? static_cast<T*>(t->mutable_data_ptr()) : nullptr;
}

// Calls f with a null pointer of the C++ type of `dtype`: only its type is used.
template <typename F>
void with_float_type(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == ScalarType::BFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Half, "potstill_cuda wants float32, float16 or bfloat16");
    f(static_cast<Half*>(nullptr));
  }
}

}  // namespace potstill
