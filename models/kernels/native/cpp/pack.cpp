// Repacks weights into panels.
#include <algorithm>
#include <cstring>
#include <thread>
#include <vector>

#include "panels.h"

namespace proa {
namespace {

// Codes of group `g` of a block of a file.
void read_codes(int format, const uint8_t* block, int g, uint8_t* codes) {
  const auto low = [](const uint8_t* bytes, int shift, int count, uint8_t* out) {
    for (int i = 0; i < count; ++i) out[i] = bytes[i] >> shift & 15;
  };
  const auto halves = [&](const uint8_t* bytes) { low(bytes, 0, 16, codes), low(bytes, 4, 16, codes + 16); };
  const auto fifth = [&](const uint8_t* bits) {
    for (int i = 0; i < kGroup; ++i) codes[i] |= (bits[i / 8] >> i % 8 & 1) << 4;
  };
  switch (format) {
    case kQ41: return halves(block + 4);
    case kQ50: return halves(block + 6), fifth(block + 2);
    case kQ51: return halves(block + 8), fifth(block + 4);
    case kQ80:
      for (int i = 0; i < kGroup; ++i) codes[i] = block[2 + i] ^ 0x80;
      return;
    case kQ4K: return low(block + 16 + g / 2 * 32, g % 2 * 4, kGroup, codes);
    case kQ5K:
      low(block + 48 + g / 2 * 32, g % 2 * 4, kGroup, codes);
      for (int i = 0; i < kGroup; ++i) codes[i] |= (block[16 + i] >> g & 1) << 4;
      return;
    case kQ6K:
      low(block + g / 4 * 64 + g % 2 * 32, g % 4 / 2 * 4, kGroup, codes);
      for (int i = 0; i < kGroup; ++i) codes[i] |= (block[128 + g / 4 * 32 + i] >> g % 4 * 2 & 3) << 4;
      return;
    default: return halves(block + 2);
  }
}

// Write output `o` of a group's scales; for the first group of a block of 256, also those of the block.
void write_scales(int format, const uint8_t* block, int g, int o, uint8_t* scales, uint8_t* super) {
  const uint8_t* packed = block + 4;  // 6-bit factors of Q4_K and Q5_K
  switch (format) {
    case kQ4K:
    case kQ5K:
      scales[o] = g < 4 ? packed[g] & 63 : (packed[4 + g] & 15) | (packed[g - 4] >> 2 & 48);
      scales[kPanel + o] = g < 4 ? packed[4 + g] & 63 : packed[4 + g] >> 4 | (packed[g] >> 2 & 48);
      if (g == 0) std::memcpy(super + o * 2, block, 2), std::memcpy(super + 2 * kPanel + o * 2, block + 2, 2);
      return;
    case kQ6K:
      scales[o] = block[192 + 2 * g];
      scales[kPanel + o] = block[192 + 2 * g + 1];
      if (g == 0) std::memcpy(super + o * 2, block + 208, 2);
      return;
    default:
      std::memcpy(scales + o * 2, block, 2);
      if (block_format(format).has_min) std::memcpy(scales + 2 * kPanel + o * 2, block + 2, 2);
  }
}

// Write a group's planes from its quads.
void write_codes(int bits, const uint8_t (*quads)[kQuad], uint8_t* out) {
  if (bits == 8) {
    std::memcpy(out, quads, 8 * kQuad);
    return;
  }
  for (int q = 0; q < 8; q += 2, out += kQuad)
    for (int i = 0; i < kQuad; ++i) out[i] = (quads[q][i] & 15) | quads[q + 1][i] << 4;
  const int high = bits - 4, step = high ? 8 / high : 8;  // quads in a byte of a plane
  for (int first = 0; high && first < 8; first += step, out += kQuad)
    for (int i = 0; i < kQuad; ++i) {
      out[i] = 0;
      for (int q = 0; q < step; ++q) out[i] |= quads[first + q][i] >> 4 << q * high;
    }
}

void pack_panel(int format, const uint8_t* rows, int outputs, int inputs, int panel, uint8_t* out) {
  const BlockFormat about = block_format(format);
  const int groups = inputs / kGroup;
  const int64_t row_bytes = int64_t(inputs) / about.inputs * about.bytes;
  const int per_block = about.inputs / kGroup, count = std::min(kPanel, outputs - panel * kPanel);
  out += panel * about.panel_bytes(inputs);
  std::memset(out, 0, about.panel_bytes(inputs));  // scales of outputs that are missing
  alignas(64) uint8_t codes[kGroup] = {}, quads[8][kQuad] = {};
  for (int g = 0; g < groups; ++g) {
    for (int o = 0; o < count; ++o) {
      const uint8_t* block = rows + (panel * kPanel + o) * row_bytes + int64_t(g / per_block) * about.bytes;
      read_codes(format, block, g % per_block, codes);
      for (int q = 0; q < 8; ++q) std::memcpy(&quads[q][o * 4], codes + q * 4, 4);
      write_scales(format, block, g % per_block, o, out + about.scales_at(g), out + about.super_at(g));
    }
    write_codes(about.bits, quads, out + about.codes_at(g));
  }
}

}  // namespace
}  // namespace proa

extern "C" {

// Bytes of the panels of a matrix in a block format.
int64_t proa_blocks_bytes(int format, int outputs, int inputs) {
  using namespace proa;
  return block_format(format).panel_bytes(inputs) * ((outputs + kPanel - 1) / kPanel);
}

// Repack the rows of a matrix in a block format, as a GGUF file has them, into panels.
void proa_pack_blocks(int format, const uint8_t* rows, int outputs, int inputs, int threads, uint8_t* out) {
  using namespace proa;
  const int panels = (outputs + kPanel - 1) / kPanel;
  const auto pack = [=](int first, int last) {
    for (int p = first; p < last; ++p) pack_panel(format, rows, outputs, inputs, p, out);
  };
  std::vector<std::thread> workers;
  for (int t = 1; t < threads; ++t) workers.emplace_back(pack, int64_t(panels) * t / threads, int64_t(panels) * (t + 1) / threads);
  pack(0, panels / threads);
  for (std::thread& worker : workers) worker.join();
}

}  // extern "C"
