// How GGUF's block formats lie in panels: what pack.cpp writes and blocks.h reads.
//
// A group is 32 inputs of 16 outputs, and a quad 4 inputs of them: 64 bytes, output by output. A panel is read from end to end: it
// is a row of units, each a few groups and a multiple of 64 bytes: scales of 256 inputs, scales of the groups, codes of the groups.
//   scales of 256 inputs (formats with such blocks): float16 d[16], then dmin[16] if the format has minima.
//   scales of a group: float16 d[16], then m[16] if the format has minima; with blocks of 256: 8-bit factors of d, then of dmin
//     (Q6_K: factors of d for inputs 0-15, then for 16-31).
//   codes of a group: low 4 bits of 8 quads, two quads in 64 bytes; then 64 bytes whose bit q is the fifth bit of quad q, or
//     twice 64 bytes with the upper two bits of 4 quads each. Q8_0: whole bytes, 128 added.
#pragma once
#include "program.h"

namespace proa {

constexpr int kGroup = 32;   // inputs that share a scale of 8-bit activations
constexpr int kQuad = 64;    // bytes of 4 inputs x 16 outputs
constexpr int kSuper = 256;  // inputs of a block of the K formats

namespace {  // each file is compiled for an instruction set of its own

struct BlockFormat {
  int inputs, bytes;  // of a block in the file
  int bits;           // of a code
  bool has_min;       // a weight is scale * code + minimum, else scale * (code - 2 ^ (bits - 1))
  constexpr bool is_super() const { return inputs == kSuper; }
  constexpr int code_bytes() const { return kGroup * kPanel * bits / 8; }
  constexpr int scale_bytes() const { return is_super() ? 2 * kPanel : (1 + has_min) * 2 * kPanel; }
  constexpr int super_bytes() const { return is_super() ? (1 + has_min) * 2 * kPanel : 0; }
  constexpr int unit() const { return is_super() ? kSuper / kGroup : has_min ? 1 : 2; }  // groups
  constexpr int head_bytes() const { return (super_bytes() + unit() * scale_bytes() + 63) / 64 * 64; }
  constexpr int unit_bytes() const { return head_bytes() + unit() * code_bytes(); }
  constexpr ptrdiff_t panel_bytes(int inputs) const {
    return ptrdiff_t(inputs / kGroup + unit() - 1) / unit() * unit_bytes();
  }
  // Offsets in a panel, of group g.
  constexpr ptrdiff_t super_at(int g) const { return ptrdiff_t(g / unit()) * unit_bytes(); }
  constexpr ptrdiff_t scales_at(int g) const { return super_at(g) + super_bytes() + g % unit() * scale_bytes(); }
  constexpr ptrdiff_t codes_at(int g) const { return super_at(g) + head_bytes() + g % unit() * code_bytes(); }
};

constexpr bool is_blocks(int format) { return format >= kQ40; }

constexpr BlockFormat block_format(int format) {
  switch (format) {
    case kQ40: return {32, 18, 4, false};
    case kQ41: return {32, 20, 4, true};
    case kQ50: return {32, 22, 5, false};
    case kQ51: return {32, 24, 5, true};
    case kQ80: return {32, 34, 8, false};
    case kQ4K: return {256, 144, 4, true};
    case kQ5K: return {256, 176, 5, true};
    case kQ6K: return {256, 210, 6, false};
    default: return {32, 18, 4, false};  // kIq4Nl
  }
}

}  // namespace
}  // namespace proa
