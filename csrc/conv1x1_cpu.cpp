// A 1×1 convolution on a CPU and its gradients, for NHWC images in float32: matrix products of pixels and channels, with the
// loops of the 3×3 one. Every sum has an order that depends on the shape alone.

#include "cpu_ops.h"
#include "images_cpu.h"

#include <torch/headeronly/util/Exception.h>

#include <algorithm>

namespace potstill::conv {
namespace {

constexpr int64_t DEEP = 128;  // summed at a time: a panel of it is 16 KB

// to [deep, PANEL·lanes]: the part of b from (first, column) on, with zeros where its columns end
void pack(const Level& loops, const Matrix& b, int64_t first, int64_t deep, int64_t column, int64_t count, float* to) {
  const int64_t lanes = loops.lanes, wide = PANEL * lanes;
  const float* from = b.data + first * b.row + column * b.column;
  if (b.column == 1) {
    for (int64_t i = 0; i < deep; ++i) {
      std::fill(std::copy(from + i * b.row, from + i * b.row + count, to + i * wide), to + i * wide + wide, 0.0f);
    }
  } else {
    for (int64_t c = 0; c < count; c += lanes) {
      loops.transposed(from + c * b.column, b.column, std::min(lanes, count - c), deep, to + c, wide);
    }
  }
}

float* weights(const Tensor& weight) {
  STD_TORCH_CHECK(weight.is_contiguous(), "wanted a weight [O, C, 1, 1] that is contiguous");
  return pointer(weight);
}

}  // namespace

void product(
    const Matrix& a, const Matrix& b, int64_t rows, int64_t inner, int64_t columns, float scale, float* to, int64_t to_row) {
  const Level& loops = level();
  const int64_t wide = PANEL * loops.lanes, panels = parts(columns, wide);
  const int64_t tall = equal_parts(rows, 8 * loops.rows, loops.rows / 2, panels);
  in_parallel(panels * parts(rows, tall), rows * inner * columns, [&](int64_t begin, int64_t end) {
    float* packed = own_scratch.take((DEEP + tall) * wide);
    float* sums = packed + DEEP * wide;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t column = task % panels * wide, count = std::min(wide, columns - column);
      const int64_t row = task / panels * tall, taken = std::min(tall, rows - row);
      for (int64_t first = 0; first < inner; first += DEEP) {
        const int64_t deep = std::min(DEEP, inner - first);
        pack(loops, b, first, deep, column, count, packed);
        loops.multiply({1, taken, deep, parts(count, loops.lanes), a.data + row * a.row + first * a.column, 0, a.row, a.column,
                        packed, 0, wide, sums, 0, wide, first > 0});
      }
      for (int64_t i = 0; i < taken; ++i) {
        float* at = to + (row + i) * to_row + column;
        for (int64_t c = 0; c < count; ++c) at[c] = sums[i * wide + c] * scale;
      }
    }
  });
}

void conv1x1(Tensor x, Tensor weight, Tensor out) {
  const int64_t outs = weight.size(0), ins = weight.size(1);
  product({pointer(x), ins, 1}, {weights(weight), 1, ins}, pixels(x), ins, outs, 1.0f, pointer(out), outs);
}

void conv1x1_input_grad(Tensor dy, Tensor weight, Tensor dx) {
  const int64_t outs = weight.size(0), ins = weight.size(1);
  product({pointer(dy), outs, 1}, {weights(weight), ins, 1}, pixels(dy), outs, ins, 1.0f, pointer(dx), ins);
}

void conv1x1_weight_grad(Tensor x, Tensor dy, double scale, Tensor dweight) {
  const int64_t outs = dweight.size(0), ins = dweight.size(1);
  product({pointer(dy), 1, outs}, {pointer(x), ins, 1}, outs, pixels(x), ins, static_cast<float>(scale), weights(dweight), ins);
}

}  // namespace potstill::conv
