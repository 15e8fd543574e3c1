// What convolutions on a CPU share: the loops for this machine, its threads and their memory.
#pragma once

#include "conv_loops.h"
#include "cpu_level.h"

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <numeric>

namespace potstill::conv {

constexpr int64_t WORTH_A_THREAD = 1 << 19;  // multiplications
constexpr int64_t PASSING = 16;              // what a value that is read and written takes, in multiplications

inline const Level& level() {
  static const Level& chosen = POTSTILL_LEVEL(potstill::conv);
  return chosen;
}

inline int64_t parts(int64_t all, int64_t each) { return (all + each - 1) / each; }
inline int64_t rounded_up(int64_t all, int64_t each) { return parts(all, each) * each; }

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

inline thread_local Scratch shared_scratch, own_scratch;  // of an op, for all threads; of a task

template <typename T = float>
T* pointer(const torch::stable::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// f(begin, end) for parts of 0 to `count`, shared by PyTorch's threads if there is enough to do.
template <typename F>
void in_parallel(int64_t count, int64_t multiplications, F f) {
  if (multiplications < WORTH_A_THREAD) return f(int64_t{0}, count);
  torch::stable::parallel_for(0, count, 1, f);
}

// The size of parts of `all`, at most `most` each, that threads share equally if there are `others` of each part. Not less than
// `least`, which is worth a task.
inline int64_t equal_parts(int64_t all, int64_t most, int64_t least, int64_t others) {
  const int64_t threads = torch::stable::get_num_threads();
  const int64_t count = rounded_up(parts(all, most), threads / std::gcd(threads, others));
  return std::max(parts(all, count), std::min(least, most));
}

// Values between neighbouring rows and columns, one of which is 1
struct Matrix {
  const float* data;
  int64_t row, column;
};

// to [rows, columns], `to_row` values between rows, = a [rows, inner] · b [inner, columns] · scale
void product(
    const Matrix& a, const Matrix& b, int64_t rows, int64_t inner, int64_t columns, float scale, float* to, int64_t to_row);

}  // namespace potstill::conv
