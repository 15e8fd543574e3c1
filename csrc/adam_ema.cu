// Adam, EMA and 16-bit shadow weights of a list of tensors in one pass. kernels/adam_ema.py holds the formula and the
// tables these kernels walk; this is the same three launches in CUDA C++.
//
// A chunk of csrc/adam_ema_tables.h belongs to one block.

#include "adam_ema_tables.h"
#include "common.cuh"

namespace potstill {
namespace {

using namespace adam;

constexpr int THREADS = 256;

template <typename T>
__device__ __forceinline__ T* at(const int64_t* fixed, int row, int tensors, int tensor) {
  return reinterpret_cast<T*>(fixed[static_cast<int64_t>(row) * tensors + tensor]);
}

struct Span {
  int tensor;
  int64_t first, numel;
};

__device__ __forceinline__ Span span(const int64_t* fixed, const int* chunks, int tensors) {
  const int tensor = chunks[2 * blockIdx.x];
  return {tensor, static_cast<int64_t>(chunks[2 * blockIdx.x + 1]) * CHUNK,
          fixed[static_cast<int64_t>(NUMEL) * tensors + tensor]};
}

template <typename G>
__global__ void __launch_bounds__(THREADS)
    check_kernel(const int64_t* fixed, const int64_t* grads, const int* chunks, int tensors, float* flag) {
  const Span s = span(fixed, chunks, tensors);
  const G* g = reinterpret_cast<const G*>(grads[s.tensor]);
  if (g == nullptr) return;
  bool bad = false;
  constexpr int N = LANES<G>;
  if (s.first + CHUNK <= s.numel && reinterpret_cast<uintptr_t>(g) % 16 == 0) {
#pragma unroll
    for (int64_t i = threadIdx.x * N; i < CHUNK; i += THREADS * N) {
      const auto part = *reinterpret_cast<const Vec<G, N>*>(g + s.first + i);
#pragma unroll
      for (int k = 0; k < N; ++k) bad |= !(fabsf(static_cast<float>(part.v[k])) <= 3.402823466e38f);
    }
  } else {
    for (int64_t i = s.first + threadIdx.x; i < s.numel && i < s.first + CHUNK; i += THREADS)
      bad |= !(fabsf(static_cast<float>(g[i])) <= 3.402823466e38f);
  }
  if (bad) *flag = 1.0f;  // every writer writes the same
}

// The number at address i of the table: rates[i] = (address, bytes of a number there).
__device__ __forceinline__ double rate(const int64_t* rates, int i) {
  if (rates[2 * i + 1] == sizeof(double)) return *reinterpret_cast<const double*>(rates[2 * i]);
  return static_cast<double>(*reinterpret_cast<const float*>(rates[2 * i]));
}

__global__ void coefs_kernel(
    float* steps, const int64_t* grads, const int64_t* rates, const float* flag, const float* found_inf,
    const float* grad_scale, int* nonfinite, float* coefs, int tensors, double beta1, double beta2,
    double weight_decay, bool counts) {
  const int i = blockIdx.x * THREADS + threadIdx.x;
  const bool go = *flag == 0.0f && (found_inf == nullptr || *found_inf == 0.0f);
  if (counts && i == 0 && !go) *nonfinite += 1;
  if (i >= tensors) return;
  const bool moves = go && grads[i] != 0;
  const double step = static_cast<double>(steps[i]) + (moves ? 1.0 : 0.0);
  if (moves) steps[i] = static_cast<float>(step);
  const double at_least_one = step > 1.0 ? step : 1.0;  // a tensor that never moved divides by no zero
  const double lr = rate(rates, 0);
  float* c = coefs + static_cast<int64_t>(i) * COEFS;
  c[STEP_SIZE] = static_cast<float>(lr / (1.0 - pow(beta1, at_least_one)));
  c[RSQRT_BC2] = static_cast<float>(1.0 / sqrt(1.0 - pow(beta2, at_least_one)));
  c[LR_DECAY] = static_cast<float>(lr * weight_decay);
  c[EMA_WEIGHT] = static_cast<float>(1.0 - rate(rates, 1));
  c[INV_SCALE] = grad_scale == nullptr ? 1.0f : 1.0f / *grad_scale;
  c[GO] = go ? 1.0f : 0.0f;
}

struct Hyper {
  float beta2, one_minus_beta1, one_minus_beta2, eps, weight_decay;
  bool decoupled;
};

template <typename G, typename S, int N>
__device__ __forceinline__ void update(
    const Hyper& h, const float* c, float* p, const G* g, float* m, float* v, float* ema, S* shadow, int64_t i) {
  using F = Vec<float, N>;
  F pv = *reinterpret_cast<F*>(p + i);
  if (g != nullptr) {
    const auto gv = *reinterpret_cast<const Vec<G, N>*>(g + i);
    F mv = *reinterpret_cast<F*>(m + i), vv = *reinterpret_cast<F*>(v + i);
#pragma unroll
    for (int k = 0; k < N; ++k) {
      float grad = static_cast<float>(gv.v[k]) * c[INV_SCALE];
      if (h.decoupled) {
        pv.v[k] -= c[LR_DECAY] * pv.v[k];
      } else {
        grad += h.weight_decay * pv.v[k];
      }
      mv.v[k] += h.one_minus_beta1 * (grad - mv.v[k]);
      vv.v[k] = h.beta2 * vv.v[k] + h.one_minus_beta2 * grad * grad;
      pv.v[k] -= c[STEP_SIZE] * mv.v[k] / (sqrtf(vv.v[k]) * c[RSQRT_BC2] + h.eps);
    }
    *reinterpret_cast<F*>(m + i) = mv;
    *reinterpret_cast<F*>(v + i) = vv;
    *reinterpret_cast<F*>(p + i) = pv;
  }
  if (ema != nullptr) {
    F ev = *reinterpret_cast<F*>(ema + i);
#pragma unroll
    for (int k = 0; k < N; ++k) ev.v[k] += c[EMA_WEIGHT] * (pv.v[k] - ev.v[k]);
    *reinterpret_cast<F*>(ema + i) = ev;
  }
  if (shadow != nullptr) {
    Vec<S, N> sv;
#pragma unroll
    for (int k = 0; k < N; ++k) sv.v[k] = static_cast<S>(pv.v[k]);
    *reinterpret_cast<Vec<S, N>*>(shadow + i) = sv;
  }
}

template <typename G, typename S>
__global__ void __launch_bounds__(THREADS) update_kernel(
    const int64_t* fixed, const int64_t* grads, const int* chunks, int tensors, const float* coefs, float* flag,
    Hyper h) {
  if (blockIdx.x == 0 && threadIdx.x == 0) *flag = 0.0f;  // coefs_kernel has read it; the next step's check starts clean
  const Span s = span(fixed, chunks, tensors);
  float c[COEFS];
#pragma unroll
  for (int k = 0; k < COEFS; ++k) c[k] = coefs[static_cast<int64_t>(s.tensor) * COEFS + k];
  if (c[GO] == 0.0f) return;
  float* p = at<float>(fixed, PARAM, tensors, s.tensor);
  const G* g = reinterpret_cast<const G*>(grads[s.tensor]);
  float* m = at<float>(fixed, EXP_AVG, tensors, s.tensor);
  float* v = at<float>(fixed, EXP_AVG_SQ, tensors, s.tensor);
  float* ema = at<float>(fixed, EMA, tensors, s.tensor);
  S* shadow = at<S>(fixed, SHADOW, tensors, s.tensor);
  const uintptr_t all = reinterpret_cast<uintptr_t>(p) | reinterpret_cast<uintptr_t>(g) |
      reinterpret_cast<uintptr_t>(m) | reinterpret_cast<uintptr_t>(v) | reinterpret_cast<uintptr_t>(ema) |
      reinterpret_cast<uintptr_t>(shadow);
  if (s.first + CHUNK <= s.numel && all % 16 == 0) {
    for (int64_t i = s.first + threadIdx.x * 4; i < s.first + CHUNK; i += THREADS * 4)
      update<G, S, 4>(h, c, p, g, m, v, ema, shadow, i);
  } else {
    for (int64_t i = s.first + threadIdx.x; i < s.numel && i < s.first + CHUNK; i += THREADS)
      update<G, S, 1>(h, c, p, g, m, v, ema, shadow, i);
  }
}

void check(Tensor fixed, Tensor grads, Tensor chunks, Tensor flag, Tensor grad_like) {
  with_float_type(grad_like.scalar_type(), [&](auto* g) {
    using G = std::remove_pointer_t<decltype(g)>;
    launch(check_kernel<G>, dim3(static_cast<unsigned>(chunks.size(0))), THREADS, 0, fixed, pointer<int64_t>(fixed),
           pointer<int64_t>(grads), pointer<int>(chunks), static_cast<int>(fixed.size(1)), pointer<float>(flag));
  });
}

void coefs(
    Tensor steps, Tensor grads, Tensor rates, Tensor flag, std::optional<Tensor> found_inf,
    std::optional<Tensor> grad_scale, Tensor nonfinite, Tensor coefs, double beta1, double beta2, double weight_decay,
    bool counts) {
  const int tensors = static_cast<int>(steps.size(0));
  launch(coefs_kernel, dim3(static_cast<unsigned>((tensors + THREADS - 1) / THREADS)), THREADS, 0, steps,
         pointer<float>(steps), pointer<int64_t>(grads), pointer<int64_t>(rates), pointer<float>(flag),
         pointer<float>(found_inf), pointer<float>(grad_scale), pointer<int>(nonfinite), pointer<float>(coefs), tensors,
         beta1, beta2, weight_decay, counts);
}

void update_all(
    Tensor fixed, Tensor grads, Tensor chunks, Tensor coefs, Tensor flag, Tensor grad_like, Tensor shadow_like,
    double beta1, double beta2, double eps, double weight_decay, bool decoupled) {
  const Hyper h{static_cast<float>(beta2), static_cast<float>(1.0 - beta1), static_cast<float>(1.0 - beta2),
                static_cast<float>(eps), static_cast<float>(weight_decay), decoupled};
  with_float_type(grad_like.scalar_type(), [&](auto* g) {
    with_float_type(shadow_like.scalar_type(), [&](auto* s) {
      using G = std::remove_pointer_t<decltype(g)>;
      using S = std::remove_pointer_t<decltype(s)>;
      launch(update_kernel<G, S>, dim3(static_cast<unsigned>(chunks.size(0))), THREADS, 0, fixed,
             pointer<int64_t>(fixed), pointer<int64_t>(grads), pointer<int>(chunks), static_cast<int>(fixed.size(1)),
             pointer<float>(coefs), pointer<float>(flag), h);
    });
  });
}

}  // namespace
}  // namespace potstill

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cuda, m) {
  m.def(potstill::adam::CHECK);
  m.def(potstill::adam::MAKE_COEFS);
  m.def(potstill::adam::UPDATE);
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cuda, POTSTILL_KEY, m) {
  m.impl("adam_ema_check", TORCH_BOX(&potstill::check));
  m.impl("adam_ema_coefs", TORCH_BOX(&potstill::coefs));
  m.impl("adam_ema_update", TORCH_BOX(&potstill::update_all));
}
