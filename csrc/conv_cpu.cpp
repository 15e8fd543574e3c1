// A 3×3 convolution with padding 1 on a CPU and its gradients, as in kernels/conv.py, for NHWC images in float32.
//
// Work is cut into blocks of tiles whose transforms stay in the second cache. Every sum has an order that depends on the shape
// alone: the number of threads does not change a bit. The loops are in csrc/conv_loops.cpp.

#include "conv_work.h"
#include "cpu_ops.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>

namespace potstill::conv {
namespace {

constexpr int64_t CACHED = 1 << 16;  // values of the points of a block of tiles: 256 KB
constexpr int64_t LINE = 16;         // values of a cache line
constexpr int64_t FEW = 14;          // tiles for which the transformed weight is not kept

// Values between neighbouring rows, or planes, of a power of two would all be kept in the same few places of a cache.
int64_t apart(int64_t values) { return rounded_up(values, LINE) + LINE; }

Images images_of(const Tensor& t) {
  const int64_t height = t.size(2), width = t.size(3);
  return {t.size(1), height, width, parts(height, TILE), parts(width, TILE)};
}

int64_t tiles_of(const Tensor& t, const Images& images) { return t.size(0) * images.down * images.across; }

struct Strides {
  int64_t out, in, tap;
};

Strides strides_of(const Tensor& weight) {
  const int64_t in = weight.size(1);
  STD_TORCH_CHECK(weight.dim() == 4 && weight.size(2) == 3 && weight.size(3) == 3, "wanted a weight [O, C, 3, 3]");
  const bool nhwc = in > 1 && weight.stride(1) == 1;
  STD_TORCH_CHECK(weight.stride(3) == (nhwc ? in : 1) && weight.stride(2) == (nhwc ? 3 * in : 3),
                  "wanted a weight that is contiguous or channels_last");
  return {TAPS * in, nhwc ? 1 : TAPS, nhwc ? in : 1};
}

// --- images of channels to images of others -------------------------------------------------------------------------------------

// y = (x ∗ weight + bias + skip)·scale. Columns are the channels of y, inner those of x.
struct Convolution {
  const Level& loops = level();
  Images from, to;
  Weight weight;
  Epilogue epilogue;
  const float* x;
  float* y;
  int64_t tiles, inner = from.channels, columns = to.channels;
  int64_t lanes = loops.lanes, wide = PANEL * lanes, panels = parts(columns, wide), work = POINTS * inner * columns;
  int64_t plane = rounded_up(inner, LINE), row = POINTS * plane + LINE;  // of the points of tiles, [tiles, POINTS, inner]
  const float* zeros = nullptr;

  void run();
  void many_tiles(float* weights);
  void few_tiles(float* points);

  // Weight for `count` of inner from `first` on and the i-th vector of columns
  void transform_weight(int64_t i, int64_t first, int64_t count, float* at, int64_t at_row, int64_t at_plane) {
    const Weight part{weight.data + i * lanes * weight.column + first * weight.inner, weight.column, weight.inner, weight.tap,
                      weight.flipped};
    loops.weight(part, std::min(lanes, columns - i * lanes), count, at, at_row, at_plane);
  }
};

void Convolution::run() {
  if (tiles == 0) return;
  const bool few = tiles <= FEW;
  const int64_t size = few ? tiles * row : panels * POINTS * apart(inner * wide);
  float* shared = shared_scratch.take(inner + size);
  std::fill(shared + size, shared + size + inner, 0.0f);
  zeros = shared + size;
  few ? few_tiles(shared) : many_tiles(shared);
}

// The whole weight is transformed, [panels, POINTS, inner, PANEL·lanes]; then blocks of tiles are.
void Convolution::many_tiles(float* weights) {
  const int64_t weight_plane = apart(inner * wide), weight_panel = POINTS * weight_plane, rows = loops.rows;
  in_parallel(parts(columns, lanes), PASSING * work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      transform_weight(i, 0, inner, weights + i / PANEL * weight_panel + i % PANEL * lanes, wide, weight_plane);
    }
  });
  const int64_t cached = std::max(CACHED / row / rows, int64_t{1}) * rows;
  const int64_t block = equal_parts(tiles, std::min(cached, 8 * rows), rows / 2, 1);  // tiles
  in_parallel(parts(tiles, block), tiles * work, [&](int64_t begin, int64_t end) {
    float* points = own_scratch.take(block * (row + POINTS * wide));
    float* products = points + block * row;  // [block, POINTS, PANEL·lanes]
    for (int64_t first = begin * block; first < std::min(end * block, tiles); first += block) {
      const int64_t count = std::min(block, tiles - first);
      loops.input(from, x, zeros, first, count, points, row, plane);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t channel = panel * wide, channels = std::min(wide, columns - channel);
        loops.multiply({POINTS, count, inner, parts(channels, lanes), points, plane, row, 1, weights + panel * weight_panel,
                        weight_plane, wide, products, wide, POINTS * wide, false});
        loops.output(to, products, first, count, channel, channels, epilogue, y);
      }
    }
  });
}

// Tiles are transformed, then a little of the weight at a time, which is multiplied while it is in the first cache.
void Convolution::few_tiles(float* points) {
  loops.input(from, x, zeros, 0, tiles, points, row, plane);
  in_parallel(parts(columns, lanes), 8 * work, [&](int64_t begin, int64_t end) {
    const int64_t weight_plane = apart(lanes * lanes);
    float* weights = own_scratch.take(POINTS * (weight_plane + tiles * wide));  // [POINTS, lanes of inner, lanes]
    float* products = weights + POINTS * weight_plane;                          // [tiles, POINTS, PANEL·lanes]
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t first = 0; first < inner; first += lanes) {
        const int64_t count = std::min(lanes, inner - first);
        transform_weight(i, first, count, weights, lanes, weight_plane);
        loops.multiply({POINTS, tiles, count, 1, points + first, plane, row, 1, weights, weight_plane, lanes, products, wide,
                        POINTS * wide, first > 0});
      }
      loops.output(to, products, 0, tiles, i * lanes, std::min(lanes, columns - i * lanes), epilogue, y);
    }
  });
}

void convolve(const Tensor& x, Weight weight, Epilogue epilogue, const Tensor& y) {
  const Images from = images_of(x), to = images_of(y);
  STD_TORCH_CHECK(x.size(0) == y.size(0) && from.height == to.height && from.width == to.width, "wanted images of one size");
  Convolution{.from = from, .to = to, .weight = weight, .epilogue = epilogue, .x = pointer(x), .y = pointer(y),
              .tiles = tiles_of(x, from)}.run();
}

}  // namespace

void conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> skip, double scale, Tensor out) {
  const Strides strides = strides_of(weight);
  STD_TORCH_CHECK(x.size(1) == weight.size(1) && out.size(1) == weight.size(0), "wanted images of the weight's channels");
  const Epilogue epilogue{bias ? pointer(*bias) : nullptr, skip ? pointer(*skip) : nullptr, static_cast<float>(scale)};
  convolve(x, {pointer(weight), strides.out, strides.in, strides.tap, false}, epilogue, out);
}

void conv3x3_input_grad(Tensor dy, Tensor weight, Tensor dx) {
  const Strides strides = strides_of(weight);
  STD_TORCH_CHECK(dx.size(1) == weight.size(1) && dy.size(1) == weight.size(0), "wanted images of the weight's channels");
  convolve(dy, {pointer(weight), strides.in, strides.out, strides.tap, true}, {nullptr, nullptr, 1.0f}, dx);
}

// --- images to weights ----------------------------------------------------------------------------------------------------------

void conv3x3_weight_grad(Tensor x, Tensor dy, double scale, Tensor dweight) {
  const Level& loops = level();
  const Strides strides = strides_of(dweight);
  const Images from = images_of(x), to = images_of(dy);
  STD_TORCH_CHECK(x.size(0) == dy.size(0) && from.height == to.height && from.width == to.width, "wanted images of one size");
  STD_TORCH_CHECK(from.channels == dweight.size(1) && to.channels == dweight.size(0),
                  "wanted images of the weight's channels");
  const int64_t columns = from.channels, outs = to.channels, lanes = loops.lanes, wide = PANEL * lanes;
  const int64_t tiles = tiles_of(x, from), panels = parts(columns, wide), work = POINTS * columns * outs;
  STD_TORCH_CHECK(tiles > 0, "wanted images with pixels");

  // points of x [POINTS, block, columns] and of dy [POINTS, block, outs]
  const int64_t x_row = apart(columns), dy_row = apart(outs);
  const int64_t block = std::clamp(2 * CACHED / (POINTS * (x_row + dy_row)), int64_t{16}, int64_t{128});
  const int64_t size = std::min(block, tiles), x_plane = apart(size * x_row), dy_plane = apart(size * dy_row);
  // their products, summed over blocks: [parts of outs, panels, POINTS, rows, PANEL·lanes]
  const int64_t rows = equal_parts(outs, 2 * loops.rows, loops.rows / 2, panels), sum_plane = apart(rows * wide), each = POINTS * sum_plane;
  const int64_t tasks = panels * parts(outs, rows), most = std::max(columns, outs);
  const bool once = tiles <= block;  // then none is kept longer than a task
  float* target = pointer(dweight);
  const float *source = pointer(x), *given = pointer(dy), factor = static_cast<float>(scale);

  // A thread transforms all tiles for its tasks: waiting for the others at each block takes longer where cores are shared.
  in_parallel(tasks, tiles * work, [&](int64_t begin, int64_t end) {
    float* x_points = own_scratch.take(POINTS * (x_plane + dy_plane) + rounded_up(most, LINE) + (once ? 1 : end - begin) * each);
    float *dy_points = x_points + POINTS * x_plane, *zeros = dy_points + POINTS * dy_plane;
    float* kept = zeros + rounded_up(most, LINE);
    std::fill(zeros, zeros + most, 0.0f);
    for (int64_t first = 0; first < tiles; first += block) {
      const int64_t count = std::min(block, tiles - first);
      loops.input(from, source, zeros, first, count, x_points, x_row, x_plane);
      loops.gradient(to, given, zeros, first, count, dy_points, dy_row, dy_plane);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t channel = task % panels * wide, channels = std::min(wide, columns - channel);
        const int64_t out = task / panels * rows, taken = std::min(rows, outs - out);
        float* sums = kept + (once ? 0 : task - begin) * each;
        loops.multiply({POINTS, taken, count, parts(channels, lanes), dy_points + out, dy_plane, 1, dy_row, x_points + channel,
                        x_plane, x_row, sums, sum_plane, wide, first > 0});
        if (first + count < tiles) continue;
        for (int64_t i = 0; i < taken; ++i) {
          for (int64_t c = 0; c < channels; c += lanes) {
            float* gradient = target + (out + i) * strides.out + (channel + c) * strides.in;
            loops.weight_gradient(
                sums + i * wide + c, sum_plane, std::min(lanes, channels - c), factor, gradient, strides.in, strides.tap);
          }
        }
      }
    }
  });
}

}  // namespace potstill::conv

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cpu, m) {
  m.def("conv3x3(Tensor x, Tensor weight, Tensor? bias, Tensor? skip, float scale, Tensor(a!) out) -> ()");
  m.def("conv3x3_input_grad(Tensor dy, Tensor weight, Tensor(a!) dx) -> ()");
  m.def("conv3x3_weight_grad(Tensor x, Tensor dy, float scale, Tensor(a!) dweight) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cpu, CPU, m) {
  m.impl("conv3x3", TORCH_BOX(&potstill::conv::conv3x3));
  m.impl("conv3x3_input_grad", TORCH_BOX(&potstill::conv::conv3x3_input_grad));
  m.impl("conv3x3_weight_grad", TORCH_BOX(&potstill::conv::conv3x3_weight_grad));
}
