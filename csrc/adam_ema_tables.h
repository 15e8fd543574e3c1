// What csrc/adam_ema.cu and csrc/adam_ema_cpu.cpp are given by kernels/tables.py, and the signatures that kernels/_adam.py calls.
//
// A chunk is CHUNK consecutive elements of one tensor: chunks[k] = (tensor, its first chunk). fixed[row][tensor] are addresses of
// what never moves, grads[tensor] of what may: 0 says there is no gradient this step.
#pragma once

namespace potstill::adam {

constexpr int CHUNK = 2048;
constexpr int PARAM = 0, EXP_AVG = 1, EXP_AVG_SQ = 2, EMA = 3, SHADOW = 4, NUMEL = 5;  // rows of `fixed`
constexpr int STEP_SIZE = 0, RSQRT_BC2 = 1, LR_DECAY = 2, EMA_WEIGHT = 3, INV_SCALE = 4, GO = 5, COEFS = 8;

constexpr const char* CHECK = "adam_ema_check(Tensor fixed, Tensor grads, Tensor chunks, Tensor(a!) flag, Tensor grad_like) -> ()";
constexpr const char* MAKE_COEFS =
    "adam_ema_coefs(Tensor(a!) steps, Tensor grads, Tensor rates, Tensor flag, Tensor? found_inf, Tensor? grad_scale, "
    "Tensor(b!) nonfinite, Tensor(c!) coefs, float beta1, float beta2, float weight_decay, bool counts) -> ()";
constexpr const char* UPDATE =
    "adam_ema_update(Tensor fixed, Tensor grads, Tensor chunks, Tensor coefs, Tensor(a!) flag, Tensor grad_like, "
    "Tensor shadow_like, float beta1, float beta2, float eps, float weight_decay, bool decoupled) -> ()";

}  // namespace potstill::adam
