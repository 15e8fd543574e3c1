// The loops of a 3×3 convolution with padding 1, by Winograd's F(4×4, 3×3), for NHWC images in float32. csrc/conv_loops.cpp is
// compiled once for each level of the processor's instructions; csrc/conv_cpu.cpp cuts the work into blocks for them.
//
// An image is cut into tiles of 4×4 pixels. A tile with its border, 6×6, is transformed into 36 values for each channel, the
// points; so are the weights. At each point, channels are mixed by a matrix product, and its results transformed into pixels.
// Lavin and Gray, arXiv 1509.09308; polynomials are taken at 0, ±√½, ±√2 and infinity instead of their 0, ±1, ±2 and infinity,
// for a third of the rounding.
#pragma once

#include <cstdint>

namespace potstill::conv {

constexpr int64_t TILE = 4, POINTS = 36, TAPS = 9;
constexpr int64_t PANEL = 2;  // vectors of a panel, the columns of a matrix that are multiplied at a time

// NHWC images and their tiles, counted along the batch, down and across.
struct Images {
  int64_t channels, height, width, down, across;
};

// A 3×3 weight, seen as [columns, inner, taps] with these strides; inner is what the product sums over.
struct Weight {
  const float* data;
  int64_t column, inner, tap;
  bool flipped;  // taps in opposite order
};

// At each of `points`: to [rows, vectors] (+)= Σ over `inner` of a [rows, inner] · b [inner, vectors]. The rest are
// strides, of which a_row or a_inner is 1.
struct Product {
  int64_t points, rows, inner, vectors;
  const float* a;
  int64_t a_point, a_row, a_inner;
  const float* b;
  int64_t b_point, b_inner;
  float* to;
  int64_t to_point, to_row;
  bool add;
};

// What a product becomes: (pixels + bias + skip)·scale. bias, skip: or null.
struct Epilogue {
  const float *bias, *skip;
  float scale;
};

struct Level {
  int64_t lanes;  // values of a vector
  int64_t rows;   // of a product, at a time

  // to [POINTS, inner, lanes], `plane` values between points and `row` between rows: `columns` of the weight, padded with zeros
  void (*weight)(Weight weight, int64_t columns, int64_t inner, float* to, int64_t row, int64_t plane);
  // to [POINTS, tiles, channels]: tiles from `first` on, with their borders; channels are padded with zeros to whole vectors.
  // zeros: as many values 0 as there are channels
  void (*input)(
      Images images, const float* x, const float* zeros, int64_t first, int64_t tiles, float* to, int64_t row, int64_t plane);
  // The same of gradients to the output, without borders
  void (*gradient)(
      Images images, const float* dy, const float* zeros, int64_t first, int64_t tiles, float* to, int64_t row, int64_t plane);
  void (*multiply)(const Product& product);
  // to [columns, lanes], `to_row` values between rows, from [rows, columns], with zeros for the rows from `rows` to lanes
  void (*transposed)(const float* from, int64_t stride, int64_t rows, int64_t columns, float* to, int64_t to_row);
  // from [tiles, POINTS, PANEL·lanes] to the pixels of `count` channels from `channel` on
  void (*output)(
      Images images, const float* from, int64_t first, int64_t tiles, int64_t channel, int64_t count, Epilogue epilogue,
      float* y);
  // from [POINTS, lanes], `plane` values between points, to `columns` neighbouring columns of a gradient to the weight, taps in
  // order
  void (*weight_gradient)(const float* from, int64_t plane, int64_t columns, float scale, float* to, int64_t column, int64_t tap);
};

extern const Level LEVEL_any;
#ifdef __x86_64__
extern const Level LEVEL_avx2, LEVEL_avx512, LEVEL_avx512_bf16;
#endif

}  // namespace potstill::conv
