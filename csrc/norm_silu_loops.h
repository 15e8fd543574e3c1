// The loops over pixels of norm_silu on a CPU. csrc/norm_silu_loops.cpp is compiled once for each level of the processor's
// instructions; csrc/norm_silu_cpu.cpp takes the best that the machine has.
#pragma once

#include <cstdint>

namespace potstill {

struct bfloat16 {
  uint16_t bits;
};

constexpr int64_t W = 16;  // values of a vector; every row of values for channels is padded to a multiple of it

// For each of some neighbouring channels: h = (x - centre)·gain + offset.
struct Affine {
  const float *centre, *gain, *offset;
};

// Where those channels of one NHWC sample are: `pixels` times `count` values, `channels` apart.
struct Run {
  int64_t channels, pixels, count;
};

// What dropout leaves of the run: values whose number, hashed from their place in the image and the key's two halves, is not
// less than `least`. 0: all of them.
struct Dropout {
  uint32_t low = 0, high = 0, least = 0;
  float factor = 1.0f;  // 1 / (1 - dropout)
  uint32_t place = 0;   // of the run's first value
};

// Images are given by a pointer to the first value of the run.
template <typename T>
struct Loops {
  // a, b += Σ d, Σ d² over pixels, d = x - the first pixel's x
  void (*sums)(Run run, const T* x, float* a, float* b);
  // y = h, or h·sigmoid(h), and dropout
  void (*apply)(Run run, Affine affine, bool silu, Dropout dropout, const T* x, T* y);
  // a, b, c += Σ dh, Σ dh·d, Σ d over pixels, d = x - centre. dh, the gradient to h but for dropout's factor, is kept, its
  // pixels `row` apart. y, where it is not null, as `apply` gives it.
  void (*gradient_sums)(
      Run run, Affine affine, bool silu, Dropout dropout, const T* x, const T* dy, T* y, float* kept, int64_t row, float* a,
      float* b, float* c);
  // dx = gain·dh - along - across·d + factor·skip, without the last where skip is null. For float32 kept may be dx.
  void (*gradient)(
      Run run, Affine affine, const float* along, const float* across, const T* skip, float factor, const T* x,
      const float* kept, int64_t row, T* dx);
  // out = (h + bias + skip)·scale
  void (*residual)(Run run, const T* h, const float* bias, const T* skip, float scale, T* out);
};

struct Level {
  Loops<float> float32;
  Loops<bfloat16> bf16;
};

extern const Level LEVEL_any;
#ifdef __x86_64__
extern const Level LEVEL_avx2, LEVEL_avx512, LEVEL_avx512_bf16;
#endif

}  // namespace potstill
