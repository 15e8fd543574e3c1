// SIM's and SiD's generator loss, as in kernels/score_implicit.py: sums, values with four factors a sample, gradients.

#include "score.cuh"

namespace potstill {
namespace {

template <typename F, int V>
__global__ void __launch_bounds__(SCORE_THREADS) sums_kernel(
    const float* x, Side<F> real, Side<F> fake, float* partials, int samples, int64_t d, int parts, float past) {
  const Share s = share<V>(d, parts);
  float sums[3] = {0.0f, 0.0f, 0.0f};  // of |x - D_real|, delta·(v + past·delta) and delta²
  for (int64_t j = s.first + threadIdx.x * V; j < s.last; j += SCORE_THREADS * V) {
    const int64_t i = s.n * d + j;
    float d_real[V], d_fake[V], clean_x[V];
    clean_pair(real, fake, s.n, i, d_real, d_fake);
    load(x, i, clean_x);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float delta = d_real[k] - d_fake[k];
      sums[0] += fabsf(clean_x[k] - d_real[k]);
      sums[1] += delta * (d_fake[k] - clean_x[k] + past * delta);
      sums[2] += delta * delta;
    }
  }
  store_partials(sums, partials, samples, parts);
}

// coefs [3, N]: the gradient to D_real is a·v + b·delta, to x -w·delta, to D_fake what makes the three sum to zero.
__global__ void __launch_bounds__(SCORE_THREADS) values_kernel(
    const float* partials, const float* weight, float* value, float* coefs, int* nonfinite, int samples, int64_t d,
    int parts, float past, float c, bool huber, bool factor, bool normaliser) {
  float bad[1] = {0.0f};
  for (int n = threadIdx.x; n < samples; n += SCORE_THREADS) {
    const float gap = total(partials, 0, n, samples, parts) / d;
    const float product = total(partials, 1, n, samples, parts), square = total(partials, 2, n, samples, parts);
    float w = weight != nullptr ? weight[n] : huber ? 1.0f : 1.0f / fmaxf(gap, 1e-5f);
    if (huber) w /= sqrtf(square + c * c);
    const float v = w * product;
    const bool ok = finite(v) && finite(square);
    float a = w, b = 2.0f * past * w;
    if (factor) {  // the first factor, delta or delta/R, is a constant
      a = 0.0f;
      b = past * w;
    } else if (huber && !normaliser) {
      b = -v / (square + c * c);
    }
    value[n] = ok ? v : 0.0f;
    coefs[n] = ok ? a : 0.0f;
    coefs[samples + n] = ok ? b : 0.0f;
    coefs[2 * samples + n] = ok ? w : 0.0f;
    bad[0] += ok ? 0.0f : 1.0f;
  }
  block_sum(bad);
  if (threadIdx.x == 0) *nonfinite = static_cast<int>(bad[0]);
}

// Where the gradients of one estimate go; null pointers: not wanted.
template <typename F>
struct SideGradient {
  F* raw;
  float* x_t;
  F* uncond;
};

template <typename F, int V>
__device__ __forceinline__ void store_side(
    const Side<F>& e, const SideGradient<F>& out, int n, int64_t i, const float (&d)[V]) {
  const float scale = e.c_out != nullptr ? e.c_out[n] : 1.0f;
  float raw[V];
  if (out.raw != nullptr) {
    const float guidance = e.uncond != nullptr ? e.guidance : 1.0f;
#pragma unroll
    for (int k = 0; k < V; ++k) raw[k] = guidance * scale * d[k];
    store(out.raw, i, raw);
  }
  if (out.uncond != nullptr) {
#pragma unroll
    for (int k = 0; k < V; ++k) raw[k] = (1.0f - e.guidance) * scale * d[k];
    store(out.uncond, i, raw);
  }
}

// Zeros into this block's share of p, where p is not null.
template <int V, typename T>
__device__ __forceinline__ void clear(T* p, const Share& s, int64_t d) {
  if (p == nullptr) return;
  const float zeros[V] = {};
  for (int64_t j = s.first + threadIdx.x * V; j < s.last; j += SCORE_THREADS * V) store(p, s.n * d + j, zeros);
}

template <typename F, int V>
__global__ void __launch_bounds__(SCORE_THREADS) gradient_kernel(
    const float* x, Side<F> real, Side<F> fake, const float* coefs, const float* g, int64_t g_stride, float* dx,
    SideGradient<F> to_real, SideGradient<F> to_fake, int samples, int64_t d, int parts) {
  const Share s = share<V>(d, parts);
  const float a = coefs[s.n], b = coefs[samples + s.n], w = coefs[2 * samples + s.n], up = g[s.n * g_stride];
  if (w == 0.0f) {  // a sample left out, whose images and coefficients may be NaN: nothing of it is a factor
    clear<V>(dx, s, d);
    for (const SideGradient<F>& to : {to_real, to_fake}) {
      clear<V>(to.raw, s, d);
      clear<V>(to.x_t, s, d);
      clear<V>(to.uncond, s, d);
    }
    return;
  }
  const float skip_real = real.c_skip != nullptr ? real.c_skip[s.n] : 0.0f;
  const float skip_fake = fake.c_skip != nullptr ? fake.c_skip[s.n] : 0.0f;
  for (int64_t j = s.first + threadIdx.x * V; j < s.last; j += SCORE_THREADS * V) {
    const int64_t i = s.n * d + j;
    float d_real[V], d_fake[V], out[V];
    clean_pair(real, fake, s.n, i, d_real, d_fake);
    load(x, i, out);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float delta = d_real[k] - d_fake[k], v = d_fake[k] - out[k];
      d_real[k] = up * (a * v + b * delta);
      out[k] = -up * w * delta;
      d_fake[k] = -out[k] - d_real[k];
    }
    if (dx != nullptr) store(dx, i, out);
    store_side(real, to_real, s.n, i, d_real);
    store_side(fake, to_fake, s.n, i, d_fake);
    if (to_real.x_t != nullptr) {  // shared by both where the fake estimate has none of its own
#pragma unroll
      for (int k = 0; k < V; ++k)
        out[k] = skip_real * d_real[k] + (fake.x_t == nullptr ? skip_fake * d_fake[k] : 0.0f);
      store(to_real.x_t, i, out);
    }
    if (to_fake.x_t != nullptr) {
#pragma unroll
      for (int k = 0; k < V; ++k) out[k] = skip_fake * d_fake[k];
      store(to_fake.x_t, i, out);
    }
  }
}

void score_implicit(
    Tensor x, Tensor raw, std::optional<Tensor> x_t, std::optional<Tensor> c_skip, std::optional<Tensor> c_out,
    std::optional<Tensor> uncond, double guidance, Tensor raw_f, std::optional<Tensor> x_t_f,
    std::optional<Tensor> c_skip_f, std::optional<Tensor> c_out_f, std::optional<Tensor> uncond_f, double guidance_f,
    std::optional<Tensor> weight, bool huber, double past, double c, bool factor, bool normaliser, Tensor partials,
    Tensor value, Tensor coefs, Tensor nonfinite) {
  const int samples = static_cast<int>(x.size(0)), parts = static_cast<int>(partials.size(2));
  const int64_t d = x.size(1);
  with_float_type(raw.scalar_type(), [&](auto* type) {
    using F = std::remove_pointer_t<decltype(type)>;
    const auto real = side<F>(raw, x_t, c_skip, c_out, uncond, guidance);
    const auto fake = side<F>(raw_f, x_t_f, c_skip_f, c_out_f, uncond_f, guidance_f);
    const bool v = wide<F>(
        d, {pointer<float>(x), real.raw, real.uncond, real.x_t, fake.raw, fake.uncond, fake.x_t});
    launch(v ? sums_kernel<F, LANES<F>> : sums_kernel<F, 1>, dim3(samples * parts), SCORE_THREADS, 0, x,
           pointer<float>(x), real, fake, pointer<float>(partials), samples, d, parts, past);
  });
  launch(values_kernel, dim3(1), SCORE_THREADS, 0, x, pointer<float>(partials), pointer<float>(weight),
         pointer<float>(value), pointer<float>(coefs), pointer<int>(nonfinite), samples, d, parts, past, c, huber,
         factor, normaliser);
}

void score_implicit_grad(
    Tensor x, Tensor raw, std::optional<Tensor> x_t, std::optional<Tensor> c_skip, std::optional<Tensor> c_out,
    std::optional<Tensor> uncond, double guidance, Tensor raw_f, std::optional<Tensor> x_t_f,
    std::optional<Tensor> c_skip_f, std::optional<Tensor> c_out_f, std::optional<Tensor> uncond_f, double guidance_f,
    Tensor coefs, Tensor g, int64_t parts, std::optional<Tensor> dx, std::optional<Tensor> d_raw,
    std::optional<Tensor> d_x_t, std::optional<Tensor> d_uncond, std::optional<Tensor> d_raw_f,
    std::optional<Tensor> d_x_t_f, std::optional<Tensor> d_uncond_f) {
  const int64_t d = x.size(1);
  with_float_type(raw.scalar_type(), [&](auto* type) {
    using F = std::remove_pointer_t<decltype(type)>;
    const auto real = side<F>(raw, x_t, c_skip, c_out, uncond, guidance);
    const auto fake = side<F>(raw_f, x_t_f, c_skip_f, c_out_f, uncond_f, guidance_f);
    const SideGradient<F> to_real{pointer<F>(d_raw), pointer<float>(d_x_t), pointer<F>(d_uncond)};
    const SideGradient<F> to_fake{pointer<F>(d_raw_f), pointer<float>(d_x_t_f), pointer<F>(d_uncond_f)};
    const bool v = wide<F>(
        d, {pointer<float>(x), real.raw, real.uncond, real.x_t, fake.raw, fake.uncond, fake.x_t, pointer<float>(dx),
            to_real.raw, to_real.x_t, to_real.uncond, to_fake.raw, to_fake.x_t, to_fake.uncond});
    launch(v ? gradient_kernel<F, LANES<F>> : gradient_kernel<F, 1>, dim3(static_cast<unsigned>(x.size(0) * parts)),
           SCORE_THREADS, 0, x, pointer<float>(x), real, fake, pointer<float>(coefs), pointer<float>(g), g.stride(0),
           pointer<float>(dx), to_real, to_fake, static_cast<int>(x.size(0)), d, static_cast<int>(parts));
  });
}

}  // namespace
}  // namespace potstill

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cuda, m) {
  m.def("score_implicit(Tensor x, " ESTIMATE("real") ESTIMATE("fake")
        "Tensor? weight, bool huber, float past, float c, bool factor, bool normaliser, Tensor(a!) partials, "
        "Tensor(b!) value, Tensor(c!) coefs, Tensor(d!) nonfinite) -> ()");
  m.def("score_implicit_grad(Tensor x, " ESTIMATE("real") ESTIMATE("fake")
        "Tensor coefs, Tensor g, int parts, Tensor(a!)? dx, Tensor(b!)? d_real, Tensor(c!)? d_real_x_t, "
        "Tensor(d!)? d_real_uncond, Tensor(e!)? d_fake, Tensor(f!)? d_fake_x_t, Tensor(g!)? d_fake_uncond) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cuda, POTSTILL_KEY, m) {
  m.impl("score_implicit", TORCH_BOX(&potstill::score_implicit));
  m.impl("score_implicit_grad", TORCH_BOX(&potstill::score_implicit_grad));
}
