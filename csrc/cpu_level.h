// Which level of a processor's instructions to take: each csrc/*_loops.cpp is compiled once for each of LEVELS in
// csrc/build_flags.py, into a table of functions named LEVEL_any, LEVEL_avx2, ...
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

namespace potstill {

enum class Instructions { any, avx2, avx512, avx512_bf16 };

// The best that this machine has, or what POTSTILL_CPU names.
inline Instructions instructions() {
  static const Instructions chosen = [] {
    const char* named = std::getenv("POTSTILL_CPU");
    const std::string_view name = named ? named : "";
    const auto takes = [&](const char* level, bool has) { return has && (name.empty() || name == level); };
#ifdef __x86_64__
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl");
    if (takes("avx512_bf16", avx512 && __builtin_cpu_supports("avx512bf16"))) return Instructions::avx512_bf16;
    if (takes("avx512", avx512)) return Instructions::avx512;
    if (takes("avx2", avx2)) return Instructions::avx2;
#endif
    STD_TORCH_CHECK(takes("any", true), "wanted POTSTILL_CPU to be any or what this processor has of avx2, avx512 and ",
                    "avx512_bf16, got ", named);
    return Instructions::any;
  }();
  return chosen;
}

}  // namespace potstill

// The table of that level, of a namespace's *_loops.cpp.
#ifdef __x86_64__
#define POTSTILL_LEVEL(NAMESPACE)                                                                \
  (potstill::instructions() == potstill::Instructions::avx512_bf16 ? NAMESPACE::LEVEL_avx512_bf16 \
   : potstill::instructions() == potstill::Instructions::avx512    ? NAMESPACE::LEVEL_avx512      \
   : potstill::instructions() == potstill::Instructions::avx2      ? NAMESPACE::LEVEL_avx2        \
                                                                   : NAMESPACE::LEVEL_any)
#else
#define POTSTILL_LEVEL(NAMESPACE) (potstill::instructions(), NAMESPACE::LEVEL_any)
#endif
