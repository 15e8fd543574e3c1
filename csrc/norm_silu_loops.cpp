// See csrc/norm_silu_loops.h. Compiled once for each level of instructions. Nothing here has a name outside but the table at the
// end: what the linker could share with code for older processors must not be compiled for newer ones.

#include "norm_silu_loops.h"

#ifdef __AVX2__
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

// The first n values at p, the others 0.
template <bool FULL, typename Vector, typename T>
INLINE Vector get(const T* p, int64_t n) {
  Vector v = {};
#ifdef __AVX512F__
  const __mmask16 some = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (!FULL && sizeof(T) == 4) return (Vector)_mm512_maskz_loadu_ps(some, p);
  if constexpr (!FULL && sizeof(T) == 2) return (Vector)_mm256_maskz_loadu_epi16(some, p);
#endif
  __builtin_memcpy(&v, p, FULL ? sizeof v : sizeof(T) * n);
  return v;
}

template <bool FULL, typename Vector, typename T>
INLINE void put(T* p, Vector v, int64_t n) {
#ifdef __AVX512F__
  const __mmask16 some = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (!FULL && sizeof(T) == 4) return _mm512_mask_storeu_ps(p, some, (__m512)v);
  if constexpr (!FULL && sizeof(T) == 2) return _mm256_mask_storeu_epi16(p, some, (__m256i)v);
#endif
  __builtin_memcpy(p, &v, FULL ? sizeof v : sizeof(T) * n);
}

template <bool FULL>
INLINE Floats load(const float* p, int64_t n) {
  return get<FULL, Floats>(p, n);
}

template <bool FULL>
INLINE Floats load(const bfloat16* p, int64_t n) {
  return widen(get<FULL, Halves>(p, n));
}

INLINE Floats load(const float* p) { return load<true>(p, W); }

template <bool FULL>
INLINE void store(float* p, Floats f, int64_t n) {
  put<FULL>(p, f, n);
}

template <bool FULL>
INLINE void store(bfloat16* p, Floats f, int64_t n) {
  put<FULL>(p, narrow(f), n);
}

INLINE void store(float* p, Floats f) { store<true>(p, f, W); }

INLINE void accumulate(float* p, Floats f) { store(p, load(p) + f); }

// h between -87 and 87: exp(88.7) is where float32 ends. What is not a number stays so.
INLINE Floats clamped(Floats h) {
#ifdef __AVX512F__
  return (Floats)_mm512_max_ps(_mm512_set1_ps(-87.0f), _mm512_min_ps(_mm512_set1_ps(87.0f), (__m512)h));
#elif defined(__AVX2__)  // GCC takes a choice between vectors wider than the machine's number by number
  __m256 half[2], low = _mm256_set1_ps(-87.0f), high = _mm256_set1_ps(87.0f);
  __builtin_memcpy(half, &h, sizeof half);
  for (__m256& v : half) v = _mm256_max_ps(low, _mm256_min_ps(high, v));
  __builtin_memcpy(&h, half, sizeof half);
  return h;
#else
  const Floats lowest = Floats{} - 87.0f, highest = Floats{} + 87.0f;
  return lowest > h ? lowest : highest < h ? highest : h;
#endif
}

#ifdef __AVX512F__
// 2^(j/32)
alignas(64) constexpr float POWERS[32] = {
    1.000000000f, 1.021897149f, 1.044273782f, 1.067140401f, 1.090507733f, 1.114386743f, 1.138788635f, 1.163724859f,
    1.189207115f, 1.215247360f, 1.241857812f, 1.269050957f, 1.296839555f, 1.325236643f, 1.354255547f, 1.383909882f,
    1.414213562f, 1.445180807f, 1.476826146f, 1.509164428f, 1.542210825f, 1.575980845f, 1.610490332f, 1.645755478f,
    1.681792831f, 1.718619298f, 1.756252160f, 1.794709075f, 1.834008086f, 1.874167634f, 1.915206561f, 1.957144124f,
};
#endif

// 1 / (1 + exp(-h)): EXACT to a few units of float32's last place, else to 1e-4, of which rounding to bfloat16 leaves nothing.
template <bool EXACT>
INLINE Floats sigmoid(Floats h) {
  // exp(-h) = 2^k·exp(-r), k to the nearest of an integer's STEPS parts. Adding 1.5·2^23 / STEPS rounds to those, and leaves
  // them in the low bits. float32's ln(2) is too large by 1.9e-9, which shows where exp(-h) is large.
#ifdef __AVX512F__
  constexpr float STEPS = 32.0f;
#else
  constexpr float STEPS = 1.0f;
#endif
  const float shift = 12582912.0f / STEPS;
  const Floats x = clamped(h), shifted = x * -1.44269504f + shift, k = shifted - shift, near_r = x + k * 0.693147181f;
  const Floats r = EXACT ? near_r - k * 1.904654e-9f : near_r;
#ifdef __AVX512F__
  const Floats p = EXACT ? (r * 0.49999998f - 1.000014672f) * r + 1.0f : 1.0f - r;  // to 5e-8 and 6e-5
  const __m512 power = _mm512_permutex2var_ps(_mm512_load_ps(POWERS), (__m512i)shifted, _mm512_load_ps(POWERS + W));
  const Floats d = (Floats)_mm512_scalef_ps(power, (__m512)k) * p + 1.0f, near = (Floats)_mm512_rcp14_ps((__m512)d);
  return EXACT ? near + near * (1.0f - d * near) : near;
#else
  Floats p;  // to 9e-8 and 1e-4
  if constexpr (EXACT) {
    p = r * -8.290229519e-3f + 4.189839026e-2f;
    p = p * r - 1.666764006e-1f;
    p = p * r + 4.999914615e-1f;
    p = p * r - 9.999997054e-1f;
  } else {
    p = r * -1.651768402e-1f + 5.041386175e-1f;
    p = p * r - 1.000196619f;
  }
  p = p * r + 1.0f;
  return 1.0f / (1.0f + (Floats)((Bits)p + ((Bits)shifted << 23)));  // k into p's exponent
#endif
}

template <typename T>
constexpr bool EXACT = sizeof(T) == 4;

// f, and 0 where dropout takes it: as `kept` in kernels/norm_silu.py, at `place` and the next 15.
template <bool DROPOUT>
INLINE Floats left(Floats f, Dropout d, uint32_t place) {
  if constexpr (!DROPOUT) return f;
  Bits bits = (Bits{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15} + place) ^ d.low;
  bits = (bits ^ (bits >> 16)) * 0x7feb352du;
  bits = ((bits ^ (bits >> 15)) + d.high) * 0x846ca68bu;
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256i stays[2];
  __builtin_memcpy(stays, &bits, sizeof stays);
  for (__m256i& v : stays) v = _mm256_cmpeq_epi32(v, _mm256_max_epu32(v, _mm256_set1_epi32(static_cast<int>(d.least))));
  __builtin_memcpy(&bits, stays, sizeof stays);
  return (Floats)((Bits)f & bits);
#else
  return bits >= d.least ? f : Floats{};
#endif
}

// f(whether a), f(whether a, whether b), ... as constants
template <typename F>
INLINE void choose(F f) {
  f();
}

template <typename F, typename... More>
INLINE void choose(F f, bool first, More... more) {
  const auto with = [&](auto chosen) INLINED { choose([&](auto... others) INLINED { f(chosen, others...); }, more...); };
  first ? with(Constant<true>{}) : with(Constant<false>{});
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
    constexpr int CHAINS = 4;  // of additions, as one waits for the last
    const Floats origin = load<FULL>(x + i, n);
    const T* at = x + first * run.channels + i;
    Floats sum[CHAINS] = {}, square[CHAINS] = {};
    int64_t p = 0;
    for (; p + CHAINS <= pixels; p += CHAINS, at += CHAINS * run.channels) {
      for (int j = 0; j < CHAINS; ++j) {
        const Floats d = load<FULL>(at + j * run.channels, n) - origin;
        sum[j] += d, square[j] += d * d;
      }
    }
    for (; p < pixels; ++p, at += run.channels) {
      const Floats d = load<FULL>(at, n) - origin;
      sum[0] += d, square[0] += d * d;
    }
    accumulate(a + i, (sum[0] + sum[1]) + (sum[2] + sum[3]));
    accumulate(b + i, (square[0] + square[1]) + (square[2] + square[3]));
  });
}

template <typename T>
void apply(Run run, Affine affine, bool silu, Dropout dropout, const T* x, T* y) {
  choose([&](auto curved, auto drops) INLINED {
    constexpr bool SILU = decltype(curved)::value, DROPOUT = decltype(drops)::value;
    each_vector(run, [&](int64_t first, int64_t pixels, int64_t i, int64_t n, auto full) INLINED {
      constexpr bool FULL = decltype(full)::value;
      const Floats centre = load(affine.centre + i), gain = load(affine.gain + i), offset = load(affine.offset + i);
      for (int64_t p = first; p < first + pixels; ++p) {
        const int64_t at = p * run.channels + i;
        const Floats h = (load<FULL>(x + at, n) - centre) * gain + offset;
        const Floats v = SILU ? h * sigmoid<EXACT<T>>(h) : h;
        store<FULL>(y + at, DROPOUT ? left<DROPOUT>(v * dropout.factor, dropout, dropout.place + at) : v, n);
      }
    });
  }, silu, dropout.least != 0);
}

template <typename T>
void gradient_sums(
    Run run, Affine affine, bool silu, Dropout dropout, const T* x, const T* dy, T* y, float* kept, int64_t row, float* a,
    float* b, float* c) {
  choose([&](auto curved, auto drops, auto again) INLINED {
    constexpr bool SILU = decltype(curved)::value, DROPOUT = decltype(drops)::value, AGAIN = decltype(again)::value;
    each_vector(run, [&](int64_t first, int64_t pixels, int64_t i, int64_t n, auto full) INLINED {
      constexpr bool FULL = decltype(full)::value;
      const Floats centre = load(affine.centre + i), gain = load(affine.gain + i), offset = load(affine.offset + i);
      Floats sum = {}, product = {}, shift = {};
      for (int64_t p = first; p < first + pixels; ++p) {
        const int64_t at = p * run.channels + i;
        const Floats d = load<FULL>(x + at, n) - centre;
        Floats dh = load<FULL>(dy + at, n), v = d * gain + offset;
        if (SILU) {
          const Floats s = sigmoid<EXACT<T>>(v);
          v *= s, dh *= s + v * (1.0f - s);
        }
        if (DROPOUT) v *= dropout.factor;
        dh = left<DROPOUT>(dh, dropout, dropout.place + at);
        if (AGAIN) store<FULL>(y + at, left<DROPOUT>(v, dropout, dropout.place + at), n);
        store<FULL>(kept + p * row + i, dh, n);
        sum += dh, product += dh * d, shift += d;
      }
      accumulate(a + i, sum);
      accumulate(b + i, product);
      accumulate(c + i, shift);
    });
  }, silu, dropout.least != 0, y != nullptr);
}

template <typename T>
void gradient(
    Run run, Affine affine, const float* along, const float* across, const T* skip, float factor, const T* x,
    const float* kept, int64_t row, T* dx) {
  choose([&](auto skips) INLINED {
    constexpr bool SKIP = decltype(skips)::value;
    each_vector(run, [&](int64_t first, int64_t pixels, int64_t i, int64_t n, auto full) INLINED {
      constexpr bool FULL = decltype(full)::value;
      const Floats centre = load(affine.centre + i), gain = load(affine.gain + i);
      const Floats one = load(along + i), slope = load(across + i);
      for (int64_t p = first; p < first + pixels; ++p) {
        const int64_t at = p * run.channels + i;
        const Floats d = load<FULL>(x + at, n) - centre;
        Floats v = load<FULL>(kept + p * row + i, n) * gain - one - d * slope;
        if (SKIP) v += load<FULL>(skip + at, n) * factor;
        store<FULL>(dx + at, v, n);
      }
    });
  }, skip != nullptr);
}

template <typename T>
void residual(Run run, const T* h, const float* bias, const T* skip, float scale, T* out) {
  each_vector(run, [&](int64_t first, int64_t pixels, int64_t i, int64_t n, auto full) INLINED {
    constexpr bool FULL = decltype(full)::value;
    const Floats constant = load(bias + i);
    for (int64_t p = first; p < first + pixels; ++p) {
      const int64_t at = p * run.channels + i;
      store<FULL>(out + at, (load<FULL>(h + at, n) + constant + load<FULL>(skip + at, n)) * scale, n);
    }
  });
}

template <typename T>
constexpr Loops<T> LOOPS = {sums<T>, apply<T>, gradient_sums<T>, gradient<T>, residual<T>};

}  // namespace

extern const Level LEVEL = {LOOPS<float>, LOOPS<bfloat16>};

}  // namespace potstill
