// GroupNorm, scale and shift, SiLU, dropout on a CPU, as in kernels/norm_silu.py, and the sum at the end of a residual block,
// for NHWC images in float32 and bfloat16.
//
// A task takes one sample and some whole groups: statistics, and what follows of them for each channel, are here, the loops
// over pixels in csrc/norm_silu_loops.cpp. Sums are float32, in an order that depends on the shape alone: neither the
// number of threads nor the other samples of a batch change a bit.

#include "cpu_level.h"
#include "cpu_ops.h"
#include "norm_silu_loops.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <optional>
#include <type_traits>
#include <vector>

namespace potstill {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

constexpr int64_t CACHED = 1 << 16;  // values of a task: 256 KB of gradients kept between the two passes of backward

const Level& level() {
  static const Level& chosen = POTSTILL_LEVEL(potstill);
  return chosen;
}

// --- what is given ------------------------------------------------------------------------------------------------------

template <typename F>
void with_float_type(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) {
    f(static_cast<float*>(nullptr));
  } else if (dtype == ScalarType::BFloat16) {
    f(static_cast<BFloat16*>(nullptr));
  } else if (dtype == ScalarType::Half) {
    f(static_cast<Half*>(nullptr));
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::Double, "norm_silu wants parameters in a floating dtype");
    f(static_cast<double*>(nullptr));
  }
}

// A small tensor of any floating type: parameters [C] and embeddings [N, C].
struct Small {
  void* data = nullptr;
  ScalarType dtype = ScalarType::Float;
  int64_t stride = 0;  // between samples

  Small(const std::optional<Tensor>& t) {
    if (!t.has_value()) return;
    data = t->mutable_data_ptr(), dtype = t->scalar_type(), stride = t->dim() == 2 ? t->stride(0) : 0;
  }

  explicit operator bool() const { return data != nullptr; }

  void read(int64_t n, int64_t first, int64_t count, float* to) const {
    with_float_type(dtype, [&](auto* type) {
      const auto* from = static_cast<decltype(type)>(data) + n * stride + first;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(from[i]);
    });
  }

  template <typename From>
  void write(int64_t n, int64_t first, int64_t count, const From* from) const {
    with_float_type(dtype, [&](auto* type) {
      auto* to = static_cast<decltype(type)>(data) + n * stride + first;
      for (int64_t i = 0; i < count; ++i) to[i] = static_cast<std::remove_pointer_t<decltype(type)>>(static_cast<float>(from[i]));
    });
  }
};

struct Norm {
  Small weight, bias, scale, shift, add;
  int64_t samples, channels, pixels, groups, taken;  // taken: groups of one task
  double eps;
  bool silu;
  Dropout dropout;

  int64_t width() const { return channels / groups; }
  int64_t tasks() const { return samples * (groups / taken); }
};

Dropout dropout_of(double dropout, const std::optional<Tensor>& key) {
  if (dropout == 0.0 || !key) return {};
  const uint64_t halves = *static_cast<const uint64_t*>(key->const_data_ptr());
  const auto least = static_cast<uint32_t>(std::min(std::nearbyint(dropout * 0x1p32), 0x1p32 - 1));
  return {static_cast<uint32_t>(halves), static_cast<uint32_t>(halves >> 32), least, static_cast<float>(1.0 / (1.0 - dropout))};
}

Norm norm_of(
    const Tensor& x, const Tensor& weight, const Tensor& bias, const std::optional<Tensor>& scale,
    const std::optional<Tensor>& shift, const std::optional<Tensor>& add, int64_t groups, double eps, bool silu,
    double dropout, const std::optional<Tensor>& key) {
  Norm norm{std::optional(weight), std::optional(bias), scale, shift, add, x.size(0), x.size(1), x.size(2) * x.size(3),
            groups, groups, eps, silu, dropout_of(dropout, key)};
  // A task takes half the groups, or a quarter, while samples are too few for the threads or too large for the cache, and
  // as long as it keeps whole cache lines.
  const int64_t line = 64 / x.element_size(), threads = torch::stable::get_num_threads();
  const auto smaller = [&] { return norm.tasks() < threads || norm.pixels * norm.taken * norm.width() > CACHED; };
  while (smaller() && norm.taken % 2 == 0 && norm.taken / 2 * norm.width() % line == 0) norm.taken /= 2;
  return norm;
}

// --- a task ---------------------------------------------------------------------------------------------------------------

// Memory of this thread for `count` floats, kept from call to call: what the allocator would fetch and give back costs more
// than a small image. There are two of them, which hold what is written into them until they are asked for again.
template <int WHICH>
float* memory(int64_t count) {
  static thread_local std::unique_ptr<float[]> kept;
  static thread_local int64_t size = 0;
  if (size < count) kept.reset(new float[count]), size = count;
  return kept.get();
}

struct Task {
  const Norm& norm;
  Run run;
  int64_t padded, n = 0, first = 0;  // sample, channel
  float *centre, *gain, *offset, *a, *b, *c;  // [channels of the task]

  explicit Task(const Norm& norm) : norm(norm), run{norm.channels, norm.pixels, norm.taken * norm.width()} {
    padded = (run.count + W - 1) / W * W;
    float* room = memory<0>(6 * padded);
    for (float** each : {&centre, &gain, &offset, &a, &b, &c}) *each = room, room += padded;
  }

  void take(int64_t task) {
    const int64_t parts = norm.groups / norm.taken;
    n = task / parts;
    first = task % parts * run.count;
    std::memset(centre, 0, 6 * padded * sizeof(float));
    if (norm.add) norm.add.read(n, first, run.count, centre);  // what is added to x, until `affine`
  }

  Dropout dropout() const {
    Dropout dropout = norm.dropout;
    dropout.place = static_cast<uint32_t>(image());
    return dropout;
  }

  int64_t image() const { return n * norm.pixels * norm.channels + first; }
  int64_t group() const { return n * norm.groups + first / norm.width(); }

  // f(channel, its group of the task) for each: the first ones of all groups, then the second ones, so that a sum over a group
  // does not wait for its last addition. The channels of a group come in order.
  template <typename F>
  void each_channel(F f) const {
    const int64_t width = norm.width();
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t g = 0; g < norm.taken; ++g) f(g * width + j, g);
    }
  }

  // h = (x - centre)·gain + offset
  Affine affine(const float* mean, const float* rstd) {
    norm.weight.read(0, first, run.count, gain);
    norm.bias.read(0, first, run.count, offset);
    each_channel([&](int64_t i, int64_t g) { centre[i] = mean[g] - centre[i], gain[i] *= rstd[g]; });
    if (norm.scale) {
      norm.scale.read(n, first, run.count, c);
      for (int64_t i = 0; i < run.count; ++i) gain[i] *= 1.0f + c[i], offset[i] *= 1.0f + c[i];
    }
    if (norm.shift) {
      norm.shift.read(n, first, run.count, c);
      for (int64_t i = 0; i < run.count; ++i) offset[i] += c[i];
    }
    std::fill(c, c + run.count, 0.0f);
    return {centre, gain, offset};
  }
};

float widened(float v) { return v; }
float widened(bfloat16 v) { return static_cast<float>(BFloat16(v.bits, BFloat16::from_bits())); }

template <typename T>
void forward(Task& task, const Loops<T>& loops, const T* x, T* y, float* mean, float* rstd) {
  const Norm& norm = task.norm;
  const int64_t k = norm.width();
  const float pixels = static_cast<float>(norm.pixels), each = 1.0f / pixels, all = each / static_cast<float>(k);
  x += task.image(), y += task.image(), mean += task.group(), rstd += task.group();
  loops.sums(task.run, x, task.a, task.b);
  for (int64_t i = 0; i < task.run.count; ++i) {
    const float off = task.a[i] * each;
    task.b[i] = std::max(task.b[i] - task.a[i] * off, 0.0f);  // Σ (x - the channel's mean)²
    task.a[i] = widened(x[i]) + task.centre[i] + off;         // the channel's mean
  }
  std::fill(mean, mean + norm.taken, 0.0f);
  std::fill(rstd, rstd + norm.taken, 0.0f);
  task.each_channel([&](int64_t i, int64_t g) { mean[g] += task.a[i]; });
  for (int64_t g = 0; g < norm.taken; ++g) mean[g] /= static_cast<float>(k);
  task.each_channel([&](int64_t i, int64_t g) {
    const float off = task.a[i] - mean[g];
    rstd[g] += task.b[i] + pixels * off * off;
  });
  for (int64_t g = 0; g < norm.taken; ++g) rstd[g] = 1.0f / std::sqrt(rstd[g] * all + static_cast<float>(norm.eps));
  loops.apply(task.run, task.affine(mean, rstd), norm.silu, task.dropout(), x, y);
}

// What backward is given besides, the images by their first value.
template <typename T>
struct Upstream {
  const T *dy, *skip;
  float factor, skip_factor;
  T *dx, *y;
  Small dadd;
};

// sums: [2, N, C], Σ dh and Σ dh·xhat.
template <typename T>
void backward(
    Task& task, const Loops<T>& loops, const T* x, const Upstream<T>& given, const float* mean, const float* rstd, float* sums) {
  const Norm& norm = task.norm;
  const int64_t k = norm.width(), image = task.image(), row = task.n * norm.channels + task.first;
  const float pixels = static_cast<float>(norm.pixels), size = pixels * static_cast<float>(k);
  float *dh = sums + row, *dhx = sums + norm.samples * norm.channels + row, *along = task.a, *across = task.b;
  T* dx = given.dx + image;
  x += image, mean += task.group(), rstd += task.group();
  float* kept;
  int64_t apart;
  if constexpr (std::is_same_v<T, float>) {  // where dx will be
    kept = dx, apart = norm.channels;
  } else {
    kept = memory<1>(norm.pixels * task.padded), apart = task.padded;
  }
  const Affine affine = task.affine(mean, rstd);
  loops.gradient_sums(
      task.run, affine, norm.silu, task.dropout(), x, given.dy + image, given.y ? given.y + image : nullptr, kept, apart,
      task.a, task.b, task.c);
  const float factor = given.factor * norm.dropout.factor;  // all is linear in dh
  for (int64_t g = 0; g < norm.taken; ++g) {
    float sum = 0.0f, product = 0.0f;
    for (int64_t i = g * k; i < (g + 1) * k; ++i) {
      task.a[i] *= factor, task.b[i] *= factor;
      sum += task.gain[i] * task.a[i], product += task.gain[i] * task.b[i];
    }
    sum /= size, product *= rstd[g] * rstd[g] / size;
    for (int64_t i = g * k; i < (g + 1) * k; ++i) {
      dh[i] = task.a[i], dhx[i] = task.b[i] * rstd[g];
      task.c[i] = task.gain[i] * dh[i] - pixels * sum - product * task.c[i];  // Σ dx
      along[i] = sum, across[i] = product, task.gain[i] *= factor;
    }
  }
  if (given.dadd) given.dadd.write(task.n, task.first, task.run.count, task.c);
  loops.gradient(
      task.run, affine, along, across, given.skip ? given.skip + image : nullptr, given.skip_factor, x, kept, apart, dx);
}

// --- the ops --------------------------------------------------------------------------------------------------------------

// f(begin, end) over all of `count`, shared by PyTorch's threads where there is enough for two.
template <typename F>
void shared(int64_t count, int64_t grain, F f) {
  if (count <= grain || torch::stable::get_num_threads() == 1) {
    f(int64_t{0}, count);
  } else {
    torch::stable::parallel_for(0, count, grain, f);
  }
}

// f(task) for every task
template <typename F>
void each_task(const Norm& norm, F f) {
  if (norm.tasks() == 0 || norm.pixels == 0) return;
  shared(norm.tasks(), 1, [&](int64_t begin, int64_t end) {
    Task task(norm);
    for (int64_t t = begin; t < end; ++t) {
      task.take(t);
      f(task);
    }
  });
}

template <typename T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
T* pointer(const std::optional<Tensor>& t) {
  return t ? pointer<T>(*t) : nullptr;
}

// f(the loops for this dtype, a null pointer of its type)
template <typename F>
void with_loops(ScalarType dtype, F f) {
  if (dtype == ScalarType::Float) {
    f(level().float32, static_cast<float*>(nullptr));
  } else {
    STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "norm_silu on a CPU wants float32 or bfloat16 images");
    f(level().bf16, static_cast<bfloat16*>(nullptr));
  }
}

}  // namespace

void norm_silu(
    Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
    std::optional<Tensor> add, int64_t groups, double eps, bool silu, double dropout, std::optional<Tensor> key, Tensor y,
    Tensor mean, Tensor rstd) {
  const Norm norm = norm_of(x, weight, bias, scale, shift, add, groups, eps, silu, dropout, key);
  with_loops(x.scalar_type(), [&](const auto& loops, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = pointer<T>(x);
    T* to = pointer<T>(y);
    float *m = pointer<float>(mean), *r = pointer<float>(rstd);
    each_task(norm, [&](Task& task) { forward(task, loops, from, to, m, r); });
  });
}

void norm_silu_grad(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, std::optional<Tensor> scale,
    std::optional<Tensor> shift, std::optional<Tensor> add, int64_t groups, bool silu, double dropout,
    std::optional<Tensor> key, double dy_factor, std::optional<Tensor> skip, double skip_factor, Tensor dx,
    std::optional<Tensor> dweight, std::optional<Tensor> dbias, std::optional<Tensor> dscale,
    std::optional<Tensor> dshift, std::optional<Tensor> dadd, std::optional<Tensor> y) {
  const Norm norm = norm_of(x, weight, bias, scale, shift, add, groups, 0.0, silu, dropout, key);
  const int64_t channels = norm.channels, samples = norm.samples;
  std::vector<float> sums(2 * samples * channels);
  with_loops(x.scalar_type(), [&](const auto& loops, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T* from = pointer<T>(x);
    const Upstream<T> given{pointer<T>(dy), pointer<T>(skip), static_cast<float>(dy_factor), static_cast<float>(skip_factor),
                            pointer<T>(dx), pointer<T>(y), dadd};
    const float *m = pointer<float>(mean), *r = pointer<float>(rstd);
    each_task(norm, [&](Task& task) { backward(task, loops, from, given, m, r, sums.data()); });
  });
  if (!dweight && !dbias && !dscale && !dshift) return;
  std::vector<float> w(channels), b(channels), s(channels), row(channels);
  std::vector<double> dw(channels), db(channels);  // in this, how a batch is split over processes hardly shows
  norm.weight.read(0, 0, channels, w.data());
  norm.bias.read(0, 0, channels, b.data());
  for (int64_t n = 0; n < samples; ++n) {
    const float *dh = sums.data() + n * channels, *dhx = sums.data() + (samples + n) * channels;
    if (norm.scale) norm.scale.read(n, 0, channels, s.data());
    for (int64_t c = 0; c < channels; ++c) {
      dw[c] += static_cast<double>(dhx[c]) * (1.0f + s[c]);
      db[c] += static_cast<double>(dh[c]) * (1.0f + s[c]);
      row[c] = dhx[c] * w[c] + dh[c] * b[c];
    }
    if (dscale) Small(dscale).write(n, 0, channels, row.data());
    if (dshift) Small(dshift).write(n, 0, channels, dh);
  }
  if (dweight) Small(dweight).write(0, 0, channels, dw.data());
  if (dbias) Small(dbias).write(0, 0, channels, db.data());
}

void residual(
    Tensor h, Tensor skip, std::optional<Tensor> bias, std::optional<Tensor> skip_bias, double scale, Tensor out) {
  const int64_t channels = h.size(1), pixels = h.size(0) * h.size(2) * h.size(3), padded = (channels + W - 1) / W * W;
  if (channels == 0) return;
  std::vector<float> constant(padded), other(channels);
  if (bias) Small(bias).read(0, 0, channels, constant.data());
  if (skip_bias) Small(skip_bias).read(0, 0, channels, other.data());
  for (int64_t c = 0; c < channels; ++c) constant[c] += other[c];
  with_loops(h.scalar_type(), [&](const auto& loops, auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *left = pointer<T>(h), *right = pointer<T>(skip);
    T* to = pointer<T>(out);
    shared(pixels, (CACHED + channels - 1) / channels, [&](int64_t begin, int64_t end) {
      const int64_t at = begin * channels;
      loops.residual({channels, end - begin, channels}, left + at, constant.data(), right + at, static_cast<float>(scale), to + at);
    });
  });
}

}  // namespace potstill

#define GIVEN "Tensor weight, Tensor bias, Tensor? scale, Tensor? shift, Tensor? add, int groups, "

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cpu, m) {
  m.def("norm_silu(Tensor x, " GIVEN
        "float eps, bool silu, float dropout, Tensor? key, Tensor(a!) y, Tensor(b!) mean, Tensor(c!) rstd) -> ()");
  m.def("norm_silu_grad(Tensor dy, Tensor x, Tensor mean, Tensor rstd, " GIVEN
        "bool silu, float dropout, Tensor? key, float dy_factor, Tensor? skip, float skip_factor, Tensor(a!) dx, "
        "Tensor(b!)? dweight, Tensor(c!)? dbias, Tensor(d!)? dscale, Tensor(e!)? dshift, Tensor(f!)? dadd, "
        "Tensor(g!)? y) -> ()");
  m.def("residual(Tensor h, Tensor skip, Tensor? bias, Tensor? skip_bias, float scale, Tensor(a!) out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cpu, CPU, m) {
  m.impl("norm_silu", TORCH_BOX(&potstill::norm_silu));
  m.impl("norm_silu_grad", TORCH_BOX(&potstill::norm_silu_grad));
  m.impl("residual", TORCH_BOX(&potstill::residual));
}
