// Memory for what the ops of csrc/block_cpu.cpp and csrc/attention_cpu.cpp return, and sums over rows.
#pragma once

#include "conv_work.h"

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <vector>

namespace potstill {

using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// Not initialized, of t's dtype. Past the dispatcher, which takes longer than the allocator.
template <size_t D>
Tensor empty(const Tensor& t, const std::array<int64_t, D>& sizes, const std::array<int64_t, D>& strides) {
  int32_t dtype;
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(D, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &made));
  return Tensor(made);
}

inline Tensor images(const Tensor& t, int64_t channels, int64_t height, int64_t width) {
  return empty<4>(t, {t.size(0), channels, height, width}, {channels * height * width, 1, channels * width, channels});
}

inline Tensor images(const Tensor& t, int64_t channels) { return images(t, channels, t.size(2), t.size(3)); }
inline Tensor images(const Tensor& t) { return images(t, t.size(1)); }
inline Tensor matrix(const Tensor& t, int64_t rows, int64_t columns) { return empty<2>(t, {rows, columns}, {columns, 1}); }
inline Tensor vector(const Tensor& t, int64_t values) { return empty<1>(t, {values}, {1}); }

inline Tensor weights(const Tensor& t) {
  return empty<4>(t, {t.size(0), t.size(1), t.size(2), t.size(3)}, {t.stride(0), t.stride(1), t.stride(2), t.stride(3)});
}

inline Maybe vector_if(bool wanted, const Tensor& t) { return wanted ? Maybe(vector(t, t.size(0))) : std::nullopt; }

// Those whose bit is set in `wanted`. Not an undefined one for the others: PyTorch's dispatch modes take none in a list.
template <size_t N>
std::vector<Tensor> only(int64_t wanted, const Maybe* const (&found)[N]) {
  std::vector<Tensor> all;
  all.reserve(N);
  for (size_t i = 0; i < N; ++i) {
    if (wanted >> i & 1) all.push_back(found[i]->value());
  }
  return all;
}

inline int64_t pixels(const Tensor& t) { return t.size(0) * t.size(2) * t.size(3); }

// Σ over rows of [rows, columns], times scale
inline Tensor sum_of_rows(const Tensor& t, int64_t rows, int64_t columns, double scale) {
  constexpr int64_t CHUNK = 64, WIDE = 16;  // rows that are summed in float32, columns of a task
  const Tensor out = vector(t, columns);
  const float* from = conv::pointer(t);
  float* to = conv::pointer(out);
  conv::in_parallel(conv::parts(columns, WIDE), conv::PASSING * rows * columns, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin * WIDE; column < std::min(end * WIDE, columns); column += WIDE) {
      const int64_t wide = std::min(WIDE, columns - column);
      double sums[WIDE] = {};
      for (int64_t first = 0; first < rows; first += CHUNK) {
        float few[WIDE] = {};
        for (int64_t i = first; i < std::min(first + CHUNK, rows); ++i) {
          const float* at = from + i * columns + column;
          if (wide == WIDE) {
            for (int64_t c = 0; c < WIDE; ++c) few[c] += at[c];
          } else {
            for (int64_t c = 0; c < wide; ++c) few[c] += at[c];
          }
        }
        for (int64_t c = 0; c < WIDE; ++c) sums[c] += few[c];
      }
      for (int64_t c = 0; c < wide; ++c) to[column + c] = static_cast<float>(scale * sums[c]);
    }
  });
  return out;
}

}  // namespace potstill
