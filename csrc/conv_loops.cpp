// See csrc/conv_loops.h. Compiled once for each level of instructions. Nothing here has a name outside but the table at the end:
// what the linker could share with code for older processors must not be compiled for newer ones.

#include "conv_loops.h"

#include <utility>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define INLINED __attribute__((always_inline))
#define INLINE INLINED inline

namespace potstill::conv {
namespace {

// ROWS·PANEL sums, a row's value and PANEL columns fill the registers.
#if defined(__AVX512F__)
constexpr int LANES = 16, ROWS = 14;
#elif defined(__AVX2__)
constexpr int LANES = 8, ROWS = 6;
#else
constexpr int LANES = 4, ROWS = 6;
#endif

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));

// --- a vector, n < LANES values where the channels end ----------------------------------------------------------------------

INLINE Floats load(const float* p) {
  Floats f;
  __builtin_memcpy(&f, p, sizeof f);
  return f;
}

INLINE void store(float* p, Floats f) { __builtin_memcpy(p, &f, sizeof f); }

INLINE Floats load(const float* p, int64_t n) {
  if (n >= LANES) return load(p);
#ifdef __AVX512F__
  return (Floats)_mm512_maskz_loadu_ps((1u << n) - 1u, p);
#else
  Floats f = {};
  __builtin_memcpy(&f, p, 4 * n);
  return f;
#endif
}

INLINE void store(float* p, Floats f, int64_t n) {
  if (n >= LANES) return store(p, f);
#ifdef __AVX512F__
  _mm512_mask_storeu_ps(p, (1u << n) - 1u, (__m512)f);
#else
  __builtin_memcpy(p, &f, 4 * n);
#endif
}

template <int FROM, int... I>
INLINE Floats interleave(Floats a, Floats b, std::integer_sequence<int, I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, (FROM + I / 2 + I % 2 * LANES)...);
#else
  return __builtin_shuffle(a, b, Ints{(FROM + I / 2 + I % 2 * LANES)...});
#endif
}

// A square of LANES vectors: interleaving its halves log2(LANES) times exchanges rows and columns.
INLINE void transpose(Floats* v) {
  constexpr std::make_integer_sequence<int, LANES> all;
#pragma GCC unroll 4
  for (int step = 1; step < LANES; step *= 2) {
    Floats w[LANES];
#pragma GCC unroll 8
    for (int i = 0; i < LANES / 2; ++i) {
      w[2 * i] = interleave<0>(v[i], v[i + LANES / 2], all);
      w[2 * i + 1] = interleave<LANES / 2>(v[i], v[i + LANES / 2], all);
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; ++i) v[i] = w[i];
  }
}

// to [columns, LANES] = from [rows, columns], with zeros for the rows from `rows` to LANES
INLINE void transposed(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_row) {
  for (int64_t first = 0; first < columns; first += LANES) {
    const int64_t n = columns - first < LANES ? columns - first : LANES;
    Floats v[LANES];
    if (rows == LANES && n == LANES) {
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) v[i] = load(from + i * stride + first);
    } else {
      for (int i = 0; i < LANES; ++i) v[i] = i < rows ? load(from + i * stride + first, n) : Floats{};
    }
    transpose(v);
    for (int64_t i = 0; i < n; ++i) store(to + (first + i) * to_row, v[i]);
  }
}

// --- the transforms, of one dimension ---------------------------------------------------------------------------------------
// With points 0, a, -a, b, -b and infinity, a = √½ and b = √2, so that a·b = 1 and a² + b² = 2.5.

constexpr float A = 0.707106781186547524f, B = 1.41421356237309505f;

struct InputTransform {
  static constexpr int FROM = 6, TO = 6;
  static INLINE void apply(const Floats* d, Floats* p) {
    const Floats even_a = d[4] - 2.0f * d[2], odd_a = d[3] - 2.0f * d[1];
    const Floats even_b = d[4] - 0.5f * d[2], odd_b = d[3] - 0.5f * d[1];
    p[0] = d[0] + d[4] - 2.5f * d[2];
    p[1] = even_a + A * odd_a, p[2] = even_a - A * odd_a;
    p[3] = even_b + B * odd_b, p[4] = even_b - B * odd_b;
    p[5] = d[1] + d[5] - 2.5f * d[3];
  }
};

struct OutputTransform {
  static constexpr int FROM = 6, TO = 4;
  static INLINE void apply(const Floats* p, Floats* y) {
    const Floats even_a = p[1] + p[2], odd_a = A * (p[1] - p[2]), even_b = p[3] + p[4], odd_b = B * (p[3] - p[4]);
    y[0] = p[0] + even_a + even_b;
    y[1] = odd_a + odd_b;
    y[2] = 0.5f * even_a + 2.0f * even_b;
    y[3] = p[5] + 0.5f * odd_a + 2.0f * odd_b;
  }
};

struct GradientTransform {  // the transposed one of the output
  static constexpr int FROM = 4, TO = 6;
  static INLINE void apply(const Floats* y, Floats* p) {
    const Floats even_a = y[0] + 0.5f * y[2], odd_a = A * (y[1] + 0.5f * y[3]);
    const Floats even_b = y[0] + 2.0f * y[2], odd_b = B * (y[1] + 2.0f * y[3]);
    p[0] = y[0];
    p[1] = even_a + odd_a, p[2] = even_a - odd_a;
    p[3] = even_b + odd_b, p[4] = even_b - odd_b;
    p[5] = y[3];
  }
};

struct WeightTransform {
  static constexpr int FROM = 3, TO = 6;
  static INLINE void apply(const Floats* g, Floats* p) {
    const Floats even_a = (-2.0f / 3) * (g[0] + 0.5f * g[2]), odd_a = (-2.0f / 3 * A) * g[1];
    const Floats even_b = (1.0f / 6) * (g[0] + 2.0f * g[2]), odd_b = (1.0f / 6 * B) * g[1];
    p[0] = g[0];
    p[1] = even_a + odd_a, p[2] = even_a - odd_a;
    p[3] = even_b + odd_b, p[4] = even_b - odd_b;
    p[5] = g[2];
  }
};

struct WeightGradientTransform {  // the transposed one of the weight
  static constexpr int FROM = 6, TO = 3;
  static INLINE void apply(const Floats* p, Floats* g) {
    const Floats even_a = (-2.0f / 3) * (p[1] + p[2]), even_b = (1.0f / 6) * (p[3] + p[4]);
    g[0] = p[0] + even_a + even_b;
    g[1] = (-2.0f / 3 * A) * (p[1] - p[2]) + (1.0f / 6 * B) * (p[3] - p[4]);
    g[2] = p[5] + 0.5f * even_a + 2.0f * even_b;
  }
};

// Both dimensions: put(i, values) for each of TO·TO results, from get(i) for each of FROM·FROM values.
template <typename T, typename Get, typename Put>
INLINE void transform(Get get, Put put) {
  Floats half[T::TO][T::FROM];
#pragma GCC unroll 6
  for (int i = 0; i < T::FROM; ++i) {
    Floats from[T::FROM], to[T::TO];
#pragma GCC unroll 6
    for (int j = 0; j < T::FROM; ++j) from[j] = get(i * T::FROM + j);
    T::apply(from, to);
#pragma GCC unroll 6
    for (int j = 0; j < T::TO; ++j) half[j][i] = to[j];
  }
#pragma GCC unroll 6
  for (int j = 0; j < T::TO; ++j) {
    Floats to[T::TO];
    T::apply(half[j], to);
#pragma GCC unroll 6
    for (int i = 0; i < T::TO; ++i) put(i * T::TO + j, to[i]);
  }
}

// --- tiles --------------------------------------------------------------------------------------------------------------------

struct Place {
  int64_t n, y, x;  // the first pixel
};

INLINE Place place(const Images& images, int64_t tile) {
  const int64_t each = images.down * images.across, rest = tile % each;
  return {tile / each, rest / images.across * TILE, rest % images.across * TILE};
}

template <typename T, int BORDER>
INLINE void points(
    const Images& images, const float* x, const float* zeros, int64_t first, int64_t tiles, float* to, int64_t row,
    int64_t plane) {
  constexpr int SIDE = T::FROM;
  for (int64_t tile = 0; tile < tiles; ++tile, to += row) {
    const Place at = place(images, first + tile);
    const float* pixels[SIDE * SIDE];
    for (int i = 0; i < SIDE; ++i) {
      const int64_t y = at.y + i - BORDER;
      const float* line = x + (at.n * images.height + y) * images.width * images.channels;
      for (int j = 0; j < SIDE; ++j) {
        const int64_t along = at.x + j - BORDER;
        const bool inside = y >= 0 && y < images.height && along >= 0 && along < images.width;
        pixels[i * SIDE + j] = inside ? line + along * images.channels : zeros;
      }
    }
    int64_t c = 0;
    const auto put = [&](int i, Floats f) INLINED { store(to + i * plane + c, f); };
    for (; c + LANES <= images.channels; c += LANES) {
      transform<T>([&](int i) INLINED { return load(pixels[i] + c); }, put);
    }
    if (const int64_t n = images.channels - c; n > 0) {
      transform<T>([&](int i) INLINED { return load(pixels[i] + c, n); }, put);
    }
  }
}

void input(
    Images images, const float* x, const float* zeros, int64_t first, int64_t tiles, float* to, int64_t row, int64_t plane) {
  points<InputTransform, 1>(images, x, zeros, first, tiles, to, row, plane);
}

void gradient(
    Images images, const float* dy, const float* zeros, int64_t first, int64_t tiles, float* to, int64_t row, int64_t plane) {
  points<GradientTransform, 0>(images, dy, zeros, first, tiles, to, row, plane);
}

void output(
    Images images, const float* from, int64_t first, int64_t tiles, int64_t channel, int64_t count, Epilogue epilogue,
    float* y) {
  for (int64_t tile = 0; tile < tiles; ++tile, from += POINTS * PANEL * LANES) {
    const Place at = place(images, first + tile);
    const int64_t down = images.height - at.y, across = images.width - at.x;
    const int64_t pixel = ((at.n * images.height + at.y) * images.width + at.x) * images.channels;
    for (int64_t c = 0; c < count; c += LANES) {
      const int64_t n = count - c, corner = pixel + channel + c;
      const Floats bias = epilogue.bias ? load(epilogue.bias + channel + c, n) : Floats{};
      transform<OutputTransform>(
          [&](int i) INLINED { return load(from + i * PANEL * LANES + c); },
          [&](int i, Floats f) INLINED {
            if (i / TILE >= down || i % TILE >= across) return;
            const int64_t to = corner + (i / TILE * images.width + i % TILE) * images.channels;
            f += bias;
            if (epilogue.skip) f += load(epilogue.skip + to, n);
            store(y + to, f * epilogue.scale, n);
          });
    }
  }
}

// --- weights --------------------------------------------------------------------------------------------------------------------

void weight(Weight weight, int64_t columns, int64_t inner, float* to, int64_t row, int64_t plane) {
  float taps[TAPS * LANES * LANES];  // of LANES inner indices: [inner, tap, column], or [tap, inner, column]
  for (int64_t first = 0; first < inner; first += LANES) {
    const int64_t count = inner - first < LANES ? inner - first : LANES;
    const float* from = weight.data + first * weight.inner;
    int64_t inner_taps = TAPS, tap = 1;
    if (weight.column == 1) {
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t t = 0; t < TAPS; ++t) {
          store(taps + (r * TAPS + t) * LANES, load(from + r * weight.inner + t * weight.tap, columns));
        }
      }
    } else if (weight.inner == 1) {
      inner_taps = 1, tap = count;
      for (int64_t t = 0; t < TAPS; ++t) {
        transposed(from + t * weight.tap, weight.column, columns, count, taps + t * count * LANES, LANES);
      }
    } else if (weight.inner == TAPS) {
      transposed(from, weight.column, columns, TAPS * count, taps, LANES);
    } else {
      for (int64_t r = 0; r < count; ++r) {
        transposed(from + r * weight.inner, weight.column, columns, TAPS, taps + r * TAPS * LANES, LANES);
      }
    }
    const int64_t origin = weight.flipped ? TAPS - 1 : 0, sign = weight.flipped ? -1 : 1;
    for (int64_t r = 0; r < count; ++r) {
      float* at = to + (first + r) * row;
      transform<WeightTransform>(
          [&](int i) INLINED { return load(taps + (r * inner_taps + (origin + sign * i) * tap) * LANES); },
          [&](int i, Floats f) INLINED { store(at + i * plane, f); });
    }
  }
}

void weight_gradient(const float* from, int64_t plane, int64_t columns, float scale, float* to, int64_t column, int64_t tap) {
  Floats taps[TAPS < LANES ? LANES : TAPS] = {};
  transform<WeightGradientTransform>(
      [&](int i) INLINED { return load(from + i * plane); }, [&](int i, Floats f) INLINED { taps[i] = f * scale; });
  if (column == 1) {
    for (int64_t t = 0; t < TAPS; ++t) store(to + t * tap, taps[t], columns);
  } else if constexpr (TAPS < LANES) {
    transpose(taps);
    for (int64_t i = 0; i < columns; ++i) store(to + i * column, taps[i], TAPS);
  } else {
    for (int64_t i = 0; i < columns; ++i) {
      for (int64_t t = 0; t < TAPS; ++t) to[i * column + t] = taps[t][i];
    }
  }
}

// --- products -------------------------------------------------------------------------------------------------------------------

// ALONG: a is contiguous along what is summed over, else along rows.
template <int R, int V, bool ALONG>
void product(const Product& given, const float* a, const float* b, float* to) {
  const int64_t row = ALONG ? given.a_row : 1, step = ALONG ? 1 : given.a_inner;
  Floats sums[R][V] = {};
  for (int64_t i = 0; i < given.inner; ++i, a += step, b += given.b_inner) {
    Floats columns[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) columns[v] = load(b + v * LANES);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const float value = a[r * row];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] += value * columns[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* at = to + r * given.to_row + v * LANES;
      store(at, given.add ? load(at) + sums[r][v] : sums[r][v]);
    }
  }
}

using OfRows = void (*)(const Product& given, const float* a, const float* b, float* to);

template <int V, bool ALONG, int... R>
INLINE void multiply_(const Product& given, std::integer_sequence<int, R...>) {
  static constexpr OfRows of[] = {product<R + 1, V, ALONG>...};
  const int64_t parts = (given.rows + ROWS - 1) / ROWS;
  for (int64_t point = 0; point < given.points; ++point) {
    const float *a = given.a + point * given.a_point, *b = given.b + point * given.b_point;
    float* to = given.to + point * given.to_point;
    for (int64_t part = 0, row = 0; part < parts; ++part) {  // of rows, all about the same
      const int64_t next = given.rows * (part + 1) / parts;
      of[next - row - 1](given, a + row * given.a_row, b, to + row * given.to_row);
      row = next;
    }
  }
}

void multiply(const Product& given) {
  constexpr std::make_integer_sequence<int, ROWS> rows;
  if (given.a_inner == 1) {
    given.vectors == 1 ? multiply_<1, true>(given, rows) : multiply_<2, true>(given, rows);
  } else {
    given.vectors == 1 ? multiply_<1, false>(given, rows) : multiply_<2, false>(given, rows);
  }
}

}  // namespace

extern const Level LEVEL = {LANES, ROWS, weight, input, gradient, multiply, transposed, output, weight_gradient};

}  // namespace potstill::conv
