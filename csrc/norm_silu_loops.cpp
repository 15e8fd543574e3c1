// See csrc/norm_silu_loops.h. Compiled once for each level of instructions. Nothing here has a name outside but the table at the
// end: what the linker could share with code for older processors must not be compiled for newer ones.

#include "norm_silu_loops.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINED __attribute__((always_inline))
#define INLINE INLINED inline

namespace potstill {
namespace {

constexpr int64_t PIXELS = 64;  // at a time: they stay in the first cache, and rounding grows with the square root of a sum's length
typedef float Floats __attribute__((vector_size(4 * W)));
typedef uint32_t Bits __attribute__((vector_size(4 * W)));
typedef uint16_t Halves __attribute__((vector_size(2 * W)));

template <bool VALUE>
struct Constant {
  static constexpr bool value = VALUE;
};

// --- a vector, n < 16 values where the channels end -----------------------------------------------------------------------

INLINE Floats widen(Halves h) {
#ifdef __AVX512F__
  return (Floats)((Bits)_mm512_cvtepu16_epi32((__m256i)h) << 16);
#else
  return (Floats)(__builtin_convertvector(h, Bits) << 16);
#endif
}

INLINE Halves narrow(Floats f) {  // to the nearest, ties to even
#ifdef __AVX512BF16__
  return (Halves)_mm512_cvtneps_pbh((__m512)f);
#else
  const Bits b = (Bits)f, nan = (b >> 16) | 0x40u;
  const Bits rounded = (b + 0x7fffu + ((b >> 16) & 1u)) >> 16, chosen = f == f ? rounded : nan;
#ifdef __AVX512F__
  return (Halves)_mm512_cvtepi32_epi16((__m512i)chosen);
#else
  return __builtin_convertvector(chosen, Halves);
#endif
#endif
}

template <bool FULL>
INLINE Floats load(const float* p, int64_t n) {
  Floats f = {};
  __builtin_memcpy(&f, p, FULL ? sizeof f : 4 * n);
  return f;
}

template <bool FULL>
INLINE Floats load(const bfloat16* p, int64_t n) {
  Halves h = {};
  __builtin_memcpy(&h, p, FULL ? sizeof h : 2 * n);
  return widen(h);
}

INLINE Floats load(const float* p) { return load<true>(p, W); }

template <bool FULL>
INLINE void store(float* p, Floats f, int64_t n) {
  __builtin_memcpy(p, &f, FULL ? sizeof f : 4 * n);
}

template <bool FULL>
INLINE void store(bfloat16* p, Floats f, int64_t n) {
  const Halves h = narrow(f);
  __builtin_memcpy(p, &h, FULL ? sizeof h : 2 * n);
}

INLINE void store(float* p, Floats f) { store<true>(p, f, W); }

INLINE void accumulate(float* p, Floats f) { store(p, load(p) + f); }

// 1 / (1 + exp(-h)), to a few units in the last place. |h| > 87 counts as 87: exp(88.7) is where float32 ends.
INLINE Floats sigmoid(Floats h) {
  const Floats lowest = Floats{} - 87.0f, highest = Floats{} + 87.0f;
  const Floats x = lowest > -h ? lowest : highest < -h ? highest : -h;  // not a number stays one
  // exp(x) = 2^k·exp(r), |r| <= ln(2)/2, in two steps because k·ln(2) is not exact
  const float shift = 12582912.0f;  // 1.5·2^23: adding it rounds, and leaves the integer in the low bits
  const Floats shifted = x * 1.44269504f + shift, k = shifted - shift;
  const Floats r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  Floats p = r * 1.384364441e-3f + 8.374162950e-3f;  // least greatest relative error with a constant 1: 2e-9
  p = p * r + 4.166800156e-2f;
  p = p * r + 1.666643173e-1f;
  p = p * r + 4.999999404e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
#ifdef __AVX512F__
  const __m512 d = _mm512_scalef_ps((__m512)p, (__m512)k) + 1.0f, near = _mm512_rcp14_ps(d);
  return (Floats)(near + near * (1.0f - d * near));
#else
  return 1.0f / (1.0f + p * (Floats)(((Bits)shifted << 23) + 0x3f800000u));
#endif
}

// f(first pixel, pixels, first channel, channels that count, whether all sixteen do) for each vector of a few pixels.
template <typename F>
INLINE void each_vector(Run run, F f) {
  for (int64_t p = 0; p < run.pixels; p += PIXELS) {
    const int64_t pixels = run.pixels - p < PIXELS ? run.pixels - p : PIXELS;
    int64_t i = 0;
    for (; i + W <= run.count; i += W) f(p, pixels, i, W, Constant<true>{});
    if (i < run.count) f(p, pixels, i, run.count - i, Constant<false>{});
  }
}

// --- the loops --------------------------------------------------------------------------------------------------------------

template <typename T>
void sums(Run run, const T* x, float* a, float* b) {
  each_vector(run, [&](int64_t first, int64_t pixels, int64_t i, int64_t n, auto full) INLINED {
    constexpr bool FULL = decltype(full)::value;
    const Floats origin = load<FULL>(x + i, n);
    const T* at = x + first * run.channels + i;
    Floats sum[2] = {}, square[2] = {};
    int64_t p = 0;
    for (; p + 2 <= pixels; p += 2, at += 2 * run.channels) {
      const Floats d[] = {load<FULL>(at, n) - origin, load<FULL>(at + run.channels, n) - origin};
      sum[0] += d[0], square[0] += d[0] * d[0];
      sum[1] += d[1], square[1] += d[1] * d[1];
    }
    if (p < pixels) {
      const Floats d = load<FULL>(at, n) - origin;
      sum[0] += d, square[0] += d * d;
    }
    accumulate(a + i, sum[0] + sum[1]);
    accumulate(b + i, square[0] + square[1]);
  });
}

template <bool SILU, typename T>
INLINE void apply_(Run run, Affine affine, const T* x, T* y) {
  each_vector(run, [&](int64_t first, int64_t pixels, int64_t i, int64_t n, auto full) INLINED {
    constexpr bool FULL = decltype(full)::value;
    const Floats centre = load(affine.centre + i), gain = load(affine.gain + i), offset = load(affine.offset + i);
    for (int64_t p = first; p < first + pixels; ++p) {
      const Floats h = (load<FULL>(x + p * run.channels + i, n) - centre) * gain + offset;
      store<FULL>(y + p * run.channels + i, SILU ? h * sigmoid(h) : h, n);
    }
  });
}

template <bool SILU, typename T>
INLINE void gradient_sums_(Run run, Affine affine, const T* x, const T* dy, float* kept, float* a, float* b, float* c) {
  const int64_t padded = (run.count + W - 1) / W * W;
  each_vector(run, [&](int64_t first, int64_t pixels, int64_t i, int64_t n, auto full) INLINED {
    constexpr bool FULL = decltype(full)::value;
    const Floats centre = load(affine.centre + i), gain = load(affine.gain + i), offset = load(affine.offset + i);
    Floats sum = {}, product = {}, shift = {};
    for (int64_t p = first; p < first + pixels; ++p) {
      const Floats d = load<FULL>(x + p * run.channels + i, n) - centre;
      Floats dh = load<FULL>(dy + p * run.channels + i, n);
      if (SILU) {
        const Floats h = d * gain + offset, s = sigmoid(h);
        dh *= s + h * s * (1.0f - s);
      }
      store(kept + p * padded + i, dh);
      sum += dh, product += dh * d, shift += d;
    }
    accumulate(a + i, sum);
    accumulate(b + i, product);
    accumulate(c + i, shift);
  });
}

template <typename T>
void gradient(Run run, Affine affine, const float* along, const float* across, const T* x, const float* kept, T* dx) {
  const int64_t padded = (run.count + W - 1) / W * W;
  each_vector(run, [&](int64_t first, int64_t pixels, int64_t i, int64_t n, auto full) INLINED {
    constexpr bool FULL = decltype(full)::value;
    const Floats centre = load(affine.centre + i), gain = load(affine.gain + i);
    const Floats one = load(along + i), slope = load(across + i);
    for (int64_t p = first; p < first + pixels; ++p) {
      const Floats d = load<FULL>(x + p * run.channels + i, n) - centre;
      store<FULL>(dx + p * run.channels + i, load(kept + p * padded + i) * gain - one - d * slope, n);
    }
  });
}

template <typename T>
void apply(Run run, Affine affine, bool silu, const T* x, T* y) {
  silu ? apply_<true>(run, affine, x, y) : apply_<false>(run, affine, x, y);
}

template <typename T>
void gradient_sums(
    Run run, Affine affine, bool silu, const T* x, const T* dy, float* kept, float* a, float* b, float* c) {
  silu ? gradient_sums_<true>(run, affine, x, dy, kept, a, b, c) : gradient_sums_<false>(run, affine, x, dy, kept, a, b, c);
}

}  // namespace

extern const Level LEVEL = {
    {sums<float>, apply<float>, gradient_sums<float>, gradient<float>},
    {sums<bfloat16>, apply<bfloat16>, gradient_sums<bfloat16>, gradient<bfloat16>},
};

}  // namespace potstill
