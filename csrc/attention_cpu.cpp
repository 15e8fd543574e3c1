// Self-attention over the pixels of small images on a CPU and its gradients, as in engine/nets/attention.py, in float32 and NHWC:
//
//     y = (x + proj(softmax(q kᵀ/√d) v) + bias)·s        q, k, v = map(norm(x))
//
// Kept for backward are x, its statistics, and q, k and v; the softmax is computed once more.

#include "cpu_ops.h"
#include "images_cpu.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <tuple>

namespace potstill {
namespace {

using conv::pointer;
using conv::product;

thread_local conv::Scratch scratch;  // for a head's scores

// The 3C rows of a weight or bias in EDM's order, (head, channel in head, {q, k, v}), and in ({q, k, v}, head, channel)
void reorder(const float* from, float* to, int64_t heads, int64_t rows, int64_t columns, bool back) {
  const int64_t all = rows / 3, each = all / heads;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t edms = i % all / each * 3 * each + i % each * 3 + i / all;
    std::copy_n(from + (back ? i : edms) * columns, columns, to + (back ? edms : i) * columns);
  }
}

Tensor ordered(const Tensor& t, int64_t heads) {
  const int64_t rows = t.size(0), columns = t.numel() / rows;
  const Tensor out = matrix(t, rows, columns);
  reorder(pointer(t), pointer(out), heads, rows, columns, false);
  return out;
}

Tensor unordered(const Tensor& found, const Tensor& out, int64_t heads) {
  const int64_t rows = out.size(0);
  reorder(pointer(found), pointer(out), heads, rows, out.numel() / rows, true);
  return out;
}

// eˣ for x <= 0: 2ⁿ·eʳ, |r| <= ln 2 / 2, by Taylor's sum. No call, so that compilers make vectors of it.
float exponential(float x) {
  constexpr float ROUND = 12582912.0f;  // what is added to this is rounded to whole numbers, in its lowest bits
  x = std::max(x, -87.0f);
  const float shifted = x * 1.44269504f + ROUND, n = shifted - ROUND;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float e = 1 + r * (1 + r * (1 / 2.0f + r * (1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f))))));
  return std::bit_cast<float>(std::bit_cast<int32_t>(e) + (std::bit_cast<int32_t>(shifted) << 23));
}

void softmax(float* p, int64_t count) {
  const float most = *std::max_element(p, p + count);
  float sum = 0.0f;
  for (int64_t i = 0; i < count; ++i) p[i] = exponential(p[i] - most);
  for (int64_t i = 0; i < count; ++i) sum += p[i];
  for (int64_t i = 0; i < count; ++i) p[i] /= sum;
}

// A head of one sample: where its q, k and v and what follows of them begin.
struct Heads {
  int64_t samples, heads, pixels, channels, width = channels / heads, row = 3 * channels;
  float scale = 1.0f / std::sqrt(static_cast<float>(width));

  Heads(const Tensor& x, int64_t heads) : samples(x.size(0)), heads(heads), pixels(x.size(2) * x.size(3)), channels(x.size(1)) {}

  int64_t mapped(int64_t i) const { return i / heads * pixels * row + i % heads * width; }
  int64_t image(int64_t i) const { return i / heads * pixels * channels + i % heads * width; }

  template <typename F>
  void each(F f) const {
    conv::in_parallel(samples * heads, 2 * samples * pixels * pixels * channels, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) f(i);
    });
  }

  // p [pixels, pixels] = softmax(q kᵀ/√d)
  void weigh(const float* q, float* p) const {
    product({q, row, 1}, {q + channels, 1, row}, pixels, width, pixels, scale, p, pixels);
    for (int64_t i = 0; i < pixels; ++i) softmax(p + i * pixels, pixels);
  }

  // a [pixels, width] = p v
  void average(const float* q, const float* p, float* a) const {
    product({p, pixels, 1}, {q + 2 * channels, row, 1}, pixels, pixels, width, 1.0f, a, channels);
  }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> attention(
    Tensor x, Tensor gain, Tensor offset, Tensor weight, Tensor bias, Tensor proj, Tensor proj_bias, int64_t groups, double eps,
    int64_t heads, double scale) {
  const Heads all(x, heads);
  const int64_t n = x.size(0), c = x.size(1), rows = pixels(x);
  const Tensor h = images(x), mean = matrix(x, n, groups), rstd = matrix(x, n, groups);
  norm_silu(x, gain, offset, {}, {}, {}, groups, eps, false, 0.0, {}, h, mean, rstd);
  const Tensor mapped = matrix(x, rows, 3 * c), ordered_weight = ordered(weight, heads), ordered_bias = ordered(bias, heads);
  product({pointer(h), c, 1}, {pointer(ordered_weight), 1, c}, rows, c, 3 * c, 1.0f, pointer(mapped), 3 * c);
  float *q = pointer(mapped), *a = pointer(h);
  const float* b = pointer(ordered_bias);
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < 3 * c; ++j) q[i * 3 * c + j] += b[j];
  }
  all.each([&](int64_t i) {
    float* p = scratch.take(all.pixels * all.pixels);
    all.weigh(q + all.mapped(i), p);
    all.average(q + all.mapped(i), p, a + all.image(i));
  });
  const Tensor y = images(x);
  conv::conv1x1(h, proj, y);
  residual(y, x, proj_bias, {}, scale, y);
  return {y, mean, rstd, mapped};
}

enum Wanted { X, GAIN, OFFSET, WEIGHT, BIAS, PROJ, PROJ_BIAS };

std::vector<Tensor> attention_grad(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor mapped, Tensor gain, Tensor offset, Tensor weight, Tensor bias,
    Tensor proj, int64_t groups, int64_t heads, double scale, int64_t wanted) {
  const auto wants = [&](Wanted which) { return (wanted >> which & 1) != 0; };
  const Heads all(x, heads);
  const int64_t c = x.size(1), rows = pixels(x), square = all.pixels * all.pixels;
  const float factor = static_cast<float>(scale);
  const Tensor da = images(x), dmapped = matrix(x, rows, 3 * c);
  product({pointer(dy), c, 1}, {pointer(proj), c, 1}, rows, c, c, factor, pointer(da), c);
  Maybe a, h, dproj, dproj_bias, dweight, dbias;
  if (wants(PROJ)) a = images(x), dproj = weights(proj);
  float* averages = a ? pointer(*a) : nullptr;
  all.each([&](int64_t i) {
    float *p = scratch.take(2 * square), *dp = p + square;
    const float *q = pointer(mapped) + all.mapped(i), *k = q + c, *v = k + c, *given = pointer(da) + all.image(i);
    float *dq = pointer(dmapped) + all.mapped(i), *dk = dq + c, *dv = dk + c;
    const int64_t t = all.pixels, row = all.row;
    all.weigh(q, p);
    if (averages) all.average(q, p, averages + all.image(i));
    product({p, 1, t}, {given, c, 1}, t, t, all.width, 1.0f, dv, row);
    product({given, c, 1}, {v, 1, row}, t, all.width, t, 1.0f, dp, t);
    for (int64_t r = 0; r < t; ++r) {
      const float* weight = p + r * t;
      float *d = dp + r * t, sum = 0.0f;
      for (int64_t j = 0; j < t; ++j) sum += weight[j] * d[j];
      for (int64_t j = 0; j < t; ++j) d[j] = weight[j] * (d[j] - sum);
    }
    product({dp, t, 1}, {k, row, 1}, t, t, all.width, all.scale, dq, row);
    product({dp, 1, t}, {q, row, 1}, t, t, all.width, all.scale, dk, row);
  });
  if (wants(PROJ)) conv::conv1x1_weight_grad(*a, dy, scale, *dproj);
  if (wants(PROJ_BIAS)) dproj_bias = sum_of_rows(dy, rows, c, scale);
  if (wants(WEIGHT)) h = images(x);
  const Tensor ordered_weight = ordered(weight, heads);
  const Maybe dgain = vector_if(wants(GAIN), gain), doffset = vector_if(wants(OFFSET), offset);
  product({pointer(dmapped), 3 * c, 1}, {pointer(ordered_weight), c, 1}, rows, 3 * c, c, 1.0f, pointer(da), c);
  norm_silu_grad(da, x, mean, rstd, gain, offset, {}, {}, {}, groups, false, 0.0, {}, 1.0, dy, scale, da, dgain, doffset, {}, {},
                 {}, h);
  if (wants(WEIGHT)) {
    const Tensor found = matrix(x, 3 * c, c);
    product({pointer(dmapped), 1, 3 * c}, {pointer(*h), c, 1}, 3 * c, rows, c, 1.0f, pointer(found), c);
    dweight = unordered(found, weights(weight), heads);
  }
  if (wants(BIAS)) dbias = unordered(sum_of_rows(dmapped, rows, 3 * c, 1.0), vector(bias, 3 * c), heads);
  const Maybe dx = da;
  return only(wanted, {&dx, &dgain, &doffset, &dweight, &dbias, &dproj, &dproj_bias});
}

}  // namespace
}  // namespace potstill

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cpu, m) {
  m.def("attention(Tensor x, Tensor gain, Tensor offset, Tensor weight, Tensor bias, Tensor proj, Tensor proj_bias, int groups, "
        "float eps, int heads, float scale) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("attention_grad(Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor mapped, Tensor gain, Tensor offset, Tensor weight, "
        "Tensor bias, Tensor proj, int groups, int heads, float scale, int wanted) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cpu, CPU, m) {
  m.impl("attention", TORCH_BOX(&potstill::attention));
  m.impl("attention_grad", TORCH_BOX(&potstill::attention_grad));
}
