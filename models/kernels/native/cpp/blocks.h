// Linears of GGUF's block formats: unsigned 8-bit weights times signed 8-bit activations.
//
// Sums over a group are exact integers and floats are added group by group with explicit operations, so every instruction set
// and every number of rows gives the same bits for a row of activations.
#pragma once
#include <utility>

#include "panels.h"
#include "vectors.h"

namespace proa {
namespace {

#if PROA_LANES == 16
typedef __m512i Vector;
#else
typedef __m256i Vector;
#endif
typedef uint8_t Bytes __attribute__((vector_size(sizeof(Vector)), aligned(1)));
typedef uint16_t Words __attribute__((vector_size(sizeof(Vector)), aligned(1)));
constexpr int kMaxCode = 127;

// Sums stay in registers only if everything between the loops and the instructions is inlined.
#define PROA_INLINED __attribute__((always_inline))
#define PROA_INLINE inline PROA_INLINED

inline Vector load_bytes(const uint8_t* p) { return (Vector)*reinterpret_cast<const Bytes*>(p); }
inline Vector splat_byte(uint8_t v) { return (Vector)(Bytes{} + v); }
inline int32_t read_int(const int8_t* p) {
  int32_t v;
  std::memcpy(&v, p, 4);
  return v;
}

#if PROA_LANES == 16
inline Vector splat_int(int32_t v) { return _mm512_set1_epi32(v); }
inline Floats convert(Vector v) { return (Floats)_mm512_cvtepi32_ps(v); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
inline Vector look_up(__m128i table, Vector codes) { return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(table), codes); }
inline Floats load_factors(const uint8_t* p, bool is_signed) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return convert(is_signed ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
}
#else
inline Vector splat_int(int32_t v) { return _mm256_set1_epi32(v); }
inline Floats convert(Vector v) { return (Floats)_mm256_cvtepi32_ps(v); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return (Floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
inline Vector look_up(__m128i table, Vector codes) { return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), codes); }
inline Floats load_factors(const uint8_t* p, bool is_signed) {
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return convert(is_signed ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
}
#endif

// Eight-bit codes of one row, one or two for an input; each group of inputs is scaled by its largest magnitude.
template <bool TWO>
void quantize_row8(const float* x, const Activations& act, int row) {
  constexpr int kLargest = TWO ? kMaxCode * 128 + 63 : kMaxCode;
  int8_t* codes = act.bytes + row * kGroup * (1 + TWO);
  RowGroup* group = act.row_groups + row;
  const __m256 sign = _mm256_set1_ps(-0.f);
  const auto write = [&](const __m256i* words) {
    const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packs_epi16(words[0], words[1]), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes), bytes);
    codes += kGroup;
  };
  const ptrdiff_t to_next = ptrdiff_t(act.rows - 1) * kGroup * (1 + TWO);
  for (int g = 0; g < act.groups; ++g, x += kGroup, codes += to_next, group += act.rows) {
    __m256 values[4], largest = _mm256_setzero_ps();
    for (int i = 0; i < 4; ++i) {
      values[i] = _mm256_loadu_ps(x + 8 * i);
      largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, values[i]));
    }
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    const float max = std::max(_mm_cvtss_f32(quarter), _mm_cvtss_f32(_mm_shuffle_ps(quarter, quarter, 1)));
    const __m256 inverse = _mm256_set1_ps(max > 1e-30f ? kLargest / max : 0.f);
    __m256i words[2];
    int32_t sums[2];
    for (int i = 0; i < 2; ++i) {
      words[i] = _mm256_permute4x64_epi64(_mm256_packs_epi32(_mm256_cvtps_epi32(_mm256_mul_ps(values[2 * i], inverse)),
                                                             _mm256_cvtps_epi32(_mm256_mul_ps(values[2 * i + 1], inverse))), 0xd8);
      const __m256i pairs = _mm256_madd_epi16(words[i], _mm256_set1_epi16(1));
      __m128i four = _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
      four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
      sums[i] = _mm_cvtsi128_si32(four) + _mm_extract_epi32(four, 1);
    }
    if constexpr (TWO) {
      __m256i firsts[2];
      for (int i = 0; i < 2; ++i) {
        firsts[i] = _mm256_srai_epi16(_mm256_adds_epi16(words[i], _mm256_set1_epi16(64)), 7);
        words[i] = _mm256_sub_epi16(words[i], _mm256_slli_epi16(firsts[i], 7));  // -64 .. 63
      }
      write(firsts);
    }
    write(words);
    const float scale = max / kLargest;
    *group = {scale, scale * float(sums[0] + sums[1]), {-sums[0], -sums[1], -sums[0] - sums[1]}};
  }
}

// What a micro kernel must know of a format. Formats that differ only in how codes are stored share one.
enum Kind { kZero4, kMin4, kZero5, kMin5, kHalves6, kWhole8 };

constexpr Kind kind_of(int format) {
  switch (format) {
    case kQ40: return kZero4;
    case kQ41: case kQ4K: return kMin4;
    case kQ50: return kZero5;
    case kQ51: case kQ5K: return kMin5;
    case kQ6K: return kHalves6;
    default: return kWhole8;
  }
}
constexpr bool has_min(Kind kind) { return kind == kMin4 || kind == kMin5; }
constexpr int num_parts(Kind kind) { return kind == kHalves6 ? 2 : 1; }  // of a group, each with its own scale

#if PROA_DOT
// Codes whose middle is 1 << shift start from minus that middle times the sum of the activations.
constexpr int zero_shift(Kind kind) { return kind == kZero4 ? 3 : kind == kZero5 ? 4 : kind == kHalves6 ? 5 : kind == kWhole8 ? 7 : -1; }
constexpr int quads_in_words(Kind) { return 8; }
#else
constexpr int zero_shift(Kind kind) { return kind == kZero4 ? 3 : kind == kZero5 ? 4 : kind == kHalves6 ? 5 : -1; }
// Quads whose products with 8-bit activations fit the 16-bit words of vpmaddubsw: 8 * 2 * 15 * 127, 4 * 2 * 31 * 127,
// 2 * 2 * 63 * 127 < 32768. Whole bytes are kept signed and multiplied by magnitude, one quad at a time.
constexpr int quads_in_words(Kind kind) { return kind <= kMin4 ? 8 : kind <= kMin5 ? 4 : kind == kHalves6 ? 2 : 1; }
#endif

// Quad Q of a group, as the micro kernels take it.
template <int FORMAT, int Q>
PROA_INLINE void expand_quad(const uint8_t* codes, Vector* weights) {
  constexpr int kBits = block_format(FORMAT).bits;
  const Vector mask = splat_byte(15);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v, codes += sizeof(Vector)) {
    if constexpr (kBits == 8) {
      weights[v] = load_bytes(codes + Q * kQuad);
      if (!PROA_DOT) weights[v] ^= splat_byte(0x80);
      continue;
    }
    const Vector pair = load_bytes(codes + Q / 2 * kQuad);
    weights[v] = (Q % 2 ? (Vector)((Words)pair >> 4) : pair) & mask;
    if constexpr (FORMAT == kIq4Nl) {
      const __m128i values = _mm_setr_epi8(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113);
      weights[v] = look_up(PROA_DOT ? values ^ _mm_set1_epi8(-128) : values, weights[v]);
    } else if constexpr (kBits > 4) {
      constexpr int kHigh = kBits - 4, kInByte = 8 / kHigh, kShift = 4 - Q % kInByte * kHigh;
      const Words plane = (Words)load_bytes(codes + (4 + Q / kInByte) * kQuad);
      const Words moved = kShift > 0 ? plane << (kShift > 0 ? kShift : 0) : plane >> (kShift < 0 ? -kShift : 0);
      weights[v] |= (Vector)moved & splat_byte(((1 << kHigh) - 1) << 4);
    }
  }
}

template <size_t... Q, typename F>
PROA_INLINE void for_quads(std::index_sequence<Q...>, F f) {
  (f(std::integral_constant<int, Q>()), ...);
}

// sums += 4 inputs of a row times a quad. `sums` are 32 bits wide with dot products, else 16.
#if PROA_DOT && PROA_LANES == 16
PROA_INLINE void multiply_quad(Vector* sums, const Vector* weights, const int8_t* x) {
  sums[0] = _mm512_dpbusd_epi32(sums[0], weights[0], splat_int(read_int(x)));
}
#elif PROA_DOT
// In assembly, as for `multiply_pair`, so that the broadcasts of all rows are not hoisted.
PROA_INLINE void multiply_quad(Vector* sums, const Vector* weights, const int8_t* x) {
  Vector quad;
  asm("vpbroadcastd %5, %2\n\t"
      "%{vex%} vpdpbusd %2, %3, %0\n\t"
      "%{vex%} vpdpbusd %2, %4, %1"
      : "+x"(sums[0]), "+x"(sums[1]), "=&x"(quad)
      : "x"(weights[0]), "x"(weights[1]), "m"(*reinterpret_cast<const int32_t*>(x)));
}
#else
PROA_INLINE void multiply_quad(Vector* sums, const Vector* weights, const int8_t* x) {
  Vector first, second;
  asm("vpbroadcastd %6, %2\n\t"
      "vpmaddubsw %2, %4, %3\n\t"
      "vpmaddubsw %2, %5, %2\n\t"
      "vpaddw %3, %0, %0\n\t"
      "vpaddw %2, %1, %1"
      : "+x"(sums[0]), "+x"(sums[1]), "=&x"(first), "=&x"(second)
      : "x"(weights[0]), "x"(weights[1]), "m"(*reinterpret_cast<const int32_t*>(x)));
}
PROA_INLINE void multiply_signed(Vector* total, const Vector* weights, const int8_t* x) {
  const Vector quad = splat_int(read_int(x)), ones = _mm256_set1_epi16(1);
  for (int v = 0; v < kVectors; ++v)
    total[v] = _mm256_add_epi32(
        total[v], _mm256_madd_epi16(_mm256_maddubs_epi16(_mm256_abs_epi8(weights[v]), _mm256_sign_epi8(quad, weights[v])), ones));
}
PROA_INLINE void widen(Vector* total, const Vector* sums) {
  for (int v = 0; v < kVectors; ++v) total[v] = _mm256_add_epi32(total[v], _mm256_madd_epi16(sums[v], _mm256_set1_epi16(1)));
}
#endif

// sums = 128 * sums + what codes whose middle is not 0 are to start from.
template <Kind KIND>
PROA_INLINE void start_sum(Vector* sums, int32_t minus) {
#if PROA_LANES == 16
  sums[0] = _mm512_slli_epi32(sums[0], 7);
  if constexpr (zero_shift(KIND) > 0)
    sums[0] = _mm512_add_epi32(sums[0], _mm512_slli_epi32(splat_int(minus), zero_shift(KIND)));
#else
  for (int v = 0; v < 2; ++v) sums[v] = _mm256_slli_epi32(sums[v], 7);
  if constexpr (zero_shift(KIND) > 0) {
    const Vector start = _mm256_slli_epi32(splat_int(minus), zero_shift(KIND));
    for (int v = 0; v < 2; ++v) sums[v] = _mm256_add_epi32(sums[v], start);
  }
#endif
}

// totals += sums * their scales * the activations' scale.
PROA_INLINE void add_sum(Floats* total, const Vector* sums, const Floats* scales, float scale) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) total[v] = multiply_add(convert(sums[v]), scales[v] * splat(scale), total[v]);
}
PROA_INLINE void add_min(Floats* total, const Floats* mins, float offset) {
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v) total[v] = multiply_add(mins[v], splat(offset), total[v]);
}

// sums += quads FIRST .. FIRST + COUNT - 1 of a group times the codes of some rows at x.
template <Kind KIND, int FIRST, int COUNT, int STRIDE, typename W, size_t... R>
PROA_INLINE void multiply_quads(std::index_sequence<R...>, W weights, const int8_t* x, Vector (*sums)[kVectors]) {
  constexpr int kStep = std::min(COUNT, quads_in_words(KIND));
  for_quads(std::make_index_sequence<COUNT / kStep>(), [&](auto step) PROA_INLINED {
    constexpr int kStart = FIRST + decltype(step)::value * kStep;
    Vector quad[2];
#if PROA_DOT
    for_quads(std::make_index_sequence<kStep>(), [&](auto q) PROA_INLINED {
      weights(std::integral_constant<int, kStart + decltype(q)::value>(), quad);
      (multiply_quad(sums[R], quad, x + R * STRIDE + (kStart + q) * 4), ...);
    });
#else
    if constexpr (kStep == 1) {
      weights(std::integral_constant<int, kStart>(), quad);
      (multiply_signed(sums[R], quad, x + R * STRIDE + kStart * 4), ...);
    } else {
      Vector words[sizeof...(R)][kVectors];
      ((words[R][0] = words[R][kVectors - 1] = Vector{}), ...);
      for_quads(std::make_index_sequence<kStep>(), [&](auto q) PROA_INLINED {
        weights(std::integral_constant<int, kStart + decltype(q)::value>(), quad);
        (multiply_quad(words[R], quad, x + R * STRIDE + (kStart + q) * 4), ...);
      });
      (widen(sums[R], words[R]), ...);
    }
#endif
  });
}

// One group of some rows, whose codes are TWO times 8 bits or 8 bits. `weights(Q, vectors)` gives quad Q; scales and seconds
// (minima, or scales of the second half) are 16 floats each.
template <Kind KIND, bool TWO, typename W, size_t... R>
PROA_INLINE void multiply_group(std::index_sequence<R...> indices, W weights, const Floats* scales, const Floats* seconds, const int8_t* x,
                                const RowGroup* rows, Floats (*totals)[kVectors]) {
  constexpr int kQuads = 8 / num_parts(KIND), kStride = kGroup * (1 + TWO);
  for_quads(std::make_index_sequence<num_parts(KIND)>(), [&](auto part) PROA_INLINED {
    constexpr int kFirst = decltype(part)::value * kQuads;
    Vector sums[sizeof...(R)][kVectors];
    ((sums[R][0] = sums[R][kVectors - 1] = Vector{}), ...);
    if constexpr (TWO) multiply_quads<KIND, kFirst, kQuads, kStride>(indices, weights, x, sums);
    (start_sum<KIND>(sums[R], rows[R].minus[num_parts(KIND) == 2 ? part : 2]), ...);
    multiply_quads<KIND, kFirst, kQuads, kStride>(indices, weights, TWO ? x + kGroup : x, sums);
    (add_sum(totals[R], sums[R], part == 0 ? scales : seconds, rows[R].scale), ...);
  });
  if constexpr (has_min(KIND)) (add_min(totals[R], seconds, rows[R].offset), ...);
}

// Scales of group g and its minima or second scales, exact in float32.
template <int FORMAT>
PROA_INLINE void load_scales(const uint8_t* panel, int g, Floats* scales, Floats* seconds) {
  constexpr BlockFormat kFormat = block_format(FORMAT);
  const uint8_t* group = panel + kFormat.scales_at(g);
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(kFormat.is_super() ? panel + kFormat.super_at(g) : group);
#pragma GCC unroll 2
  for (int v = 0; v < kVectors; ++v, halves += kLanes, group += kLanes) {
    scales[v] = load_half(halves);
    if constexpr (kFormat.has_min) seconds[v] = load_half(halves + kPanel);
    if constexpr (FORMAT == kQ6K) {
      seconds[v] = scales[v] * load_factors(group + kPanel, true);
      scales[v] *= load_factors(group, true);
    } else if constexpr (kFormat.is_super()) {
      seconds[v] *= -load_factors(group + kPanel, false);
      scales[v] *= load_factors(group, false);
    }
  }
}

// All quads of group g; its scales, then its minima or second scales.
template <int FORMAT>
PROA_INLINE void expand_group(const uint8_t* panel, int g, uint8_t* quads, float* group_scales) {
  for_quads(std::make_index_sequence<8>(), [&](auto q) PROA_INLINED {
    Vector weights[2];
    expand_quad<FORMAT, decltype(q)::value>(panel + block_format(FORMAT).codes_at(g), weights);
    std::memcpy(quads + q * kQuad, weights, kQuad);
  });
  Floats scales[2] = {}, seconds[2] = {};
  load_scales<FORMAT>(panel, g, scales, seconds);
  std::memcpy(group_scales, scales, kPanel * 4);
  std::memcpy(group_scales + kPanel, seconds, kPanel * 4);
}

template <Kind KIND, bool TWO, size_t... R>
void multiply_tile(std::index_sequence<R...> rows, const uint8_t* tile, const float* tile_scales, int groups, const int8_t* x,
                   const RowGroup* row_groups, const Activations& act, const uint8_t* next, int next_step, float* out) {
  Floats totals[sizeof...(R)][kVectors];
  ((totals[R][0] = load(out + R * kPanel), totals[R][kVectors - 1] = load(out + R * kPanel + (kVectors - 1) * kLanes)), ...);
  for (int g = 0; g < groups; ++g, tile += 8 * kQuad, tile_scales += 2 * kPanel, next += next_step) {
    for (int i = 0; i < next_step; i += 64) prefetch(next + i);
    (prefetch(x + (ptrdiff_t(act.rows) + R) * kGroup * (1 + TWO)), ...);
    Floats scales[2], seconds[2];
    for (int v = 0; v < kVectors; ++v) scales[v] = load(tile_scales + v * kLanes), seconds[v] = load(tile_scales + kPanel + v * kLanes);
    multiply_group<KIND, TWO>(rows, [&](auto q, Vector* weights) PROA_INLINED {
      weights[0] = load_bytes(tile + q * kQuad);
      weights[kVectors - 1] = load_bytes(tile + q * kQuad + (kVectors - 1) * sizeof(Vector));
    }, scales, seconds, x, row_groups, totals);
    x += ptrdiff_t(act.rows) * kGroup * (1 + TWO), row_groups += act.rows;
  }
  ((store(out + R * kPanel, totals[R][0]), store(out + R * kPanel + (kVectors - 1) * kLanes, totals[R][kVectors - 1])), ...);
}

template <int FORMAT, bool TWO, size_t... R>
void multiply_panel(std::index_sequence<R...> rows, const uint8_t* panel, const Activations& act, float* out) {
  constexpr BlockFormat kFormat = block_format(FORMAT);
  constexpr int kBytes = kFormat.unit_bytes() / kFormat.unit();
  Floats totals[sizeof...(R)][kVectors];
  ((totals[R][0] = totals[R][kVectors - 1] = Floats{}), ...);
  for (int g = 0; g < act.groups; ++g) {
    for (int i = 0; i < kBytes; i += 64) prefetch_once(panel + ptrdiff_t(g) * kBytes + kAhead + i);
    Floats scales[2], seconds[2];
    load_scales<FORMAT>(panel, g, scales, seconds);
    multiply_group<kind_of(FORMAT), TWO>(rows, [&](auto q, Vector* weights) PROA_INLINED {
      expand_quad<FORMAT, decltype(q)::value>(panel + kFormat.codes_at(g), weights);
    }, scales, seconds, act.bytes + ptrdiff_t(g) * act.rows * kGroup * (1 + TWO), act.row_groups + ptrdiff_t(g) * act.rows, totals);
  }
  ((store(out + R * kPanel, totals[R][0]), store(out + R * kPanel + (kVectors - 1) * kLanes, totals[R][kVectors - 1])), ...);
}

template <int FORMAT, bool TWO>
void panel_blocks(const Piece& piece, int index, const Activations& act, int rows, float* out, uint8_t* tile) {
  constexpr BlockFormat kFormat = block_format(FORMAT);
  constexpr int kChunk = kTileBytes / (8 * kQuad);
  const uint8_t* panel = static_cast<const uint8_t*>(piece.data) + index * kFormat.panel_bytes(act.stride);
  if (rows <= kDirectRows) {
    for_row_blocks<kDirectRows>(rows, [&](auto block, int) {
      multiply_panel<FORMAT, TWO>(std::make_index_sequence<decltype(block)::value>(), panel, act, out);
    });
    return;
  }
  float* tile_scales = reinterpret_cast<float*>(tile + kTileBytes);
  for (int first = 0; first < act.groups; first += kChunk) {
    const int count = std::min(kChunk, act.groups - first);
    for (int g = 0; g < count; ++g) expand_group<FORMAT>(panel, first + g, tile + g * 8 * kQuad, tile_scales + g * 2 * kPanel);
    const uint8_t* next = panel + kFormat.super_at(first + count);
    for_row_blocks<kMaxRows>(rows, [&](auto block, int row) {
      multiply_tile<kind_of(FORMAT), TWO>(std::make_index_sequence<decltype(block)::value>(), tile, tile_scales, count,
                                     act.bytes + (ptrdiff_t(first) * act.rows + row) * kGroup * (1 + TWO),
                                     act.row_groups + ptrdiff_t(first) * act.rows + row, act, next,
                                     row ? 0 : kFormat.unit_bytes() / kFormat.unit(), out + row * kPanel);
    });
  }
}

// Call f(format) with a block format as a constant.
template <typename F>
inline void with_format(int format, F f) {
  switch (format) {
    case kQ40: return f(std::integral_constant<int, kQ40>());
    case kQ41: return f(std::integral_constant<int, kQ41>());
    case kQ50: return f(std::integral_constant<int, kQ50>());
    case kQ51: return f(std::integral_constant<int, kQ51>());
    case kQ80: return f(std::integral_constant<int, kQ80>());
    case kQ4K: return f(std::integral_constant<int, kQ4K>());
    case kQ5K: return f(std::integral_constant<int, kQ5K>());
    case kQ6K: return f(std::integral_constant<int, kQ6K>());
    default: return f(std::integral_constant<int, kIq4Nl>());
  }
}

// One output of a panel as floats: a row of an embedding.
template <int FORMAT>
void read_output(const void* data, int64_t output, int inputs, float* out, bool add) {
  constexpr BlockFormat kFormat = block_format(FORMAT);
  const uint8_t* panel = static_cast<const uint8_t*>(data) + output / kPanel * kFormat.panel_bytes(inputs);
  const int lane = output % kPanel;
  for (int g = 0; g < inputs / kGroup; ++g) {
    alignas(64) uint8_t quads[8][kQuad];
    for_quads(std::make_index_sequence<8>(), [&](auto q) {
      Vector weights[2];
      expand_quad<FORMAT, decltype(q)::value>(panel + kFormat.codes_at(g), weights);
      std::memcpy(quads[q], weights, kQuad);
    });
    Floats scales[2], seconds[2] = {};
    load_scales<FORMAT>(panel, g, scales, seconds);
    const float scale = scales[lane / kLanes][lane % kLanes], second = seconds[lane / kLanes][lane % kLanes];
    constexpr Kind kKind = kind_of(FORMAT);
    for (int i = 0; i < kGroup; ++i) {
      int code = quads[i / 4][lane * 4 + i % 4];
      if (!has_min(kKind)) code = zero_shift(kKind) > 0 ? code - (1 << std::max(0, zero_shift(kKind))) : int8_t(code);
      const float value = has_min(kKind) ? scale * code + second : (FORMAT == kQ6K && i >= kGroup / 2 ? second : scale) * code;
      out[g * kGroup + i] = add ? out[g * kGroup + i] + value : value;
    }
  }
}

}  // namespace
}  // namespace proa
