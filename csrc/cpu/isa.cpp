#include "isa.h"

#include <atomic>

#include "../check.h"

namespace vcr1::cpu {
namespace {

bool runs(Isa isa) {
#if defined(VCR1_MULTI_ISA)
  switch (isa) {
    case Isa::kBaseline:
      return true;
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c");
    case Isa::kAvx512:
      return runs(Isa::kAvx2) && __builtin_cpu_supports("avx512f") &&
             __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl");
    case Isa::kAvx512Vbmi:
      return runs(Isa::kAvx512) && __builtin_cpu_supports("avx512vbmi") &&
             __builtin_cpu_supports("avx512vnni");
  }
#endif
  return isa == Isa::kBaseline;
}

Isa best() {
  for (const Isa isa : {Isa::kAvx512Vbmi, Isa::kAvx512, Isa::kAvx2})
    if (runs(isa)) return isa;
  return Isa::kBaseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> value{best()};
  return value;
}

}  // namespace

const char* name_of(Isa isa) {
  switch (isa) {
    case Isa::kBaseline:
      return "baseline";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vbmi:
      return "avx512vbmi";
  }
  return "?";
}

Isa isa() { return chosen().load(std::memory_order_relaxed); }

void choose_isa(std::string_view name) {
  if (name == "auto") {
    chosen() = best();
    return;
  }
  for (const Isa isa : {Isa::kBaseline, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vbmi}) {
    if (name != name_of(isa)) continue;
    VCR1_CHECK(runs(isa), "this processor or build cannot run ", name, " kernels");
    chosen() = isa;
    return;
  }
  fail<std::invalid_argument>("unknown instruction set '", name,
                              "': expected auto, baseline, avx2, avx512 or avx512vbmi");
}

}  // namespace vcr1::cpu
