// Builds the tables of resize_gather.h from those of ResizeAxis. Compiled once, for any processor.
#pragma once

#include <vector>

#include "../kernels.h"

namespace vcr1::cpu {

class GatherMemory {
 public:
  // wide: the weights come in two int16 parts. The result points into this object.
  GatherTables build(const ResizeAxis& across, const ResizeAxis& down, bool wide);

 private:
  struct alignas(64) Vector {
    int8_t bytes[64];
  };
  struct Across {
    std::vector<Vector> vectors;
    std::vector<int32_t> base;
  };
  // One output pixel's taps, without zeros at the ends.
  struct Taps {
    int64_t first;
    std::vector<int32_t> weights;
  };

  static std::vector<Taps> taps_of(const ResizeAxis& axis, bool wide);
  static GatherAcross build_across(const std::vector<Taps>& taps, int64_t n_in, int parts,
                                   int64_t planes, Across& memory);
  GatherDown build_down(const std::vector<Taps>& taps, int parts);

  Across packed_, planar_;
  std::vector<int32_t> first_, count_;
  std::vector<int8_t> weights_;
};

}  // namespace vcr1::cpu
