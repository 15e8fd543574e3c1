// GroupNorm, scale and shift, SiLU, dropout, as in kernels/norm_silu.py: one block takes one sample and a few whole groups.
//
// Each thread keeps V neighbouring values of memory: channels in NHWC, pixels of one channel in NCHW. A slab that fits
// in shared memory is read from global memory once. Sums are taken about the first pixel, in a fixed order.

#include "common.cuh"

#include <algorithm>
#include <cmath>

namespace potstill {
namespace {

constexpr int MAX_THREADS = 512;

// A small tensor of any floating type: parameters and embeddings.
struct Small {
  void* data;
  ScalarType dtype;
  int64_t stride;  // between samples

  __device__ float get(int64_t i) const {
    if (dtype == ScalarType::Float) return static_cast<const float*>(data)[i];
    if (dtype == ScalarType::BFloat16) return static_cast<float>(static_cast<const BFloat16*>(data)[i]);
    return static_cast<float>(static_cast<const Half*>(data)[i]);
  }

  __device__ void set(int64_t i, float v) const {
    if (dtype == ScalarType::Float) {
      static_cast<float*>(data)[i] = v;
    } else if (dtype == ScalarType::BFloat16) {
      static_cast<BFloat16*>(data)[i] = static_cast<BFloat16>(v);
    } else {
      static_cast<Half*>(data)[i] = static_cast<Half>(v);
    }
  }
};

Small small(const std::optional<Tensor>& t) {
  if (!t.has_value()) return {nullptr, ScalarType::Float, 0};
  with_float_type(t->scalar_type(), [](auto*) {});
  return {t->mutable_data_ptr(), t->scalar_type(), t->dim() == 2 ? t->stride(0) : 0};
}

struct Norm {
  Small weight, bias, scale, shift, add;
  int channels, pixels, groups, taken;  // taken: groups a block works on
  bool silu;
};

// What dropout leaves: `kept` of kernels/norm_silu.py. The key is read on the device; without one everything stays.
struct Dropout {
  const int64_t* key;
  uint32_t least;
  float factor;  // of what stays
};

Dropout make_dropout(double dropout, const std::optional<Tensor>& key) {
  if (!key.has_value() || dropout == 0.0) return {nullptr, 0, 1.0f};
  const double least = std::min(std::nearbyint(dropout * 4294967296.0), 4294967295.0);
  return {pointer<int64_t>(key), static_cast<uint32_t>(least), static_cast<float>(1.0 / (1.0 - dropout))};
}

struct Mask {
  bool all;
  uint32_t low, high, least;

  __device__ explicit Mask(const Dropout& dropout) : all(dropout.key == nullptr), least(dropout.least) {
    const int64_t key = all ? 0 : *dropout.key;
    low = static_cast<uint32_t>(key);
    high = static_cast<uint32_t>(key >> 32);
  }

  // place: in NHWC order, modulo 2^32.
  __device__ bool keeps(uint32_t place) const {
    if (all) return true;
    uint32_t bits = place ^ low;
    bits = (bits ^ (bits >> 16)) * 0x7FEB352Du;
    bits = (bits ^ (bits >> 15)) + high;
    return bits * 0x846CA68Bu >= least;
  }
};

// Where a thread's values are: base + i·step for i = slot, slot + slots, ..., count; all offsets inside a sample.
struct Place {
  int column;  // of its first value among the block's channels
  int columns, slot, slots, count;
  int64_t base, step;
  bool works;
};

template <int V, bool LAST>
__device__ __forceinline__ Place place(const Norm& norm) {
  const int per_group = norm.channels / norm.groups, columns = norm.taken * per_group;
  const int first = (blockIdx.x % (norm.groups / norm.taken)) * columns, t = threadIdx.x;
  Place p;
  p.columns = columns;
  if (LAST) {
    const int lanes = columns / V;
    p.slots = blockDim.x / lanes;
    p.slot = t / lanes;
    p.column = (t % lanes) * V;
    p.count = norm.pixels;
    p.base = first + p.column;
    p.step = norm.channels;
  } else {
    p.slots = blockDim.x / columns;
    p.slot = t % p.slots;
    p.column = t / p.slots;
    p.count = norm.pixels / V;
    p.base = static_cast<int64_t>(first + p.column) * norm.pixels;
    p.step = V;
  }
  p.works = LAST ? p.slot < p.slots : p.column < columns;
  return p;
}

// The place in NHWC order, modulo 2^32, of value k of a thread's i-th access.
template <int V, bool LAST>
__device__ __forceinline__ uint32_t nhwc(const Norm& norm, const Place& p, int n, int first, int i, int k) {
  const uint32_t pixel = LAST ? i : i * V + k, channel = first + p.column + (LAST ? k : 0);
  return (static_cast<uint32_t>(n) * norm.pixels + pixel) * norm.channels + channel;
}

// Sums over the block's threads for each of its channels, into out [columns]. work holds blockDim·V floats.
template <int V, bool LAST>
__device__ void column_sums(const Place& p, const float (&value)[V], float* work, float* out) {
  const int stride = LAST ? p.columns : p.columns + 1;  // NCHW: neighbouring threads write different banks
  if (p.works) {
    if (LAST) {
#pragma unroll
      for (int k = 0; k < V; ++k) work[p.slot * stride + p.column + k] = value[k];
    } else {
      float sum = 0.0f;
#pragma unroll
      for (int k = 0; k < V; ++k) sum += value[k];
      work[p.slot * stride + p.column] = sum;
    }
  }
  __syncthreads();
  const int threads = blockDim.x, helpers = threads >= 2 * p.columns ? threads / p.columns : 1;
  float sum = 0.0f;
  if (helpers == 1) {
    for (int c = threadIdx.x; c < p.columns; c += threads) {
      sum = 0.0f;
      for (int s = 0; s < p.slots; ++s) sum += work[s * stride + c];
      out[c] = sum;
    }
  } else {
    const int c = threadIdx.x % p.columns, h = threadIdx.x / p.columns;
    for (int s = h; s < p.slots; s += helpers) sum += work[s * stride + c];
    __syncthreads();
    if (h < helpers) work[h * p.columns + c] = sum;
    __syncthreads();
    if (h == 0) {
      sum = 0.0f;
      for (int k = 0; k < helpers; ++k) sum += work[k * p.columns + c];
      out[c] = sum;
    }
  }
  __syncthreads();
}

// Per channel of the block, [columns] each in shared memory: h = gain·(x - centre) + offset.
struct Affine {
  float *centre, *gain, *offset;
};

__device__ __forceinline__ void fill_affine(
    const Norm& norm, int n, int first, int columns, const float* mean, const float* rstd, const Affine& to) {
  const int per_group = norm.channels / norm.groups;
  for (int c = threadIdx.x; c < columns; c += blockDim.x) {
    const int channel = first + c, g = c / per_group;
    const float factor = norm.scale.data ? 1.0f + norm.scale.get(n * norm.scale.stride + channel) : 1.0f;
    const float shift = norm.shift.data ? norm.shift.get(n * norm.shift.stride + channel) : 0.0f;
    to.centre[c] = mean[g] - (norm.add.data ? norm.add.get(n * norm.add.stride + channel) : 0.0f);
    to.gain[c] = norm.weight.get(channel) * factor * rstd[g];
    to.offset[c] = norm.bias.get(channel) * factor + shift;
  }
  __syncthreads();
}

template <int V, bool LAST>
__device__ __forceinline__ void take(const Place& p, const float* from, float (&to)[V]) {
  if (!p.works) return;
#pragma unroll
  for (int k = 0; k < V; ++k) to[k] = from[p.column + (LAST ? k : 0)];
}

__device__ __forceinline__ float sigmoid(float h) { return 1.0f / (1.0f + expf(-h)); }

template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(MAX_THREADS, 1) forward_kernel(
    const T* x, T* y, float* mean_out, float* rstd_out, Norm norm, Dropout dropout,
    float eps, bool cached) {
  using Values = Vec<T, V>;
  const Place p = place<V, LAST>(norm);
  const int blocks = norm.groups / norm.taken, per_group = norm.channels / norm.groups;
  const int n = blockIdx.x / blocks, first_group = (blockIdx.x % blocks) * norm.taken;
  const int first = first_group * per_group;
  DYNAMIC_SHARED(float, shared);
  float* first_sum = shared;  // [columns] five times, [taken] twice, then the threads' work, then the slab
  float* second_sum = first_sum + p.columns;
  const Affine affine{second_sum + p.columns, second_sum + 2 * p.columns, second_sum + 3 * p.columns};
  float* mean = affine.offset + p.columns;
  float* rstd = mean + norm.taken;
  float* work = shared + (5 * p.columns + 2 * norm.taken + 3) / 4 * 4;
  auto* slab = reinterpret_cast<Values*>(work + (blockDim.x * (LAST ? V : 2) + 3) / 4 * 4);
  x += static_cast<int64_t>(n) * norm.channels * norm.pixels;
  y += static_cast<int64_t>(n) * norm.channels * norm.pixels;

  float pivot[V], sum[V], square[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int64_t channel = first + p.column + (LAST ? k : 0);
    pivot[k] = p.works ? static_cast<float>(x[channel * (LAST ? 1 : norm.pixels)]) : 0.0f;
    sum[k] = square[k] = 0.0f;
  }
  if (p.works) {
    for (int i = p.slot; i < p.count; i += p.slots) {
      const Values v = *reinterpret_cast<const Values*>(x + p.base + i * p.step);
      if (cached) slab[(i / p.slots) * blockDim.x + threadIdx.x] = v;
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float d = static_cast<float>(v.v[k]) - pivot[k];
        sum[k] += d;
        square[k] += d * d;
      }
    }
  }
  column_sums<V, LAST>(p, sum, work, first_sum);
  column_sums<V, LAST>(p, square, work, second_sum);
  for (int g = threadIdx.x; g < norm.taken; g += blockDim.x) {
    float total = 0.0f, spread = 0.0f;
    for (int c = g * per_group; c < (g + 1) * per_group; ++c) {
      const float at = static_cast<float>(x[static_cast<int64_t>(first + c) * (LAST ? 1 : norm.pixels)]);
      const float add = norm.add.data ? norm.add.get(n * norm.add.stride + first + c) : 0.0f;
      affine.centre[c] = at + add + first_sum[c] / norm.pixels;  // the mean of the channel
      total += affine.centre[c];
    }
    mean[g] = total / per_group;
    for (int c = g * per_group; c < (g + 1) * per_group; ++c) {
      const float off = affine.centre[c] - mean[g];
      spread += second_sum[c] - first_sum[c] * first_sum[c] / norm.pixels + norm.pixels * off * off;
    }
    rstd[g] = 1.0f / sqrtf(fmaxf(spread / (per_group * norm.pixels), 0.0f) + eps);
    mean_out[static_cast<int64_t>(n) * norm.groups + first_group + g] = mean[g];
    rstd_out[static_cast<int64_t>(n) * norm.groups + first_group + g] = rstd[g];
  }
  __syncthreads();
  fill_affine(norm, n, first, p.columns, mean, rstd, affine);
  float centre[V], gain[V], offset[V];
  take<V, LAST>(p, affine.centre, centre);
  take<V, LAST>(p, affine.gain, gain);
  take<V, LAST>(p, affine.offset, offset);
  if (!p.works) return;
  const Mask mask(dropout);
  for (int i = p.slot; i < p.count; i += p.slots) {
    Values v = cached ? slab[(i / p.slots) * blockDim.x + threadIdx.x]
                      : *reinterpret_cast<const Values*>(x + p.base + i * p.step);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float h = (static_cast<float>(v.v[k]) - centre[k]) * gain[k] + offset[k];
      const float kept = (norm.silu ? h * sigmoid(h) : h) * dropout.factor;
      v.v[k] = static_cast<T>(mask.keeps(nhwc<V, LAST>(norm, p, n, first, i, k)) ? kept : 0.0f);
    }
    *reinterpret_cast<Values*>(y + p.base + i * p.step) = v;
  }
}

// The gradient to h from the one to y, and y, both without dropout.
struct Through {
  float dh, y;

  __device__ Through(float dy, float h, bool silu) : dh(dy), y(h) {
    if (!silu) return;
    const float s = sigmoid(h);
    y *= s;
    dh *= y * (1.0f - s) + s;
  }
};

// Backward's images besides x, dy and dx, and its factors.
template <typename T>
struct Block {
  const T* skip;  // dx has factor·skip added, if there is one
  T* y;  // written if there is room
  float dy_factor, skip_factor;
};

// dx = gain·dh - along - across·(x - mean): `along` and `across` are means over the group of gain·dh and of
// gain·dh·(x - mean)/var. sums [2, N, C]: over pixels of dh and dh·xhat.
template <typename T, int V, bool LAST>
__global__ void __launch_bounds__(MAX_THREADS, 1) backward_kernel(
    const T* dy, const T* x, const float* mean, const float* rstd, T* dx, float* sums, Small dadd, Norm norm,
    Dropout dropout, Block<T> more, int samples, bool cached) {
  using Values = Vec<T, V>;
  const Place p = place<V, LAST>(norm);
  const int blocks = norm.groups / norm.taken, per_group = norm.channels / norm.groups;
  const int n = blockIdx.x / blocks, first_group = (blockIdx.x % blocks) * norm.taken;
  const int first = first_group * per_group;
  DYNAMIC_SHARED(float, shared);
  float* dh_sum = shared;  // [columns] six times, [taken] twice, then the threads' work, then the slabs of x and dy
  float* dhd_sum = dh_sum + p.columns;
  float* d_sum = dhd_sum + p.columns;
  const Affine affine{d_sum + p.columns, d_sum + 2 * p.columns, d_sum + 3 * p.columns};
  float* along = affine.offset + p.columns;
  float* across = along + norm.taken;
  float* work = shared + (6 * p.columns + 2 * norm.taken + 3) / 4 * 4;
  auto* slab = reinterpret_cast<Values*>(work + (blockDim.x * (LAST ? V : 2) + 3) / 4 * 4);
  const int rounds = (p.count + p.slots - 1) / p.slots;
  const int64_t at = static_cast<int64_t>(n) * norm.channels * norm.pixels;
  x += at;
  dy += at;
  dx += at;
  if (more.skip != nullptr) more.skip += at;
  if (more.y != nullptr) more.y += at;
  const Mask mask(dropout);
  const float dy_factor = more.dy_factor * dropout.factor;
  mean += static_cast<int64_t>(n) * norm.groups + first_group;
  rstd += static_cast<int64_t>(n) * norm.groups + first_group;
  fill_affine(norm, n, first, p.columns, mean, rstd, affine);
  float centre[V] = {}, gain[V] = {}, offset[V] = {}, sum_dh[V], sum_dhd[V], sum_d[V];
  take<V, LAST>(p, affine.centre, centre);
  take<V, LAST>(p, affine.gain, gain);
  take<V, LAST>(p, affine.offset, offset);
#pragma unroll
  for (int k = 0; k < V; ++k) sum_dh[k] = sum_dhd[k] = sum_d[k] = 0.0f;
  if (p.works) {
    for (int i = p.slot; i < p.count; i += p.slots) {
      const Values xv = *reinterpret_cast<const Values*>(x + p.base + i * p.step);
      const Values gv = *reinterpret_cast<const Values*>(dy + p.base + i * p.step);
      if (cached) {
        slab[(i / p.slots) * blockDim.x + threadIdx.x] = xv;
        slab[(rounds + i / p.slots) * blockDim.x + threadIdx.x] = gv;
      }
#pragma unroll
      for (int k = 0; k < V; ++k) {
        const float d = static_cast<float>(xv.v[k]) - centre[k];
        const Through to(static_cast<float>(gv.v[k]) * dy_factor, d * gain[k] + offset[k], norm.silu);
        const float dh = mask.keeps(nhwc<V, LAST>(norm, p, n, first, i, k)) ? to.dh : 0.0f;
        sum_dh[k] += dh;
        sum_dhd[k] += dh * d;
        sum_d[k] += d;
      }
    }
  }
  column_sums<V, LAST>(p, sum_dh, work, dh_sum);
  column_sums<V, LAST>(p, sum_dhd, work, dhd_sum);
  if (dadd.data != nullptr) column_sums<V, LAST>(p, sum_d, work, d_sum);
  for (int g = threadIdx.x; g < norm.taken; g += blockDim.x) {
    float a = 0.0f, b = 0.0f;
    for (int c = g * per_group; c < (g + 1) * per_group; ++c) {
      a += affine.gain[c] * dh_sum[c];
      b += affine.gain[c] * dhd_sum[c];
    }
    const float count = static_cast<float>(per_group) * norm.pixels;
    along[g] = a / count;
    across[g] = b / count * rstd[g] * rstd[g];
  }
  __syncthreads();
  for (int c = threadIdx.x; c < p.columns; c += blockDim.x) {
    const int64_t i = static_cast<int64_t>(n) * norm.channels + first + c;
    const int g = c / per_group;
    if (sums != nullptr) {
      sums[i] = dh_sum[c];
      sums[static_cast<int64_t>(samples) * norm.channels + i] = dhd_sum[c] * rstd[g];
    }
    if (dadd.data != nullptr)
      dadd.set(i, affine.gain[c] * dh_sum[c] - norm.pixels * along[g] - across[g] * d_sum[c]);
  }
  if (!p.works) return;
  float along_k[V], across_k[V];
#pragma unroll
  for (int k = 0; k < V; ++k) {
    const int g = (p.column + (LAST ? k : 0)) / per_group;
    along_k[k] = along[g];
    across_k[k] = across[g];
  }
  for (int i = p.slot; i < p.count; i += p.slots) {
    const Values xv = cached ? slab[(i / p.slots) * blockDim.x + threadIdx.x]
                             : *reinterpret_cast<const Values*>(x + p.base + i * p.step);
    Values gv = cached ? slab[(rounds + i / p.slots) * blockDim.x + threadIdx.x]
                       : *reinterpret_cast<const Values*>(dy + p.base + i * p.step);
    Values skip{}, y;
    if (more.skip != nullptr) skip = *reinterpret_cast<const Values*>(more.skip + p.base + i * p.step);
#pragma unroll
    for (int k = 0; k < V; ++k) {
      const float d = static_cast<float>(xv.v[k]) - centre[k];
      const Through to(static_cast<float>(gv.v[k]) * dy_factor, d * gain[k] + offset[k], norm.silu);
      const bool kept = mask.keeps(nhwc<V, LAST>(norm, p, n, first, i, k));
      const float gradient = gain[k] * (kept ? to.dh : 0.0f) - (across_k[k] * d + along_k[k]);
      gv.v[k] = static_cast<T>(gradient + more.skip_factor * static_cast<float>(skip.v[k]));
      y.v[k] = static_cast<T>(kept ? to.y * dropout.factor : 0.0f);
    }
    *reinterpret_cast<Values*>(dx + p.base + i * p.step) = gv;
    if (more.y != nullptr) *reinterpret_cast<Values*>(more.y + p.base + i * p.step) = y;
  }
}

// From sums [2, N, C]: gradients of weight, bias [C] and of scale, shift [N, C]. A warp of channels, rows of samples.
constexpr int ROWS = 8;

__global__ void __launch_bounds__(WARP* ROWS) parameters_kernel(
    const float* sums, Small weight, Small bias, Small scale, Small dweight, Small dbias, Small dscale, Small dshift,
    int samples, int channels) {
  __shared__ float partial[2][ROWS][WARP];
  const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP, c = blockIdx.x * WARP + lane;
  float dw = 0.0f, db = 0.0f;
  if (c < channels) {
    const float w = weight.get(c), b = bias.get(c);
    for (int n = row; n < samples; n += ROWS) {
      const int64_t i = static_cast<int64_t>(n) * channels + c;
      const float dh = sums[i], dhx = sums[static_cast<int64_t>(samples) * channels + i];
      const float factor = scale.data ? 1.0f + scale.get(n * scale.stride + c) : 1.0f;
      dw += dhx * factor;
      db += dh * factor;
      if (dscale.data) dscale.set(i, dhx * w + dh * b);
      if (dshift.data) dshift.set(i, dh);
    }
  }
  partial[0][row][lane] = dw;
  partial[1][row][lane] = db;
  __syncthreads();
  if (row == 0 && c < channels && dweight.data) {
    dw = db = 0.0f;
    for (int r = 0; r < ROWS; ++r) {
      dw += partial[0][r][lane];
      db += partial[1][r][lane];
    }
    dweight.set(c, dw);
    dbias.set(c, db);
  }
}

// How a launch is laid out. `wide`: 16-byte accesses.
struct Plan {
  int taken, threads;
  bool wide, cached;
  size_t shared;
};

Plan plan(int channels, int pixels, int groups, int size, bool last, bool aligned, int tensors) {
  const int per_group = channels / groups, lanes = 16 / size;
  Plan best{1, 128, false, false, 0};
  best.wide = aligned && (last ? channels : pixels) % lanes == 0;
  if (last) {  // at least 32 bytes a pixel, in whole accesses
    while (groups % (2 * best.taken) == 0 && best.taken * per_group < 256 &&
           (best.taken * per_group * size < 32 || best.taken * per_group % lanes != 0))
      best.taken *= 2;
    best.wide = best.wide && best.taken * per_group % lanes == 0;
  }
  const int columns = best.taken * per_group, v = best.wide ? lanes : 1;
  const int64_t accesses = static_cast<int64_t>(columns) * pixels / v;
  while (best.threads < MAX_THREADS && (accesses > best.threads * 4 || columns > best.threads)) best.threads *= 2;
  STD_TORCH_CHECK(columns <= best.threads, "norm_silu wants at most ", MAX_THREADS, " channels a group");
  const int slots = last ? best.threads / (columns / v) : best.threads / columns;
  const int64_t rounds = ((last ? pixels : pixels / v) + slots - 1) / slots;
  const int64_t head = (((4 + tensors) * columns + 2 * best.taken + 3) / 4 * 4 +
                        (static_cast<int64_t>(best.threads) * (last ? v : 2) + 3) / 4 * 4) *
      sizeof(float);
  const int64_t slab = rounds * best.threads * v * size * tensors;
  best.cached = head + slab <= 96 * 1024;  // two blocks on a multiprocessor of an H200
  best.shared = static_cast<size_t>(head + (best.cached ? slab : 0));
  return best;
}

// Calls f with two of std::true_type and std::false_type.
template <typename F>
void with_layout(bool wide, bool last, F f) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (last) {
    wide ? f(Yes{}, Yes{}) : f(No{}, Yes{});
  } else {
    wide ? f(Yes{}, No{}) : f(No{}, No{});
  }
}

Norm make_norm(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::optional<Tensor>& add, int64_t groups, bool silu) {
  return {small(weight), small(bias), small(scale), small(shift), small(add), static_cast<int>(x.size(1)),
          static_cast<int>(x.size(2) * x.size(3)), static_cast<int>(groups), 1, silu};
}

bool aligned(std::initializer_list<const void*> pointers) {
  uintptr_t all = 0;
  for (const void* p : pointers) all |= reinterpret_cast<uintptr_t>(p);
  return all % 16 == 0;
}

void norm_silu(
    Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
    std::optional<Tensor> add, int64_t groups, double eps, bool silu, double dropout,
    std::optional<Tensor> key, Tensor y, Tensor mean, Tensor rstd) {
  Norm norm = make_norm(x, weight, bias, scale, shift, add, groups, silu);
  const bool last = !x.is_contiguous();
  const Plan plan_ = plan(
      norm.channels, norm.pixels, norm.groups, static_cast<int>(x.element_size()), last,
      aligned({x.data_ptr(), y.data_ptr()}), 1);
  norm.taken = plan_.taken;
  const dim3 grid(static_cast<unsigned>(x.size(0) * (groups / plan_.taken)));
  with_float_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    with_layout(plan_.wide, last, [&](auto wide, auto nhwc) {
      launch(forward_kernel<T, wide.value ? LANES<T> : 1, nhwc.value>, grid, plan_.threads, plan_.shared, x,
             pointer<T>(x), pointer<T>(y), pointer<float>(mean), pointer<float>(rstd), norm,
             make_dropout(dropout, key), eps, plan_.cached);
    });
  });
}

void norm_silu_grad(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, std::optional<Tensor> scale,
    std::optional<Tensor> shift, std::optional<Tensor> add, int64_t groups, bool silu, double dropout,
    std::optional<Tensor> key, double dy_factor, std::optional<Tensor> skip, double skip_factor, Tensor dx,
    std::optional<Tensor> sums, std::optional<Tensor> dadd, std::optional<Tensor> y) {
  Norm norm = make_norm(x, weight, bias, scale, shift, add, groups, silu);
  const bool last = !x.is_contiguous();
  const Plan plan_ = plan(
      norm.channels, norm.pixels, norm.groups, static_cast<int>(x.element_size()), last,
      aligned({x.data_ptr(), dy.data_ptr(), dx.data_ptr(), pointer<void>(skip), pointer<void>(y)}), 2);
  norm.taken = plan_.taken;
  const dim3 grid(static_cast<unsigned>(x.size(0) * (groups / plan_.taken)));
  with_float_type(x.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Block<T> more{pointer<T>(skip), pointer<T>(y), static_cast<float>(dy_factor), static_cast<float>(skip_factor)};
    with_layout(plan_.wide, last, [&](auto wide, auto nhwc) {
      launch(backward_kernel<T, wide.value ? LANES<T> : 1, nhwc.value>, grid, plan_.threads, plan_.shared, x,
             pointer<T>(dy), pointer<T>(x), pointer<float>(mean), pointer<float>(rstd), pointer<T>(dx),
             pointer<float>(sums), small(dadd), norm, make_dropout(dropout, key), more, static_cast<int>(x.size(0)),
             plan_.cached);
    });
  });
}

void norm_silu_parameters(
    Tensor sums, Tensor weight, Tensor bias, std::optional<Tensor> scale, std::optional<Tensor> dweight,
    std::optional<Tensor> dbias, std::optional<Tensor> dscale, std::optional<Tensor> dshift) {
  const int samples = static_cast<int>(sums.size(1)), channels = static_cast<int>(sums.size(2));
  launch(parameters_kernel, dim3((channels + WARP - 1) / WARP), WARP * ROWS, 0, sums, pointer<float>(sums),
         small(weight), small(bias), small(scale), small(dweight), small(dbias), small(dscale), small(dshift), samples,
         channels);
}

}  // namespace
}  // namespace potstill

#define GIVEN "Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? add, int groups, "

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cuda, m) {
  m.def("norm_silu(Tensor x, " GIVEN "float eps, bool silu, float dropout, Tensor? key, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def("norm_silu_grad(Tensor dy, Tensor x, Tensor mean, Tensor rstd, " GIVEN
        "bool silu, float dropout, Tensor? key, float dy_factor, Tensor? skip, float skip_factor, Tensor(a!) dx, "
        "Tensor(b!)? sums, Tensor(c!)? dadd, Tensor(d!)? y) -> ()");
  m.def("norm_silu_parameters(Tensor sums, Tensor weight, Tensor bias, Tensor? scale, Tensor(a!)? dweight, "
        "Tensor(b!)? dbias, Tensor(c!)? dscale, Tensor(d!)? dshift) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cuda, POTSTILL_KEY, m) {
  m.impl("norm_silu", TORCH_BOX(&potstill::norm_silu));
  m.impl("norm_silu_grad", TORCH_BOX(&potstill::norm_silu_grad));
  m.impl("norm_silu_parameters", TORCH_BOX(&potstill::norm_silu_parameters));
}
