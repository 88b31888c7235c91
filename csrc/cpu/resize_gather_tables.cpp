#include "resize_gather_tables.h"

#include <algorithm>

namespace vcr1::cpu {
namespace {

constexpr int64_t kWindow = 64;  // bytes that one permutation chooses from
constexpr int64_t kLanes = 16;
constexpr int64_t kTaps = 4;  // of a lane

// Low bytes first, each in -128..127; what is left must fit the highest.
void split(int32_t weight, int parts, int8_t* out, int64_t stride) {
  for (int part = parts - 1; part >= 0; --part) {
    const auto low = static_cast<int8_t>(weight & 255);
    out[part * stride] = low;
    weight = (weight - low) / 256;
  }
}

int32_t largest_of(int parts) {
  int32_t value = 127;
  for (int part = 1; part < parts; ++part) value = value * 256 + 127;
  return value;
}

}  // namespace

std::vector<GatherMemory::Taps> GatherMemory::taps_of(const ResizeAxis& axis, bool wide) {
  const int64_t n = 2 * axis.taps;
  std::vector<Taps> all(axis.n_out);
  for (int64_t i = 0; i < axis.n_out; ++i) {
    const int16_t* from = static_cast<const int16_t*>(axis.weights) + i * n * (wide ? 2 : 1);
    std::vector<int32_t> weights(from, from + n);
    if (wide)
      for (int64_t k = 0; k < n; ++k) weights[k] = weights[k] * 256 + from[n + k];
    int64_t first = 0, past = n;
    while (past > 1 && weights[past - 1] == 0) --past;
    while (first < past - 1 && weights[first] == 0) ++first;
    all[i].first = 2 * axis.first[i] + first;
    all[i].weights.assign(weights.begin() + first, weights.begin() + past);
  }
  return all;
}

GatherAcross GatherMemory::build_across(const std::vector<Taps>& taps, int64_t n_in, int parts,
                                        int64_t planes, Across& memory) {
  const auto n_out = static_cast<int64_t>(taps.size());
  const int64_t row_bytes = std::max(n_in * planes, kWindow);
  GatherAcross out{};
  out.planes = planes;
  for (const Taps& t : taps)
    out.quads = std::max(out.quads, (static_cast<int64_t>(t.weights.size()) + kTaps - 1) / kTaps);

  // Bytes [first, past) of the source row that quad q of the outputs [x, x + n) needs.
  const auto span = [&](int64_t x, int64_t n, int64_t q) {
    int64_t first = row_bytes, past = 0;
    for (int64_t i = x; i < x + n; ++i) {
      const int64_t count = static_cast<int64_t>(taps[i].weights.size()) - kTaps * q;
      if (count <= 0) continue;
      const int64_t at = taps[i].first + kTaps * q;
      first = std::min(first, at * planes);
      past = std::max(past, (at + std::min(count, kTaps)) * planes);
    }
    return std::pair(std::max<int64_t>(std::min(first, row_bytes - kWindow), 0), past);
  };
  const auto start_of = [&](int64_t group) {
    return std::min(group * out.pixels, n_out - out.pixels);
  };
  const auto fits = [&] {
    for (int64_t g = 0; g < out.groups; ++g)
      for (int64_t q = 0; q < out.quads; ++q) {
        const auto [first, past] = span(start_of(g), out.pixels, q);
        if (past > first + kWindow) return false;
      }
    return true;
  };
  // A single pixel always fits.
  for (out.pixels = std::min(kLanes / planes, n_out);; --out.pixels) {
    out.groups = (n_out + out.pixels - 1) / out.pixels;
    if (out.pixels == 1 || fits()) break;
  }

  memory.base.resize(out.groups * out.quads);
  memory.vectors.assign(out.groups * out.quads * (1 + parts), Vector{});
  for (int64_t g = 0; g < out.groups; ++g)
    for (int64_t q = 0; q < out.quads; ++q) {
      const int64_t x = start_of(g), entry = g * out.quads + q;
      const int64_t base = span(x, out.pixels, q).first;
      Vector* const vectors = &memory.vectors[entry * (1 + parts)];
      memory.base[entry] = static_cast<int32_t>(base);
      for (int64_t lane = 0; lane < planes * out.pixels; ++lane) {
        const Taps& t = taps[x + lane % out.pixels];
        const auto count = static_cast<int64_t>(t.weights.size());
        for (int64_t k = 0; k < kTaps && q * kTaps + k < count; ++k) {
          const int64_t tap = q * kTaps + k, at = lane * kTaps + k;
          vectors->bytes[at] =
              static_cast<int8_t>((t.first + tap) * planes + lane / out.pixels - base);
          split(t.weights[tap], parts, vectors[1].bytes + at, sizeof(Vector));
        }
      }
    }
  out.vectors = reinterpret_cast<const uint8_t*>(memory.vectors.data());
  out.base = memory.base.data();
  return out;
}

GatherDown GatherMemory::build_down(const std::vector<Taps>& taps, int parts) {
  const auto n_out = static_cast<int64_t>(taps.size());
  GatherDown out{};
  first_.resize(n_out);
  count_.resize(n_out);
  for (int64_t y = 0; y < n_out; ++y) {
    const int64_t past = taps[y].first + static_cast<int64_t>(taps[y].weights.size());
    first_[y] = static_cast<int32_t>(taps[y].first / kTaps);
    count_[y] = static_cast<int32_t>((past + kTaps - 1) / kTaps - first_[y]);
    out.quads = std::max<int64_t>(out.quads, count_[y]);
  }
  weights_.assign(n_out * out.quads * parts * kTaps, 0);
  for (int64_t y = 0; y < n_out; ++y)
    for (size_t k = 0; k < taps[y].weights.size(); ++k) {
      const int64_t at = taps[y].first + static_cast<int64_t>(k) - first_[y] * kTaps;
      split(taps[y].weights[k], parts,
            &weights_[((y * out.quads + at / kTaps) * parts) * kTaps + at % kTaps], kTaps);
    }
  out.first = first_.data();
  out.count = count_.data();
  out.weights = weights_.data();
  return out;
}

GatherTables GatherMemory::build(const ResizeAxis& across, const ResizeAxis& down, bool wide) {
  const std::vector<Taps> columns = taps_of(across, wide), rows = taps_of(down, wide);
  int32_t largest = 0;
  for (const auto* axis : {&columns, &rows})
    for (const Taps& t : *axis)
      for (const int32_t weight : t.weights) largest = std::max(largest, std::abs(weight));
  GatherTables out{};
  out.parts = largest <= largest_of(2) ? 2 : 3;
  out.packed = build_across(columns, across.n_in, out.parts, 3, packed_);
  out.planar = build_across(columns, across.n_in, out.parts, 1, planar_);
  out.down = build_down(rows, out.parts);
  return out;
}

}  // namespace vcr1::cpu
