// Adam, EMA and 16-bit shadows of a list of tensors in one pass, and the norm of their gradient, on a CPU. kernels/adam_ema.py
// holds the formula; the ops are those of csrc/adam_ema.cu.
//
// The elements of a chunk stay in the first cache from one loop of csrc/adam_ema_loops.cpp to the next.
// Sums over chunks are float64, in their order: the number of threads changes no bit.

#include "adam_ema_loops.h"
#include "adam_ema_tables.h"
#include "cpu_level.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <optional>
#include <vector>

namespace potstill::adam {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t GRAIN = 16;  // chunks that are worth a thread

template <typename T>
T* pointer(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

template <typename T>
T* pointer(const std::optional<Tensor>& t) {
  return t.has_value() ? pointer<T>(*t) : nullptr;
}

// To be called before threads share the work: what is thrown within loses its words.
const Level& level() {
  static const Level& chosen = POTSTILL_LEVEL(potstill::adam);
  return chosen;
}

template <typename S>
void round(int64_t n, const float* __restrict p, S* __restrict shadow) {
  for (int64_t i = 0; i < n; ++i) shadow[i] = static_cast<S>(p[i]);
}

// f(tensor, first element, number of elements) for every chunk, shared by PyTorch's threads.
template <typename F>
void each_chunk(const Tensor& fixed, const Tensor& chunks, F f) {
  const int64_t* numels = pointer<int64_t>(fixed) + NUMEL * fixed.size(1);
  const int32_t* at = pointer<int32_t>(chunks);
  torch::stable::parallel_for(0, chunks.size(0), GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const int64_t tensor = at[2 * k], first = at[2 * k + 1] * CHUNK;
      f(tensor, first, std::min<int64_t>(CHUNK, numels[tensor] - first));
    }
  });
}

void check(Tensor fixed, Tensor grads, Tensor chunks, Tensor flag, Tensor) {
  const int64_t* table = pointer<int64_t>(grads);
  const Level& loops = level();
  std::atomic<bool> bad = false;
  each_chunk(fixed, chunks, [&](int64_t tensor, int64_t first, int64_t n) {
    const float* g = reinterpret_cast<const float*>(table[tensor]);
    if (g != nullptr && !loops.finite(n, g + first)) bad = true;
  });
  if (bad) *pointer<float>(flag) = 1.0f;
}

// The number at address i of the table: rates[i] = (address, bytes of a number there).
double rate(const int64_t* rates, int i) {
  if (rates[2 * i + 1] == sizeof(double)) return *reinterpret_cast<const double*>(rates[2 * i]);
  return static_cast<double>(*reinterpret_cast<const float*>(rates[2 * i]));
}

void coefs(
    Tensor steps, Tensor grads, Tensor rates, Tensor flag, std::optional<Tensor> found_inf,
    std::optional<Tensor> grad_scale, Tensor nonfinite, Tensor coefs, double beta1, double beta2, double weight_decay,
    bool counts) {
  const float *found = pointer<float>(found_inf), *scale = pointer<float>(grad_scale);
  const bool go = *pointer<float>(flag) == 0.0f && (found == nullptr || *found == 0.0f);
  if (counts && !go) *pointer<int32_t>(nonfinite) += 1;
  const double lr = rate(pointer<int64_t>(rates), 0), ema_decay = rate(pointer<int64_t>(rates), 1);
  for (int64_t i = 0; i < steps.size(0); ++i) {
    float *step = pointer<float>(steps) + i, *c = pointer<float>(coefs) + i * COEFS;
    if (go && pointer<int64_t>(grads)[i] != 0) *step += 1.0f;
    const double at_least_one = std::max(*step, 1.0f);  // a tensor that never moved divides by no zero
    c[STEP_SIZE] = static_cast<float>(lr / (1.0 - std::pow(beta1, at_least_one)));
    c[RSQRT_BC2] = static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, at_least_one)));
    c[LR_DECAY] = static_cast<float>(lr * weight_decay);
    c[EMA_WEIGHT] = static_cast<float>(1.0 - ema_decay);
    c[INV_SCALE] = scale == nullptr ? 1.0f : 1.0f / *scale;
    c[GO] = go ? 1.0f : 0.0f;
  }
}

void update(
    Tensor fixed, Tensor grads, Tensor chunks, Tensor coefs, Tensor flag, Tensor, Tensor shadow_like, double beta1,
    double beta2, double eps, double weight_decay, bool decoupled) {
  *pointer<float>(flag) = 0.0f;  // coefs has read it; the next step's check starts clean
  const float decay = decoupled ? 0.0f : static_cast<float>(weight_decay), a = static_cast<float>(1.0 - beta1),
              b = static_cast<float>(1.0 - beta2);
  const int64_t *addresses = pointer<int64_t>(fixed), *table = pointer<int64_t>(grads), tensors = fixed.size(1);
  const float* all = pointer<float>(coefs);
  const bool half = shadow_like.scalar_type() == ScalarType::Half;
  const Level& loops = level();
  each_chunk(fixed, chunks, [&](int64_t tensor, int64_t first, int64_t n) {
    const float* c = all + tensor * COEFS;
    if (c[GO] == 0.0f) return;
    const auto at = [&](int row) { return reinterpret_cast<float*>(addresses[row * tensors + tensor]); };
    float *p = at(PARAM) + first, *ema = at(EMA), *shadow = at(SHADOW);
    const float* g = reinterpret_cast<const float*>(table[tensor]);
    const Step step{c[INV_SCALE], decay, decoupled ? c[LR_DECAY] : 0.0f, a, static_cast<float>(beta2), b, c[STEP_SIZE],
                    c[RSQRT_BC2], static_cast<float>(eps)};
    if (g != nullptr) loops.move(step, n, p, g + first, at(EXP_AVG) + first, at(EXP_AVG_SQ) + first);
    if (ema != nullptr) loops.average(c[EMA_WEIGHT], n, p, ema + first);
    if (shadow == nullptr) return;
    if (half) {
      round(n, p, reinterpret_cast<Half*>(shadow) + first);
    } else {
      round(n, p, reinterpret_cast<BFloat16*>(shadow) + first);
    }
  });
}

// gradients: [2, count] int64, the addresses and the numbers of elements of float32 tensors.
void norm(Tensor gradients, Tensor norm) {
  const int64_t *table = pointer<int64_t>(gradients), count = gradients.size(1);
  struct Span {
    const float* from;
    int64_t n;
  };
  std::vector<Span> spans;
  for (int64_t t = 0; t < count; ++t) {
    const float* from = reinterpret_cast<const float*>(table[t]);
    for (int64_t n = table[count + t]; n > 0; n -= CHUNK, from += CHUNK) spans.push_back({from, std::min<int64_t>(CHUNK, n)});
  }
  std::vector<double> sums(spans.size());
  const Level& loops = level();
  torch::stable::parallel_for(0, static_cast<int64_t>(spans.size()), GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) sums[k] = loops.squares(spans[k].n, spans[k].from);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  *pointer<float>(norm) = static_cast<float>(std::sqrt(total));
}

}  // namespace
}  // namespace potstill::adam

STABLE_TORCH_LIBRARY_FRAGMENT(potstill_cpu, m) {
  m.def(potstill::adam::CHECK);
  m.def(potstill::adam::MAKE_COEFS);
  m.def(potstill::adam::UPDATE);
  m.def("total_norm(Tensor gradients, Tensor(a!) norm) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(potstill_cpu, CPU, m) {
  m.impl("adam_ema_check", TORCH_BOX(&potstill::adam::check));
  m.impl("adam_ema_coefs", TORCH_BOX(&potstill::adam::coefs));
  m.impl("adam_ema_update", TORCH_BOX(&potstill::adam::update));
  m.impl("total_norm", TORCH_BOX(&potstill::adam::norm));
}
