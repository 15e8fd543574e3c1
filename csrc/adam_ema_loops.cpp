// See csrc/adam_ema_loops.h. Compiled once for each level of instructions, so nothing here has a name outside but the table at the
// end (csrc/norm_silu_loops.cpp says why).

#include "adam_ema_loops.h"

namespace potstill::adam {
namespace {

void move(
    const Step& step, int64_t n, float* __restrict p, const float* __restrict g, float* __restrict m,
    float* __restrict v) {
  const Step s = step;
  for (int64_t i = 0; i < n; ++i) {
    const float grad = g[i] * s.inv_scale + s.weight_decay * p[i], rest = p[i] - s.lr_decay * p[i];
    m[i] += s.one_minus_beta1 * (grad - m[i]);
    v[i] = s.beta2 * v[i] + s.one_minus_beta2 * grad * grad;
    p[i] = rest - s.step_size * m[i] / (__builtin_sqrtf(v[i]) * s.rsqrt_bc2 + s.eps);
  }
}

void average(float weight, int64_t n, const float* __restrict p, float* __restrict ema) {
  for (int64_t i = 0; i < n; ++i) ema[i] += weight * (p[i] - ema[i]);
}

bool finite(int64_t n, const float* g) {
  uint32_t bad = 0;
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    __builtin_memcpy(&bits, g + i, sizeof bits);
    bad |= (bits & 0x7f800000u) == 0x7f800000u;
  }
  return bad == 0;
}

double squares(int64_t n, const float* g) {
  constexpr int64_t LANES = 16;
  double sums[LANES] = {}, total = 0.0;
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    for (int64_t k = 0; k < LANES; ++k) sums[k] += static_cast<double>(g[i + k]) * g[i + k];
  }
  for (; i < n; ++i) total += static_cast<double>(g[i]) * g[i];
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace

extern const Level LEVEL = {move, average, finite, squares};

}  // namespace potstill::adam
