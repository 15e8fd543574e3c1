// The loops over elements of AdamEMA on a CPU. csrc/adam_ema_loops.cpp is compiled once for each level of the processor's
// instructions; csrc/adam_ema_cpu.cpp takes the best that the machine has.
#pragma once

#include <cstdint>

namespace potstill::adam {

// What is the same for every element of a tensor; weight_decay is added to the gradient, lr_decay shrinks the parameter.
struct Step {
  float inv_scale, weight_decay, lr_decay, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_bc2, eps;
};

struct Level {
  void (*move)(const Step& step, int64_t n, float* p, const float* g, float* m, float* v);
  // ema += weight·(p - ema)
  void (*average)(float weight, int64_t n, const float* p, float* ema);
  bool (*finite)(int64_t n, const float* g);
  // Σ g² in float64, where a square neither overflows nor vanishes
  double (*squares)(int64_t n, const float* g);
};

extern const Level LEVEL_any;
#ifdef __x86_64__
extern const Level LEVEL_avx2, LEVEL_avx512, LEVEL_avx512_bf16;
#endif

}  // namespace potstill::adam
