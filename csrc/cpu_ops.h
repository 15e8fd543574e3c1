// The ops for CPUs as functions of C++, which csrc/block_cpu.cpp and csrc/attention_cpu.cpp call with no dispatcher between. What
// they compute is said in kernels/norm_silu.py, kernels/residual.py and kernels/conv.py; they write into tensors given to them.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace potstill {

using torch::stable::Tensor;

void norm_silu(
    Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> scale, std::optional<Tensor> shift,
    std::optional<Tensor> add, int64_t groups, double eps, bool silu, double dropout, std::optional<Tensor> key, Tensor y,
    Tensor mean, Tensor rstd);

// dx may be dy.
void norm_silu_grad(
    Tensor dy, Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, std::optional<Tensor> scale,
    std::optional<Tensor> shift, std::optional<Tensor> add, int64_t groups, bool silu, double dropout,
    std::optional<Tensor> key, double dy_factor, std::optional<Tensor> skip, double skip_factor, Tensor dx,
    std::optional<Tensor> dweight, std::optional<Tensor> dbias, std::optional<Tensor> dscale,
    std::optional<Tensor> dshift, std::optional<Tensor> dadd, std::optional<Tensor> y);

// out may be h.
void residual(
    Tensor h, Tensor skip, std::optional<Tensor> bias, std::optional<Tensor> skip_bias, double scale, Tensor out);

namespace conv {

void conv3x3(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> skip, double scale, Tensor out);
void conv3x3_input_grad(Tensor dy, Tensor weight, Tensor dx);
void conv3x3_weight_grad(Tensor x, Tensor dy, double scale, Tensor dweight);

// The same with a weight [O, C, 1, 1]
void conv1x1(Tensor x, Tensor weight, Tensor out);
void conv1x1_input_grad(Tensor dy, Tensor weight, Tensor dx);
void conv1x1_weight_grad(Tensor x, Tensor dy, double scale, Tensor dweight);

}  // namespace conv
}  // namespace potstill
