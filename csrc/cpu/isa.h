// Which compiled variant of the CPU kernels runs.
#pragma once

#include <string_view>

namespace vcr1::cpu {

// kAvx512: F, BW, DQ and VL. kAvx512Vbmi: VBMI and VNNI too; only the video kernels have a variant.
enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Vbmi };

const char* name_of(Isa isa);

// The best that this processor can run, unless choose_isa() named another.
Isa isa();

// "baseline", "avx2", "avx512", "avx512vbmi" or "auto"; throws std::invalid_argument when the
// processor or the build lacks it. Results may differ in the last bit between variants.
void choose_isa(std::string_view name);

}  // namespace vcr1::cpu
