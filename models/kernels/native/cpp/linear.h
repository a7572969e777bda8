// Linears: a row made ready, and a panel of 16 outputs times all rows.
#pragma once
#include "blocks.h"
#include "vectors.h"

namespace proa {
namespace {

// 16-bit codes of one row: each group of inputs is scaled by its largest magnitude.
inline void quantize_row(const float* x, int inputs, int group, const Activations& act, int row) {
  int16_t* codes = act.codes + ptrdiff_t(row) * act.stride;
  float* scales = act.scales + ptrdiff_t(row) * act.groups;
  for (int g = 0; g < act.groups; ++g) {
    const int start = g * group, count = std::min(group, inputs - start);
    alignas(64) float padded[64] = {};
    const float* values = x + start;
    if (count < group) {
      std::memcpy(padded, values, count * 4);
      values = padded;
    }
    __m256 largest = _mm256_setzero_ps();
    const __m256 sign = _mm256_set1_ps(-0.f);
    for (int i = 0; i < group; i += 8) largest = _mm256_max_ps(largest, _mm256_andnot_ps(sign, _mm256_loadu_ps(values + i)));
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(largest), _mm256_extractf128_ps(largest, 1));
    const __m128 quarter = _mm_max_ps(half, _mm_movehl_ps(half, half));
    const float max = std::max(_mm_cvtss_f32(quarter), _mm_cvtss_f32(_mm_shuffle_ps(quarter, quarter, 1)));
    scales[g] = max / kMaxActivation;
    const __m256 inverse = _mm256_set1_ps(max > 1e-30f ? kMaxActivation / max : 0.f);
    for (int i = 0; i < group; i += 16) {
      const __m256i a = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i), inverse));
      const __m256i b = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(values + i + 8), inverse));
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + start + i), packed);
    }
  }
}

void prepare_row(const Op& op, const float* src, int row, const Activations& act, float* scratch) {
  const int inputs = op.inputs;
  const bool is_dense = act.groups == 0;
  const float* values = src;
  float* ready = is_dense ? act.values + ptrdiff_t(row) * act.stride : scratch;
  float* normed = op.gather ? scratch : ready;
  switch (op.prologue) {
    case kRmsNorm: {
      const int width = op.norm_width;
      const Floats factor = splat(1.f / std::sqrt(sum_of_squares(src, width, 0.f) / width + op.eps));
      map_row(src, normed, width, [&](Floats x, int i) { return x * factor * load_tail(op.norm_weight, i, width); });
      values = normed;
      break;
    }
    case kLayerNorm: {
      const int width = op.norm_width;
      const float mean = row_sum(src, width) / width;
      const Floats factor = splat(1.f / std::sqrt(sum_of_squares(src, width, mean) / width + op.eps));
      map_row(src, normed, width, [&](Floats x, int i) {
        return (x - splat(mean)) * factor * load_tail(op.norm_weight, i, width) + load_tail(op.norm_bias, i, width);
      });
      values = normed;
      break;
    }
    case kActivation:
      map_row(src, ready, inputs, [&](Floats x, int) { return activate(x, op.activation); });
      values = ready;
      break;
    case kGatedActivation:
      map_row(src, ready, inputs,
              [&](Floats x, int i) { return activate(x, op.activation) * load_tail(src + inputs, i, inputs); });
      values = ready;
      break;
    default:
      break;
  }
  if (op.gather) {
    float* kept = is_dense ? ready : scratch + op.norm_width;
    for (int i = 0; i < inputs; ++i) kept[i] = values[op.gather[i]];
    values = kept;
  }
  if (is_dense) {
    if (values != ready) std::memcpy(ready, values, inputs * 4);
  } else if (op.input_kind == kByte) {
    quantize_row8<false>(values, act, row);
  } else if (op.input_kind == kTwoBytes) {
    quantize_row8<true>(values, act, row);
  } else {
    quantize_row(values, inputs, op.group, act, row);
  }
}


// Expand 4-bit codes of one group to pairs of 16-bit weights: (group / 2, 16 outputs, 2).
inline void expand_codes4(const uint8_t* codes, int group, __m256i low_table, __m256i high_table, int16_t* tile) {
  const __m256i mask = _mm256_set1_epi8(15);
  for (int pair = 0; pair < group / 2; pair += 2, codes += 32, tile += 64) {
    const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const __m256i first = _mm256_and_si256(bytes, mask);
    const __m256i second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
    __m256i* out = reinterpret_cast<__m256i*>(tile);
    const __m256i first_low = _mm256_shuffle_epi8(low_table, first), first_high = _mm256_shuffle_epi8(high_table, first);
    const __m256i second_low = _mm256_shuffle_epi8(low_table, second), second_high = _mm256_shuffle_epi8(high_table, second);
    _mm256_store_si256(out, _mm256_unpacklo_epi8(first_low, first_high));
    _mm256_store_si256(out + 1, _mm256_unpackhi_epi8(first_low, first_high));
    _mm256_store_si256(out + 2, _mm256_unpacklo_epi8(second_low, second_high));
    _mm256_store_si256(out + 3, _mm256_unpackhi_epi8(second_low, second_high));
  }
}

inline void expand_codes8(const int8_t* codes, int group, int16_t* tile) {
  for (int i = 0; i < group * kPanel; i += 16) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + i));
    _mm256_store_si256(reinterpret_cast<__m256i*>(tile + i), _mm256_cvtepi8_epi16(bytes));
  }
}

// One pair of inputs of one row times a panel's weights. Written in assembly for AVX2 because compilers hoist the broadcasts
// of all rows and then spill the sums: 12 sums, 2 weights and these 2 temporaries are all 16 registers.
#if PROA_LANES == 16
typedef __m512i Accumulator;
inline Accumulator load_pairs(const int16_t* p) { return _mm512_loadu_si512(p); }
inline void multiply_pair(Accumulator* sums, const Accumulator* weights, const int16_t* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, 4);
  sums[0] = _mm512_dpwssd_epi32(sums[0], weights[0], _mm512_set1_epi32(bits));
}
inline Floats to_floats(Accumulator v) { return (Floats)_mm512_cvtepi32_ps(v); }
inline void join_pairs(__m256i low, __m256i high, Accumulator* weights) {
  weights[0] = _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_unpacklo_epi8(low, high)), _mm256_unpackhi_epi8(low, high), 1);
}
inline void widen_pairs(const uint8_t* codes, Accumulator* weights) {
  weights[0] = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
}
#else
typedef __m256i Accumulator;
inline Accumulator load_pairs(const int16_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
inline void multiply_pair(Accumulator* sums, const Accumulator* weights, const int16_t* pair) {
  __m256i first, second;
  asm("vpbroadcastd %6, %2\n\t"
      "vpmaddwd %2, %4, %3\n\t"
      "vpmaddwd %2, %5, %2\n\t"
      "vpaddd %3, %0, %0\n\t"
      "vpaddd %2, %1, %1"
      : "+x"(sums[0]), "+x"(sums[1]), "=&x"(first), "=&x"(second)
      : "x"(weights[0]), "x"(weights[1]), "m"(*reinterpret_cast<const int32_t*>(pair)));
}
inline Floats to_floats(Accumulator v) { return (Floats)_mm256_cvtepi32_ps(v); }
inline void widen_pairs(const uint8_t* codes, Accumulator* weights) {
  weights[0] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  weights[1] = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16)));
}
// Interleave the low and high bytes of 32 weights: outputs 0-7, then outputs 8-15.
inline void join_pairs(__m256i low, __m256i high, Accumulator* weights) {
  weights[0] = _mm256_unpacklo_epi8(low, high);
  weights[1] = _mm256_unpackhi_epi8(low, high);
}
#endif

// cells(16) += sums * weight_scales * scale.
inline void add_scaled(float* cells, const Accumulator* sums, const float* weight_scales, float scale) {
  store(cells, load(cells) + to_floats(sums[0]) * (load(weight_scales) * splat(scale)));
  if constexpr (kVectors == 2)
    store(cells + kLanes, load(cells + kLanes) + to_floats(sums[1]) * (load(weight_scales + kLanes) * splat(scale)));
}

// Rows are an index sequence, not a loop: with constant indices from the start the sums stay in registers.
template <int ROWS>
using Rows = std::make_index_sequence<ROWS>;

// out(rows, 16) += activations x tile over `groups` groups; weight_scales are `scale_stride` bytes apart. Meanwhile the
// bytes of the next tile are fetched from `next`.
template <size_t... R>
void multiply_codes(std::index_sequence<R...>, const int16_t* tile, const uint8_t* next, const uint8_t* weight_scales,
                    ptrdiff_t scale_stride, int groups, int group, const int16_t* codes, const float* scales, const Activations& act, float* out) {
  const ptrdiff_t stride = act.stride, scales_stride = act.groups, next_step = scale_stride * 2 / group;
  for (int g = 0; g < groups; ++g, weight_scales += scale_stride) {
    Accumulator total[sizeof...(R)][kVectors] = {};
    for (int pair = 0; pair < group / 2; ++pair, tile += 2 * kPanel, codes += 2, next += next_step) {
      prefetch(next);
      const Accumulator weights[2] = {load_pairs(tile), load_pairs(tile + (kVectors - 1) * 2 * kLanes)};
      (multiply_pair(total[R], weights, codes + R * stride), ...);
    }
    (add_scaled(out + R * kPanel, total[R], reinterpret_cast<const float*>(weight_scales), scales[R * scales_stride + g]), ...);
  }
}

// The same sums for a few rows: codes are expanded in registers and used at once. `data` starts at a group's codes.
template <size_t... R>
void multiply_few(std::index_sequence<R...>, bool is_codes4, const uint8_t* data, __m256i low_table, __m256i high_table,
                  int groups, int group, const Activations& act, float* out) {
  const ptrdiff_t stride = act.stride, scales_stride = act.groups;
  const __m256i mask = _mm256_set1_epi8(15);
  const int16_t* codes = act.codes;
  for (int g = 0; g < groups; ++g) {
    Accumulator total[sizeof...(R)][kVectors] = {};
    Accumulator weights[2];
    if (is_codes4) {
      for (int pair = 0; pair < group / 2; pair += 2, data += 32, codes += 4) {
        prefetch_once(data + kAhead);
        const __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data));
        const __m256i first = _mm256_and_si256(bytes, mask), second = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask);
        join_pairs(_mm256_shuffle_epi8(low_table, first), _mm256_shuffle_epi8(high_table, first), weights);
        (multiply_pair(total[R], weights, codes + R * stride), ...);
        join_pairs(_mm256_shuffle_epi8(low_table, second), _mm256_shuffle_epi8(high_table, second), weights);
        (multiply_pair(total[R], weights, codes + R * stride + 2), ...);
      }
    } else {
      for (int pair = 0; pair < group / 2; ++pair, data += 2 * kPanel, codes += 2) {
        prefetch_once(data + kAhead);
        widen_pairs(data, weights);
        (multiply_pair(total[R], weights, codes + R * stride), ...);
      }
    }
    (add_scaled(out + R * kPanel, total[R], reinterpret_cast<const float*>(data), act.scales[R * scales_stride + g]), ...);
    data += kPanel * 4;
  }
}

template <size_t... R>
void multiply_dense(std::index_sequence<R...>, const float* tile, int inputs, const float* values, ptrdiff_t stride,
                    float* out) {
  Floats total[sizeof...(R)][2] = {{load(out + R * kPanel), load(out + R * kPanel + (kVectors - 1) * kLanes)}...};
  const auto multiply = [](Floats* sums, Floats first, Floats second, float value) {
    sums[0] += first * splat(value);
    if constexpr (kVectors == 2) sums[1] += second * splat(value);
  };
  for (int i = 0; i < inputs; ++i, tile += kPanel, ++values) {
    const Floats first = load(tile), second = load(tile + (kVectors - 1) * kLanes);
    (multiply(total[R], first, second, values[R * stride]), ...);
  }
  (store(out + R * kPanel + (kVectors - 1) * kLanes, total[R][kVectors - 1]), ...);
  (store(out + R * kPanel, total[R][0]), ...);
}

void panel_codes(const Piece& piece, int panel, int group, const Activations& act, int rows, float* out,
                 int16_t* tile) {
  const int groups = act.groups;
  const int code_bytes = piece.format == kCodes4 ? group * kPanel / 2 : group * kPanel;
  const ptrdiff_t group_bytes = code_bytes + kPanel * 4;
  const uint8_t* data = static_cast<const uint8_t*>(piece.data) + panel * groups * group_bytes;
  const int chunk = std::max(1, kTileBytes / (group * kPanel * 2));
  __m256i low_table = _mm256_setzero_si256(), high_table = low_table;
  if (piece.format == kCodes4) {
    alignas(16) uint8_t low[16], high[16];
    for (int i = 0; i < 16; ++i) {
      low[i] = uint16_t(piece.codebook[i]) & 255;
      high[i] = uint16_t(piece.codebook[i]) >> 8;
    }
    low_table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(low)));
    high_table = _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(high)));
  }
  if (rows <= kFewRows) {
    for_row_blocks<kFewRows>(rows, [&](auto block, int) {
      multiply_few(Rows<decltype(block)::value>(), piece.format == kCodes4, data, low_table, high_table, groups, group, act,
                   out);
    });
    return;
  }
  for (int first = 0; first < groups; first += chunk, data += chunk * group_bytes) {
    const int count = std::min(chunk, groups - first);
    for (int g = 0; g < count; ++g) {
      const uint8_t* codes = data + g * group_bytes;
      int16_t* target = tile + g * group * kPanel;
      if (piece.format == kCodes4)
        expand_codes4(codes, group, low_table, high_table, target);
      else
        expand_codes8(reinterpret_cast<const int8_t*>(codes), group, target);
    }
    const uint8_t* next = data + count * group_bytes;
    for_row_blocks<kMaxRows>(rows, [&](auto block, int row) {
      multiply_codes(Rows<decltype(block)::value>(), tile, next, data + code_bytes, group_bytes, count, group,
                     act.codes + ptrdiff_t(row) * act.stride + first * group,
                     act.scales + ptrdiff_t(row) * groups + first, act, out + row * kPanel);
    });
  }
}

void panel_dense(const Piece& piece, int panel, int inputs, const Activations& act, int rows, float* out, float* tile) {
  const int chunk = kTileBytes / (kPanel * 4);
  const ptrdiff_t offset = ptrdiff_t(panel) * inputs * kPanel;
  for (int first = 0; first < inputs; first += chunk) {
    const int count = std::min(chunk, inputs - first);
    const ptrdiff_t start = offset + ptrdiff_t(first) * kPanel;
    const float* weights = tile;
    if (piece.format == kFloat32) {
      weights = static_cast<const float*>(piece.data) + start;
    } else {
      const uint16_t* data = static_cast<const uint16_t*>(piece.data) + start;
      for (int i = 0; i < count * kPanel; i += kLanes)
        store(tile + i, piece.format == kFloat16 ? load_half(data + i) : load_bfloat(data + i));
    }
    for_row_blocks<kMaxRows>(rows, [&](auto block, int row) {
      multiply_dense(Rows<decltype(block)::value>(), weights, count, act.values + ptrdiff_t(row) * act.stride + first,
                     act.stride, out + row * kPanel);
    });
  }
}

void write_rows(const float* out, int rows, const float* bias, bool accumulate, float* target, ptrdiff_t stride) {
  for (int r = 0; r < rows; ++r, out += kPanel, target += stride)
    for (int v = 0; v < kPanel; v += kLanes) {
      const Floats sums = load(out + v) + load(bias + v);
      store(target + v, accumulate ? load(target + v) + sums : sums);
    }
}

void panel(const Piece& piece, int index, int group, int inputs, const Activations& act, int rows, float* out, float* tile) {
  std::memset(out, 0, size_t(rows) * kPanel * 4);
  if (is_blocks(piece.format))
    with_format(piece.format, [&](auto format) {
      const auto blocks = act.kind == kTwoBytes ? panel_blocks<decltype(format)::value, true> : panel_blocks<decltype(format)::value, false>;
      blocks(piece, index, act, rows, out, reinterpret_cast<uint8_t*>(tile));
    });
  else if (act.groups)
    panel_codes(piece, index, group, act, rows, out, reinterpret_cast<int16_t*>(tile));
  else
    panel_dense(piece, index, inputs, act, rows, out, tile);
}

}  // namespace
}  // namespace proa
