// A residual block on a CPU and its gradients, as written out in engine/nets/block.py: what the norms, the convolutions and the
// sums between them take on small images is less than what it costs to call them one by one from there.
//
// NHWC images in float32. Resampling is by 2 and with a box: nearest neighbours up, means of four pixels down.

#include "cpu_ops.h"
#include "images_cpu.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <functional>
#include <tuple>
#include <vector>

namespace potstill {
namespace {

using conv::pointer;

// Columns of a matrix, in its memory
Tensor columns(const Tensor& t, int64_t first, int64_t count) {
  const int64_t sizes[] = {t.size(0), count}, strides[] = {t.stride(0), t.stride(1)};
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes, strides, first, &made));
  return Tensor(made);
}

// --- passes over images -------------------------------------------------------------------------------------------------------

// f(pixel) for each pixel, or line, of `values` values
template <typename F>
void each(int64_t count, int64_t values, F f) {
  conv::in_parallel(count, conv::PASSING * count * values, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) f(i);
  });
}

Tensor joined(const Tensor& a, const Tensor& b) {
  const int64_t first = a.size(1), second = b.size(1), both = first + second;
  const Tensor out = images(a, both);
  const float *left = pointer(a), *right = pointer(b);
  float* to = pointer(out);
  each(pixels(a), both, [&](int64_t i) {
    std::copy_n(right + i * second, second, std::copy_n(left + i * first, first, to + i * both));
  });
  return out;
}

Tensor part(const Tensor& x, int64_t first, int64_t count) {
  const int64_t channels = x.size(1);
  const Tensor out = images(x, count);
  const float* from = pointer(x) + first;
  float* to = pointer(out);
  each(pixels(x), count, [&](int64_t i) { std::copy_n(from + i * channels, count, to + i * count); });
  return out;
}

Tensor doubled(const Tensor& x) {
  const int64_t channels = x.size(1), width = x.size(3), line = 2 * width * channels;
  const Tensor out = images(x, channels, 2 * x.size(2), 2 * width);
  const float* from = pointer(x);
  float* to = pointer(out);
  each(x.size(0) * x.size(2), 2 * line, [&](int64_t i) {
    float *upper = to + 2 * i * line, *at = upper;
    for (const float *pixel = from + i * width * channels, *end = pixel + width * channels; pixel < end; pixel += channels) {
      at = std::copy_n(pixel, channels, std::copy_n(pixel, channels, at));
    }
    std::copy_n(upper, line, upper + line);
  });
  return out;
}

Tensor halved(const Tensor& x) {
  STD_TORCH_CHECK(x.size(2) % 2 == 0 && x.size(3) % 2 == 0, "wanted images with even sides");
  const int64_t channels = x.size(1), width = x.size(3) / 2, line = 2 * width * channels;
  const Tensor out = images(x, channels, x.size(2) / 2, width);
  const float* from = pointer(x);
  float* to = pointer(out);
  each(x.size(0) * (x.size(2) / 2), 2 * line, [&](int64_t i) {
    for (int64_t j = 0; j < width; ++j) {
      const float *a = from + 2 * (i * line + j * channels), *b = a + channels, *c = a + line, *d = b + line;
      float* at = to + (i * width + j) * channels;
      for (int64_t k = 0; k < channels; ++k) at[k] = 0.25f * ((a[k] + b[k]) + (c[k] + d[k]));
    }
  });
  return out;
}

// way: 1 up, -1 down, 0 not at all
Tensor resampled(const Tensor& x, int64_t way) { return way == 0 ? x : way > 0 ? doubled(x) : halved(x); }

// Of `resampled`, but for a factor
std::tuple<Tensor, double> resampled_gradient(const Tensor& dy, int64_t way) {
  return {resampled(dy, -way), way == 0 ? 1.0 : way > 0 ? 4.0 : 0.25};
}

Tensor copy(const Tensor& a) {
  const Tensor out = vector(a, a.size(0));
  std::copy_n(pointer(a), a.size(0), pointer(out));
  return out;
}

Tensor sum(const Tensor& a, const Maybe& b) {
  if (!b) return a;
  const Tensor out = vector(a, a.size(0));
  std::transform(pointer(a), pointer(a) + a.size(0), pointer(*b), pointer(out), std::plus<>());
  return out;
}

// --- the ops --------------------------------------------------------------------------------------------------------------------

// What norm1 is given besides: params is what it adds, or scale and shift; then it adds conv0's bias.
struct Modulation {
  Maybe scale, shift, add;

  Modulation(const Tensor& params, const Maybe& bias0) : add(params) {
    if (!bias0) return;
    const int64_t channels = params.size(1) / 2;
    scale = columns(params, 0, channels), shift = columns(params, channels, channels), add = bias0;
  }
};

void check(const Tensor& x, const Tensor& bias1, const Maybe& bias_s) {
  const auto plain = [](const Tensor& t) { return t.scalar_type() == torch::headeronly::ScalarType::Float && t.is_contiguous(); };
  STD_TORCH_CHECK(x.scalar_type() == torch::headeronly::ScalarType::Float, "wanted float32 images");
  STD_TORCH_CHECK(plain(bias1) && (!bias_s || plain(*bias_s)), "wanted contiguous biases in float32");
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> residual_block(
    Tensor x, Maybe beside, Tensor params, Tensor gain0, Tensor offset0, Tensor gain1, Tensor offset1, Tensor weight0,
    Maybe bias0, Tensor weight1, Tensor bias1, Maybe weight_s, Maybe bias_s, Maybe key, double eps0, double eps1,
    double dropout, int64_t groups0, int64_t groups1, double scale, int64_t way) {
  check(x, bias1, bias_s);
  if (beside) x = joined(x, *beside);
  const int64_t n = x.size(0), outs = weight0.size(0);
  Tensor h0 = images(x);
  const Tensor mean0 = matrix(x, n, groups0), rstd0 = matrix(x, n, groups0);
  norm_silu(x, gain0, offset0, {}, {}, {}, groups0, eps0, true, 0.0, {}, h0, mean0, rstd0);
  h0 = resampled(h0, way);
  const Tensor c0 = images(h0, outs);
  conv::conv3x3(h0, weight0, {}, {}, 1.0, c0);

  const Modulation given(params, bias0);
  const Tensor h1 = images(c0), mean1 = matrix(x, n, groups1), rstd1 = matrix(x, n, groups1);
  norm_silu(c0, gain1, offset1, given.scale, given.shift, given.add, groups1, eps1, true, dropout, key, h1, mean1, rstd1);

  Tensor skip = x;  // a 1×1 convolution and nearest neighbours change places, for a quarter of the work
  if (way < 0 || !weight_s) skip = resampled(skip, way);
  if (weight_s) {
    const Tensor mixed = images(skip, outs);
    conv::conv1x1(skip, *weight_s, mixed);
    skip = way > 0 ? resampled(mixed, way) : mixed;
  }
  const Tensor y = images(c0);
  conv::conv3x3(h1, weight1, sum(bias1, bias_s), skip, scale, y);
  return {y, c0, mean0, rstd0, mean1, rstd1, beside ? x : Tensor()};
}

// Which gradients are wanted: bits in the order of residual_block's first arguments
enum Wanted { X, BESIDE, PARAMS, GAIN0, OFFSET0, GAIN1, OFFSET1, WEIGHT0, BIAS0, WEIGHT1, BIAS1, WEIGHT_S, BIAS_S };

std::vector<Tensor> residual_block_grad(
    Tensor dy, Tensor x, Tensor c0, Tensor mean0, Tensor rstd0, Tensor mean1, Tensor rstd1, Tensor params, Tensor gain0,
    Tensor offset0, Tensor gain1, Tensor offset1, Tensor weight0, Maybe bias0, Tensor weight1, Maybe weight_s, Maybe key,
    double dropout, int64_t groups0, int64_t groups1, double scale, int64_t way, int64_t own, int64_t wanted) {
  const auto wants = [&](Wanted which) { return (wanted >> which & 1) != 0; };
  const int64_t n = x.size(0), ins = x.size(1), outs = c0.size(1);

  Maybe dbias1, dbias_s, dweight1, h1, dparams, dscale, dshift, dadd, dbias0;
  if (wants(BIAS1) || wants(BIAS_S)) dbias1 = sum_of_rows(dy, pixels(dy), outs, scale);
  if (wants(BIAS_S)) dbias_s = copy(*dbias1);  // clipping writes to each
  if (wants(WEIGHT1)) h1 = images(c0);
  if (wants(PARAMS)) dparams = matrix(params, n, params.size(1));
  if (bias0) {
    if (wants(PARAMS)) dscale = columns(*dparams, 0, outs), dshift = columns(*dparams, outs, outs);
    if (wants(BIAS0)) dadd = matrix(*bias0, n, outs);
  } else {
    dadd = dparams;
  }
  const Maybe dgain1 = vector_if(wants(GAIN1), gain1), doffset1 = vector_if(wants(OFFSET1), offset1);
  const Modulation given(params, bias0);
  const Tensor dc0 = images(c0);
  conv::conv3x3_input_grad(dy, weight1, dc0);
  norm_silu_grad(dc0, c0, mean1, rstd1, gain1, offset1, given.scale, given.shift, given.add, groups1, true, dropout, key, scale,
                 {}, 1.0, dc0, dgain1, doffset1, dscale, dshift, dadd, h1);
  if (wants(WEIGHT1)) conv::conv3x3_weight_grad(*h1, dy, scale, *(dweight1 = weights(weight1)));
  if (wants(BIAS0) && bias0) dbias0 = sum_of_rows(*dadd, n, outs, 1.0);

  Tensor dh0 = images(c0, ins), dskip = dy;
  double factor0 = 1.0, factor_s = 1.0;
  conv::conv3x3_input_grad(dc0, weight0, dh0);
  std::tie(dh0, factor0) = resampled_gradient(dh0, way);

  Maybe dweight_s;
  if (weight_s && wants(WEIGHT_S)) dweight_s = weights(*weight_s);
  if (way > 0 || !weight_s) std::tie(dskip, factor_s) = resampled_gradient(dskip, way);
  if (weight_s) {
    if (dweight_s) conv::conv1x1_weight_grad(way < 0 ? resampled(x, way) : x, dskip, scale * factor_s, *dweight_s);
    const Tensor unmixed = images(dskip, ins);
    conv::conv1x1_input_grad(dskip, *weight_s, unmixed);
    dskip = unmixed;
    if (way < 0) std::tie(dskip, factor_s) = resampled_gradient(dskip, way);
  }

  Maybe h0, dweight0;
  if (wants(WEIGHT0)) h0 = images(x);
  const Maybe dgain0 = vector_if(wants(GAIN0), gain0), doffset0 = vector_if(wants(OFFSET0), offset0);
  const Tensor dx = dh0;  // in the same memory
  norm_silu_grad(dh0, x, mean0, rstd0, gain0, offset0, {}, {}, {}, groups0, true, 0.0, {}, factor0, dskip, factor_s * scale, dh0,
                 dgain0, doffset0, {}, {}, {}, h0);
  if (wants(WEIGHT0)) conv::conv3x3_weight_grad(resampled(*h0, way), dc0, 1.0, *(dweight0 = weights(weight0)));

  Maybe own_dx, dbeside;
  if (wants(X)) own_dx = own == ins ? dx : part(dx, 0, own);
  if (wants(BESIDE)) dbeside = part(dx, own, ins - own);
  return only(wanted, {&own_dx, &dbeside, &dparams, &dgain0, &doffset0, &dgain1, &doffset1, &dweight0, &dbias0, &dweight1, &dbias1,
                  &dweight_s, &dbias_s});
}

}  // namespace
}  // namespace potstill

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cpu, m) {
  m.def("residual_block(Tensor x, Tensor? beside, Tensor params, Tensor gain0, Tensor offset0, Tensor gain1, Tensor offset1, "
        "Tensor weight0, Tensor? bias0, Tensor weight1, Tensor bias1, Tensor? weight_s, Tensor? bias_s, Tensor? key, "
        "float eps0, float eps1, float dropout, int groups0, int groups1, float scale, int way) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("residual_block_grad(Tensor dy, Tensor x, Tensor c0, Tensor mean0, Tensor rstd0, Tensor mean1, Tensor rstd1, "
        "Tensor params, Tensor gain0, Tensor offset0, Tensor gain1, Tensor offset1, Tensor weight0, Tensor? bias0, "
        "Tensor weight1, Tensor? weight_s, Tensor? key, float dropout, int groups0, int groups1, float scale, int way, int own, "
        "int wanted) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cpu, CPU, m) {
  m.impl("residual_block", TORCH_BOX(&potstill::residual_block));
  m.impl("residual_block_grad", TORCH_BOX(&potstill::residual_block_grad));
}
