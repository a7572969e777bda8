// Linears of GGUF's block formats for many rows, on a unit that multiplies tiles: 16 rows of 8-bit activations by a group of 16
// outputs. A group's quads are the rows of such a tile already. The unit is AMX, or with PROA_TILES 2 its twin in plain C++, which
// runs everywhere and is there for tests.
//
// Sums are the same exact integers as in blocks.h and floats are added in the same order, so bits are the same, too.
#pragma once
#include <cstring>

#include "blocks.h"

namespace proa {
namespace {

constexpr int kTileRows = 16;
constexpr int kLeastTileRows = 8;    // fewer are left to vectors
constexpr int kTileGroups = 32;      // expanded at once
// Tiles: sums of first or only codes and of second codes; activations of these; weights.
enum Tile { kFirstSums, kSums, kFirstRows, kRows, kWeights };

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

#if PROA_TILES == 1
struct TileUnit {
  void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" : : "m"(config)); }
  void release() { asm volatile("tilerelease"); }
  template <int T>
  void zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
  template <int T>
  void load(const void* p, ptrdiff_t stride) { asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(p), "r"(stride), "i"(T) : "memory"); }
  template <int T>
  void store(void* p, ptrdiff_t stride) { asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(p), "r"(stride), "i"(T) : "memory"); }
  // Sums += signed activations times unsigned weights.
  template <int SUMS, int ROWS, int WEIGHTS>
  void multiply() { asm volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(ROWS), "i"(WEIGHTS)); }
};
#else
struct TileUnit {
  void configure(const TileConfig& config) { config_ = config, std::memset(tiles_, 0, sizeof(tiles_)); }
  void release() { configure({}); }
  template <int T>
  void zero() { std::memset(tiles_[T], 0, sizeof(tiles_[T])); }
  template <int T>
  void load(const void* p, ptrdiff_t stride) {
    zero<T>();
    for (int r = 0; r < config_.rows[T]; ++r) std::memcpy(tiles_[T][r], static_cast<const char*>(p) + r * stride, config_.row_bytes[T]);
  }
  template <int T>
  void store(void* p, ptrdiff_t stride) {
    for (int r = 0; r < config_.rows[T]; ++r) std::memcpy(static_cast<char*>(p) + r * stride, tiles_[T][r], config_.row_bytes[T]);
  }
  template <int SUMS, int ROWS, int WEIGHTS>
  void multiply() {
    for (int r = 0; r < config_.rows[SUMS]; ++r)
      for (int o = 0; o < config_.row_bytes[SUMS] / 4; ++o) {
        int32_t sum;
        std::memcpy(&sum, tiles_[SUMS][r] + o * 4, 4);
        for (int i = 0; i < config_.row_bytes[ROWS]; ++i) sum += int8_t(tiles_[ROWS][r][i]) * tiles_[WEIGHTS][i / 4][o * 4 + i % 4];
        std::memcpy(tiles_[SUMS][r] + o * 4, &sum, 4);
      }
  }

 private:
  TileConfig config_;
  uint8_t tiles_[8][16][64];
};
#endif

// Configure for some rows and parts of a group that have so many inputs.
inline void configure(TileUnit& unit, int rows, int inputs) {
  TileConfig config;
  for (int t : {kFirstSums, kSums}) config.rows[t] = rows, config.row_bytes[t] = kPanel * 4;
  for (int t : {kFirstRows, kRows}) config.rows[t] = rows, config.row_bytes[t] = inputs;
  config.rows[kWeights] = inputs / 4, config.row_bytes[kWeights] = kQuad;
  unit.configure(config);
}

// out(rows, 16) += activations x expanded groups. `sums` is room for 2 x 16 x 16 integers.
template <Kind KIND, bool TWO>
void multiply_groups(TileUnit& unit, const uint8_t* quads, const float* scales, int groups, const int8_t* x, const RowGroup* row_groups,
                     const Activations& act, int rows, float* out, int32_t* sums) {
  constexpr int kParts = num_parts(KIND), kInputs = kGroup / kParts, kSumBytes = kPanel * 4;
  constexpr ptrdiff_t stride = kGroup * (1 + TWO);
  int32_t* first_sums = sums + kTileRows * kPanel;
  for (int g = 0; g < groups; ++g, scales += 2 * kPanel, row_groups += act.rows, x += act.rows * stride) {
    Floats factors[2][2];
    for (int v = 0; v < kVectors; ++v) factors[0][v] = load(scales + v * kLanes), factors[1][v] = load(scales + kPanel + v * kLanes);
    for (int part = 0; part < kParts; ++part, quads += kQuad * kInputs / 4) {
      const int8_t* codes = x + part * kInputs;
      unit.load<kWeights>(quads, kQuad);
      unit.zero<kSums>();
      unit.load<kRows>(TWO ? codes + kGroup : codes, stride);
      unit.multiply<kSums, kRows, kWeights>();
      unit.store<kSums>(sums, kSumBytes);
      if constexpr (TWO) {
        unit.zero<kFirstSums>();
        unit.load<kFirstRows>(codes, stride);
        unit.multiply<kFirstSums, kFirstRows, kWeights>();
        unit.store<kFirstSums>(first_sums, kSumBytes);
      }
      for (int r = 0; r < rows; ++r) {
        const RowGroup& row = row_groups[r];
        Vector total[2] = {};
        Floats totals[2];
        for (int v = 0; v < kVectors; ++v) {
          if constexpr (TWO) total[v] = load_bytes(reinterpret_cast<const uint8_t*>(first_sums + r * kPanel + v * kLanes));
          totals[v] = load(out + r * kPanel + v * kLanes);
        }
        start_sum<KIND>(total, row.minus[kParts == 2 ? part : 2]);
        for (int v = 0; v < kVectors; ++v)
          total[v] = (Vector)((Ints)total[v] + (Ints)load_bytes(reinterpret_cast<const uint8_t*>(sums + r * kPanel + v * kLanes)));
        add_sum(totals, total, factors[part], row.scale);
        if constexpr (has_min(KIND)) add_min(totals, factors[1], row.offset);
        for (int v = 0; v < kVectors; ++v) store(out + r * kPanel + v * kLanes, totals[v]);
      }
    }
  }
}

template <int FORMAT, bool TWO>
void panel_tiles(const Piece& piece, int index, const Activations& act, int rows, float* out, uint8_t* room) {
  constexpr BlockFormat kFormat = block_format(FORMAT);
  constexpr Kind kKind = kind_of(FORMAT);
  const uint8_t* panel = static_cast<const uint8_t*>(piece.data) + index * kFormat.panel_bytes(act.stride);
  float* scales = reinterpret_cast<float*>(room + kTileGroups * 8 * kQuad);
  int32_t* sums = reinterpret_cast<int32_t*>(scales + kTileGroups * 2 * kPanel);
  static_assert(kTileGroups * (8 * kQuad + 2 * kPanel * 4) + 2 * kTileRows * kPanel * 4 <= kTileFloats * 4);
  TileUnit unit;
  int configured = 0;
  for (int first = 0; first < act.groups; first += kTileGroups) {
    const int count = std::min(kTileGroups, act.groups - first);
    for (int g = 0; g < count; ++g) expand_group<FORMAT>(panel, first + g, room + g * 8 * kQuad, scales + g * 2 * kPanel);
    for (int row = 0; row < rows; row += kTileRows) {
      const int tile_rows = std::min(kTileRows, rows - row);
      if (configured != tile_rows) configure(unit, configured = tile_rows, kGroup / num_parts(kKind));
      multiply_groups<kKind, TWO>(unit, room, scales, count, act.bytes + (ptrdiff_t(first) * act.rows + row) * kGroup * (1 + TWO),
                                  act.row_groups + ptrdiff_t(first) * act.rows + row, act, tile_rows, out + row * kPanel, sums);
    }
  }
  unit.release();
}

// As `PanelFunction`; what tiles are not for is left to the vectors of BASE.
template <const Kernels* BASE()>
void panel_on_tiles(const Piece& piece, int index, int group, int inputs, const Activations& act, int rows,
                    float* out, float* tile) {
  const int rest = rows % kTileRows < kLeastTileRows ? rows % kTileRows : 0, tiled = rows - rest;
  if (!is_blocks(piece.format) || !tiled) return BASE()->many(piece, index, group, inputs, act, rows, out, tile);
  std::memset(out, 0, size_t(tiled) * kPanel * 4);
  const bool is_two = act.kind == kTwoBytes;
  with_format(piece.format, [&](auto format) {
    const auto blocks = is_two ? panel_tiles<decltype(format)::value, true> : panel_tiles<decltype(format)::value, false>;
    blocks(piece, index, act, tiled, out, reinterpret_cast<uint8_t*>(tile));
  });
  if (!rest) return;
  Activations others = act;
  others.bytes += tiled * kGroup * (1 + is_two);
  others.row_groups += tiled;
  BASE()->many(piece, index, group, inputs, others, rest, out + tiled * kPanel, tile);
}

// The kernels of BASE, with tiles for many rows.
template <const Kernels* BASE()>
const Kernels* on_tiles(const char* name) {
  static const Kernels table = [name] {
    Kernels kernels = *BASE();
    kernels.name = name, kernels.many = panel_on_tiles<BASE>;
    return kernels;
  }();
  return &table;
}

}  // namespace
}  // namespace proa
