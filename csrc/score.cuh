// What the score losses share: clean images from raw network outputs, in registers.
//
// Images are [N, D] in one memory order. Raw outputs are F; x and x_t are float32. A sample is cut into `parts` blocks;
// partial sums are [K, N, parts] and added in a fixed order, so results do not change from run to run.
#pragma once

#include "common.cuh"

namespace potstill {

constexpr int SCORE_THREADS = 256;

// A network's estimate: D = c_skip·x_t + c_out·(u + guidance·(raw - u)). Null pointers: no such term.
template <typename F>
struct Side {
  const F* raw;
  const F* uncond;
  const float* x_t;
  const float* c_skip;
  const float* c_out;
  float guidance;
};

template <typename F>
Side<F> side(
    const Tensor& raw, const std::optional<Tensor>& x_t, const std::optional<Tensor>& c_skip,
    const std::optional<Tensor>& c_out, const std::optional<Tensor>& uncond, double guidance) {
  return {pointer<F>(raw),       pointer<F>(uncond),   pointer<float>(x_t),
          pointer<float>(c_skip), pointer<float>(c_out), static_cast<float>(guidance)};
}

template <typename T, int V>
__device__ __forceinline__ void load(const T* p, int64_t i, float (&out)[V]) {
  constexpr int N = V < LANES<T> ? V : LANES<T>;  // eight float32 are two accesses
#pragma unroll
  for (int j = 0; j < V; j += N) {
    const auto part = *reinterpret_cast<const Vec<T, N>*>(p + i + j);
#pragma unroll
    for (int k = 0; k < N; ++k) out[j + k] = static_cast<float>(part.v[k]);
  }
}

template <typename T, int V>
__device__ __forceinline__ void store(T* p, int64_t i, const float (&in)[V]) {
  constexpr int N = V < LANES<T> ? V : LANES<T>;
#pragma unroll
  for (int j = 0; j < V; j += N) {
    Vec<T, N> part;
#pragma unroll
    for (int k = 0; k < N; ++k) part.v[k] = static_cast<T>(in[j + k]);
    *reinterpret_cast<Vec<T, N>*>(p + i + j) = part;
  }
}

// D of sample n at i, ..., i + V - 1. Without an x_t of its own, an estimate takes `x_t` (the other estimate's).
template <typename F, int V>
__device__ __forceinline__ void clean(const Side<F>& e, int n, int64_t i, float (&x_t)[V], float (&d)[V]) {
  load(e.raw, i, d);
  if (e.uncond != nullptr) {
    float u[V];
    load(e.uncond, i, u);
#pragma unroll
    for (int k = 0; k < V; ++k) d[k] = u[k] + e.guidance * (d[k] - u[k]);
  }
  if (e.c_out != nullptr) {
    const float c_out = e.c_out[n];
#pragma unroll
    for (int k = 0; k < V; ++k) d[k] *= c_out;
  }
  if (e.c_skip != nullptr) {
    if (e.x_t != nullptr) load(e.x_t, i, x_t);
    const float c_skip = e.c_skip[n];
#pragma unroll
    for (int k = 0; k < V; ++k) d[k] += c_skip * x_t[k];
  }
}

template <typename F, int V>
__device__ __forceinline__ void clean_pair(
    const Side<F>& real, const Side<F>& fake, int n, int64_t i, float (&d_real)[V], float (&d_fake)[V]) {
  float x_t[V] = {};
  clean(real, n, i, x_t, d_real);
  clean(fake, n, i, x_t, d_fake);
}

// This block's share of a sample: its first element and one past its last, both multiples of V.
struct Share {
  int n;
  int64_t first, last;
};

template <int V>
__device__ __forceinline__ Share share(int64_t d, int parts) {
  const int64_t step = SCORE_THREADS * V;
  const int64_t length = ((d + parts - 1) / parts + step - 1) / step * step;
  const int64_t first = (blockIdx.x % parts) * length;
  return {static_cast<int>(blockIdx.x / parts), first, first + length < d ? first + length : d};
}

// Sums this thread's numbers over the block into partials [K, N, parts].
template <int K>
__device__ __forceinline__ void store_partials(float (&sums)[K], float* partials, int samples, int parts) {
  block_sum(sums);
#pragma unroll
  for (int k = 0; k < K; ++k) {
    if (threadIdx.x == static_cast<unsigned>(k)) partials[static_cast<int64_t>(k) * samples * parts + blockIdx.x] = sums[k];
  }
}

__device__ __forceinline__ float total(const float* partials, int k, int n, int samples, int parts) {
  float sum = 0.0f;
  for (int s = 0; s < parts; ++s) sum += partials[(static_cast<int64_t>(k) * samples + n) * parts + s];
  return sum;
}

__device__ __forceinline__ bool finite(float x) { return fabsf(x) <= 3.402823466e38f; }

// How many elements one access may take: 16 bytes of F where shape and addresses allow it, else one element.
template <typename F>
bool wide(int64_t d, std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* p : pointers) all |= reinterpret_cast<uintptr_t>(p);
  return d % LANES<F> == 0 && all % 16 == 0;
}

}  // namespace potstill

// The six fields of an estimate in an op's schema, in the order of kernels.Estimate.
#define ESTIMATE(name)                                                                                        \
  "Tensor " name ", Tensor? " name "_x_t, Tensor? " name "_c_skip, Tensor? " name "_c_out, Tensor? " name \
  "_uncond, float " name "_guidance, "
