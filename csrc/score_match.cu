// DMD's distribution matching loss, as in kernels/score_match.py: one kernel for the sums, one for values, one for dx.

#include "score.cuh"

namespace potstill {
namespace {

template <typename F, int V>
__global__ void __launch_bounds__(SCORE_THREADS)
    sums_kernel(const float* x, Side<F> real, Side<F> fake, float* partials, int samples, int64_t d, int parts) {
  const Share s = share<V>(d, parts);
  float sums[2] = {0.0f, 0.0f};  // of |x - D_real| and (D_fake - D_real)²
  for (int64_t j = s.first + threadIdx.x * V; j < s.last; j += SCORE_THREADS * V) {
    const int64_t i = s.n * d + j;
    float d_real[V], d_fake[V], clean_x[V];
    clean_pair(real, fake, s.n, i, d_real, d_fake);
    load(x, i, clean_x);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float difference = d_fake[k] - d_real[k];
      sums[0] += fabsf(clean_x[k] - d_real[k]);
      sums[1] += difference * difference;
    }
  }
  store_partials(sums, partials, samples, parts);
}

__global__ void __launch_bounds__(SCORE_THREADS) values_kernel(
    const float* partials, const float* weight, float* value, float* coef, int* nonfinite, int samples, int64_t d, int parts,
    float eps, float plus) {
  float bad[1] = {0.0f};
  for (int n = threadIdx.x; n < samples; n += SCORE_THREADS) {
    const float gap = total(partials, 0, n, samples, parts) / d;
    const float scale = (weight ? weight[n] : 1.0f) / (fmaxf(gap, eps) + plus);
    const float v = 0.5f * total(partials, 1, n, samples, parts) / d * scale * scale;
    const bool ok = finite(gap) && finite(v);
    value[n] = ok ? v : 0.0f;
    coef[n] = ok ? scale / d : 0.0f;
    bad[0] += ok ? 0.0f : 1.0f;
  }
  block_sum(bad);
  if (threadIdx.x == 0) *nonfinite = static_cast<int>(bad[0]);
}

// dx = coef·g·(D_fake - D_real), and 0 where coef is: the samples left out hold NaN.
template <typename F, int V>
__global__ void __launch_bounds__(SCORE_THREADS) difference_kernel(
    Side<F> real, Side<F> fake, const float* coef, const float* g, int64_t g_stride, float* dx, int64_t d, int parts) {
  const Share s = share<V>(d, parts);
  const float factor = coef[s.n] * g[s.n * g_stride];
  const bool keep = coef[s.n] != 0.0f;
  for (int64_t j = s.first + threadIdx.x * V; j < s.last; j += SCORE_THREADS * V) {
    const int64_t i = s.n * d + j;
    float d_real[V], d_fake[V];
    clean_pair(real, fake, s.n, i, d_real, d_fake);
#pragma unroll
    for (int k = 0; k < V; ++k) d_fake[k] = keep ? factor * (d_fake[k] - d_real[k]) : 0.0f;
    store(dx, i, d_fake);
  }
}

void score_match(
    Tensor x, Tensor raw, std::optional<Tensor> x_t, std::optional<Tensor> c_skip, std::optional<Tensor> c_out,
    std::optional<Tensor> uncond, double guidance, Tensor raw_f, std::optional<Tensor> x_t_f,
    std::optional<Tensor> c_skip_f, std::optional<Tensor> c_out_f, std::optional<Tensor> uncond_f, double guidance_f,
    std::optional<Tensor> weight, double eps, double plus, Tensor partials, Tensor value, Tensor coef, Tensor nonfinite) {
  const int samples = static_cast<int>(x.size(0)), parts = static_cast<int>(partials.size(2));
  const int64_t d = x.size(1);
  with_float_type(raw.scalar_type(), [&](auto* type) {
    using F = std::remove_pointer_t<decltype(type)>;
    const auto real = side<F>(raw, x_t, c_skip, c_out, uncond, guidance);
    const auto fake = side<F>(raw_f, x_t_f, c_skip_f, c_out_f, uncond_f, guidance_f);
    const bool v = wide<F>(
        d, {pointer<float>(x), real.raw, real.uncond, real.x_t, fake.raw, fake.uncond, fake.x_t});
    launch(v ? sums_kernel<F, LANES<F>> : sums_kernel<F, 1>, dim3(samples * parts), SCORE_THREADS, 0, x,
           pointer<float>(x), real, fake, pointer<float>(partials), samples, d, parts);
  });
  launch(values_kernel, dim3(1), SCORE_THREADS, 0, x, pointer<float>(partials), pointer<float>(weight),
         pointer<float>(value), pointer<float>(coef), pointer<int>(nonfinite), samples, d, parts, eps, plus);
}

void score_difference(
    Tensor raw, std::optional<Tensor> x_t, std::optional<Tensor> c_skip, std::optional<Tensor> c_out,
    std::optional<Tensor> uncond, double guidance, Tensor raw_f, std::optional<Tensor> x_t_f,
    std::optional<Tensor> c_skip_f, std::optional<Tensor> c_out_f, std::optional<Tensor> uncond_f, double guidance_f,
    Tensor coef, Tensor g, int64_t parts, Tensor dx) {
  const int64_t d = raw.size(1);
  with_float_type(raw.scalar_type(), [&](auto* type) {
    using F = std::remove_pointer_t<decltype(type)>;
    const auto real = side<F>(raw, x_t, c_skip, c_out, uncond, guidance);
    const auto fake = side<F>(raw_f, x_t_f, c_skip_f, c_out_f, uncond_f, guidance_f);
    const bool v =
        wide<F>(d, {pointer<float>(dx), real.raw, real.uncond, real.x_t, fake.raw, fake.uncond, fake.x_t});
    launch(v ? difference_kernel<F, LANES<F>> : difference_kernel<F, 1>,
           dim3(static_cast<unsigned>(raw.size(0) * parts)), SCORE_THREADS, 0, raw, real, fake, pointer<float>(coef),
           pointer<float>(g), g.stride(0), pointer<float>(dx), d, static_cast<int>(parts));
  });
}

}  // namespace
}  // namespace potstill

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cuda, m) {
  m.def("score_match(Tensor x, " ESTIMATE("real") ESTIMATE("fake")
        "Tensor? weight, float eps, float plus, Tensor(a!) partials, Tensor(b!) value, Tensor(c!) coef, Tensor(d!) nonfinite) -> ()");
  m.def("score_difference(" ESTIMATE("real") ESTIMATE("fake")
        "Tensor coef, Tensor g, int parts, Tensor(a!) dx) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cuda, POTSTILL_KEY, m) {
  m.impl("score_match", TORCH_BOX(&potstill::score_match));
  m.impl("score_difference", TORCH_BOX(&potstill::score_difference));
}
