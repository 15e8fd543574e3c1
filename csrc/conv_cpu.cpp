// A 3×3 convolution with padding 1 on a CPU and its gradients, as in kernels/conv.py, for NHWC images in float32.
//
// Work is cut into blocks of tiles whose transforms stay in the second cache. Every sum has an order that depends on the shape
// alone: the number of threads does not change a bit. The loops are in csrc/conv_loops.cpp.

#include "conv_loops.h"
#include "cpu_level.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <memory>
#include <new>
#include <optional>

namespace potstill::conv {
namespace {

using torch::stable::Tensor;

constexpr int64_t CACHED = 1 << 16;           // values of the points of a block of tiles: 256 KB
constexpr int64_t LINE = 16;             // values of a cache line
constexpr int64_t WORTH_A_THREAD = 1 << 19;  // multiplications

const Level& level() {
  static const Level& chosen = POTSTILL_LEVEL(potstill::conv);
  return chosen;
}

int64_t parts(int64_t all, int64_t each) { return (all + each - 1) / each; }
int64_t rounded_up(int64_t all, int64_t each) { return parts(all, each) * each; }

// Values between neighbouring rows, or planes, of a power of two would all be kept in the same few places of a cache.
int64_t apart(int64_t values) { return rounded_up(values, LINE) + LINE; }

// Memory of a thread, aligned and not initialized, kept for the next call: allocating it can take longer than a small product.
class Scratch {
 public:
  float* take(int64_t values) {
    if (values > size_) {
      memory_.reset(), size_ = 0;
      memory_.reset(static_cast<float*>(::operator new(4 * values, alignment)));
      size_ = values;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t alignment{64};
  struct Free {
    void operator()(float* p) const { ::operator delete(p, alignment); }
  };
  std::unique_ptr<float, Free> memory_;
  int64_t size_ = 0;
};

thread_local Scratch shared_scratch, own_scratch;  // of an op, for all threads; of a task

Images images_of(const Tensor& t) {
  const int64_t height = t.size(2), width = t.size(3);
  return {t.size(1), height, width, parts(height, TILE), parts(width, TILE)};
}

int64_t tiles_of(const Tensor& t, const Images& images) { return t.size(0) * images.down * images.across; }

template <typename T = float>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

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

// f(begin, end) for parts of 0 to `count`, shared by PyTorch's threads if there is enough to do.
template <typename F>
void in_parallel(int64_t count, int64_t multiplications, F f) {
  if (multiplications < WORTH_A_THREAD) return f(0, count);
  torch::stable::parallel_for(0, count, 1, f);
}

// --- images of channels to images of others -------------------------------------------------------------------------------------

// y = (x ∗ weight + bias + skip)·scale. Columns are the channels of y, inner those of x.
void convolve(const Tensor& x, Weight weight, Epilogue epilogue, const Tensor& y) {
  const Level& loops = level();
  const Images from = images_of(x), to = images_of(y);
  STD_TORCH_CHECK(x.size(0) == y.size(0) && from.height == to.height && from.width == to.width, "wanted images of one size");
  const int64_t inner = from.channels, columns = to.channels, lanes = loops.lanes, wide = PANEL * lanes;
  const int64_t tiles = tiles_of(x, from), panels = parts(columns, wide), work = POINTS * inner * columns;
  if (tiles == 0) return;
  const float *source = pointer(x), *bias = epilogue.bias;
  float* target = pointer(y);

  // the weight [panels, POINTS, inner, PANEL·lanes], and zeros
  const int64_t weight_plane = apart(inner * wide), weight_panel = POINTS * weight_plane;
  float *weights = shared_scratch.take(panels * weight_panel + inner + rounded_up(columns, LINE));
  float* zeros = weights + panels * weight_panel;
  std::fill(zeros, zeros + inner, 0.0f);
  in_parallel(parts(columns, lanes), 4 * work, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      Weight part = weight;
      part.data += i * lanes * weight.column;
      float* at = weights + i / PANEL * weight_panel + i % PANEL * lanes;
      loops.weight(part, std::min(lanes, columns - i * lanes), inner, at, wide, weight_plane);
    }
  });

  const int64_t plane = rounded_up(inner, LINE), row = POINTS * plane + LINE, rows = loops.rows;
  const int64_t cached = std::max(CACHED / row / rows, int64_t{1}) * rows;
  const int64_t shared = rounded_up(parts(tiles, torch::stable::get_num_threads()), rows);
  const int64_t block = std::min({cached, shared, 8 * rows});  // tiles
  in_parallel(parts(tiles, block), tiles * work, [&](int64_t begin, int64_t end) {
    float* points = own_scratch.take(block * (row + POINTS * wide));  // [block, POINTS, inner]
    float* products = points + block * row;                           // [block, POINTS, PANEL·lanes]
    for (int64_t first = begin * block; first < std::min(end * block, tiles); first += block) {
      const int64_t count = std::min(block, tiles - first);
      loops.input(from, source, zeros, first, count, points, row, plane);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const int64_t channel = panel * wide, channels = std::min(wide, columns - channel);
        for (int64_t p = 0; p < POINTS; ++p) {
          const float* b = weights + panel * weight_panel + p * weight_plane;
          loops.multiply({count, inner, parts(channels, lanes), points + p * plane, row, 1, b, wide, products + p * wide,
                          POINTS * wide, false});
        }
        loops.output(to, products, first, count, channel, channels, {bias, epilogue.skip, epilogue.scale}, target);
      }
    }
  });
}

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
  STD_TORCH_CHECK(from.channels == dweight.size(1) && to.channels == dweight.size(0), "wanted images of the weight's channels");
  const int64_t columns = from.channels, outs = to.channels, lanes = loops.lanes, wide = PANEL * lanes;
  const int64_t tiles = tiles_of(x, from), panels = parts(columns, wide), work = POINTS * columns * outs;
  STD_TORCH_CHECK(tiles > 0, "wanted images with pixels");

  // sums [panels, POINTS, outs, PANEL·lanes] over blocks of points: of x [POINTS, block, columns], of dy [POINTS, block, outs]
  const int64_t x_row = apart(columns), dy_row = apart(outs);
  const int64_t block = std::clamp(2 * CACHED / (POINTS * (x_row + dy_row)), int64_t{16}, int64_t{128});
  const int64_t size = std::min(block, tiles), x_plane = apart(size * x_row), dy_plane = apart(size * dy_row);
  const int64_t sum_plane = apart(outs * wide), most = std::max(columns, outs);
  float* sums = shared_scratch.take(POINTS * (panels * sum_plane + x_plane + dy_plane) + most);
  float *x_points = sums + POINTS * panels * sum_plane, *dy_points = x_points + POINTS * x_plane;
  float *zeros = dy_points + POINTS * dy_plane, *target = pointer(dweight);
  const float *source = pointer(x), *given = pointer(dy);
  std::fill(zeros, zeros + most, 0.0f);

  for (int64_t first = 0; first < tiles; first += block) {
    const int64_t count = std::min(block, tiles - first);
    in_parallel(count, count * work, [&](int64_t begin, int64_t end) {
      loops.input(from, source, zeros, first + begin, end - begin, x_points + begin * x_row, x_row, x_plane);
      loops.gradient(to, given, zeros, first + begin, end - begin, dy_points + begin * dy_row, dy_row, dy_plane);
    });
    in_parallel(panels * POINTS, count * work, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t panel = i / POINTS, p = i % POINTS, channel = panel * wide;
        const int64_t vectors = parts(std::min(wide, columns - channel), lanes);
        loops.multiply({outs, count, vectors, dy_points + p * dy_plane, 1, dy_row, x_points + p * x_plane + channel, x_row,
                        sums + i * sum_plane, wide, first > 0});
      }
    });
  }

  in_parallel(outs, 4 * work, [&](int64_t begin, int64_t end) {
    for (int64_t out = begin; out < end; ++out) {
      for (int64_t c = 0; c < columns; c += lanes) {
        const float* at = sums + c / wide * POINTS * sum_plane + out * wide + c % wide;
        float* gradient = target + out * strides.out + c * strides.in;
        loops.weight_gradient(at, sum_plane, std::min(lanes, columns - c), static_cast<float>(scale), gradient, strides.in, strides.tap);
      }
    }
  });
}

}  // namespace
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
