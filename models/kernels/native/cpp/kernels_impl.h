// The kernels, written once over vectors of PROA_LANES floats. Included by one file for each instruction set.
//
// Every result for a row depends on that row alone and is summed in one fixed order, so a batch gives the same bits as its
// rows one by one.
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels.h"

namespace proa {
namespace {

constexpr int kLanes = PROA_LANES;
constexpr int kVectors = kPanel / kLanes;  // vectors in a panel
constexpr int kMaxRows = PROA_ROWS;        // rows that a micro kernel keeps in registers
constexpr int kFewRows = 3;                // rows for which codes are expanded in registers
constexpr int kMaxQueries = 6;
constexpr int kTileBytes = 8 * 1024;       // expanded weights kept in the first-level cache
constexpr int kAhead = 1536;               // bytes that weights read once are asked for ahead

typedef float Floats __attribute__((vector_size(kLanes * 4), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(kLanes * 4), aligned(4)));

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }
inline void store(float* p, Floats v) { *reinterpret_cast<Floats*>(p) = v; }
#if PROA_LANES == 16
inline Floats splat(float v) { return (Floats)_mm512_set1_ps(v); }
#else
inline Floats splat(float v) { return (Floats)_mm256_set1_ps(v); }
#endif

// Ask for the cache line at p; reading ahead of blocks that lie apart is not something the processor does by itself.
inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
// The same for what is read once a step: weights pass by the second-level cache, which keeps the cache of keys and values and
// what Python needs between two steps.
inline void prefetch_once(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_NTA); }

inline Floats load_half(const uint16_t* p) {
#if PROA_LANES == 16
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  return (Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#endif
}
inline Floats load_bfloat(const uint16_t* p) {
#if PROA_LANES == 16
  return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16);
#else
  return (Floats)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16);
#endif
}
inline float half_to_float(uint16_t v) { return _cvtsh_ss(v); }
inline uint16_t float_to_half(float v) { return _cvtss_sh(std::min(65504.f, std::max(-65504.f, v)), 0); }
inline float bfloat_to_float(uint16_t v) {
  const uint32_t bits = uint32_t(v) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

inline float sum(Floats v) {
  float total = 0;
  for (int i = 0; i < kLanes; ++i) total += v[i];
  return total;
}

// exp(x), relative error below 2e-7; 0 below -87.3, clamped above 88.
inline Floats exponential(Floats x) {
  const Floats low = splat(-87.33654f), high = splat(88.f);
  const Ints underflow = x < low;
  x = x < low ? low : x;
  x = x > high ? high : x;
  const Floats magic = splat(12582912.f);  // adding it rounds to an integer
  const Floats n = (x * splat(1.44269504f) + magic) - magic;
  const Floats r = (x - n * splat(0.693359375f)) - n * splat(-2.12194440e-4f);
  Floats p = splat(1.9875691500e-4f);
  p = p * r + splat(1.3981999507e-3f);
  p = p * r + splat(8.3334519073e-3f);
  p = p * r + splat(4.1665795894e-2f);
  p = p * r + splat(1.6666665459e-1f);
  p = p * r + splat(5.0000001201e-1f);
  p = p * r * r + r + splat(1.f);
  const Ints exponent = (__builtin_convertvector(n, Ints) + 127) << 23;
  const Floats result = p * (Floats)exponent;
  return underflow ? Floats{} : result;
}

inline Floats hyperbolic_tangent(Floats x) {
  const Floats e = exponential(x * splat(2.f));
  return splat(1.f) - splat(2.f) / (e + splat(1.f));
}

// erf(x), absolute error below 1.5e-7 (Abramowitz and Stegun 7.1.26).
inline Floats error_function(Floats x) {
  const Ints negative = x < splat(0.f);
  const Floats a = negative ? -x : x;
  const Floats t = splat(1.f) / (splat(1.f) + splat(0.3275911f) * a);
  Floats p = splat(1.061405429f);
  p = p * t + splat(-1.453152027f);
  p = p * t + splat(1.421413741f);
  p = p * t + splat(-0.284496736f);
  p = p * t + splat(0.254829592f);
  const Floats y = splat(1.f) - p * t * exponential(-a * a);
  return negative ? -y : y;
}

inline Floats activate(Floats x, int32_t kind) {
  switch (kind) {
    case kSilu:
      return x / (splat(1.f) + exponential(-x));
    case kGelu:
      return splat(0.5f) * x * (splat(1.f) + error_function(x * splat(0.70710678f)));
    case kGeluTanh:
      return splat(0.5f) * x * (splat(1.f) + hyperbolic_tangent(splat(0.79788456f) * (x + splat(0.044715f) * x * x * x)));
    default:
      return x > splat(0.f) ? x : (x != x ? x : Floats{});
  }
}

// Call f(vector index) on whole vectors and let it see the tail through a padded copy.
template <typename F>
inline void map_row(const float* x, float* out, int width, F f) {
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) store(out + i, f(load(x + i), i));
  if (i < width) {
    float padded[kLanes] = {};
    std::memcpy(padded, x + i, (width - i) * 4);
    store(padded, f(load(padded), -1 - i));
    std::memcpy(out + i, padded, (width - i) * 4);
  }
}

inline Floats load_tail(const float* p, int offset, int width) {
  if (offset >= 0) return load(p + offset);
  float padded[kLanes] = {};
  const int start = -1 - offset;
  std::memcpy(padded, p + start, (width - start) * 4);
  return load(padded);
}

inline float sum_of_squares(const float* x, int width, float mean) {
  Floats total = {};
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) {
    const Floats d = load(x + i) - splat(mean);
    total += d * d;
  }
  float tail = 0;
  for (; i < width; ++i) tail += (x[i] - mean) * (x[i] - mean);
  return sum(total) + tail;
}

inline float row_sum(const float* x, int width) {
  Floats total = {};
  int i = 0;
  for (; i + kLanes <= width; i += kLanes) total += load(x + i);
  float tail = 0;
  for (; i < width; ++i) tail += x[i];
  return sum(total) + tail;
}

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
  } else {
    quantize_row(values, inputs, op.group, act, row);
  }
}

// ---- linears ---------------------------------------------------------------------------------------------------------

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

// Call f<ROWS>(row) over all rows, at most LIMIT at a time.
template <int LIMIT, typename F>
inline void for_row_blocks(int rows, F f) {
  int row = 0;
  for (; row + LIMIT <= rows; row += LIMIT) f(std::integral_constant<int, LIMIT>(), row);
  if constexpr (LIMIT > 1) {
    if (row < rows) {
      const int rest = rows - row;
      for_row_blocks<LIMIT - 1>(rest, [&](auto count, int offset) { f(count, row + offset); });
    }
  }
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

void panel(const Piece& piece, int index, int group, int inputs, const Activations& act, int rows, float* out, float* tile) {
  std::memset(out, 0, size_t(rows) * kPanel * 4);
  if (act.groups)
    panel_codes(piece, index, group, act, rows, out, reinterpret_cast<int16_t*>(tile));
  else
    panel_dense(piece, index, inputs, act, rows, out, tile);
}

// ---- attention -------------------------------------------------------------------------------------------------------

inline Floats load_cached(const void* p, ptrdiff_t offset, bool is_half) {
  return is_half ? load_half(static_cast<const uint16_t*>(p) + offset) : load(static_cast<const float*>(p) + offset);
}
inline float load_cached_one(const void* p, ptrdiff_t offset, bool is_half) {
  return is_half ? half_to_float(static_cast<const uint16_t*>(p)[offset]) : static_cast<const float*>(p)[offset];
}

// Scores of COUNT queries against WIDE blocks of keys. Several blocks at once keep enough sums in flight.
template <int COUNT, bool HALF, int WIDE>
inline void score_blocks(const AttentionItem& item, int block, int last) {
  ptrdiff_t base[WIDE];
  const uint16_t* next[WIDE];  // in units of half the element, whatever it is
  for (int w = 0; w < WIDE; ++w) {
    base[w] = item.blocks[block + w] * item.block_stride;
    const int ahead = std::min(block + w + WIDE, last);
    next[w] = static_cast<const uint16_t*>(item.k_cache) + item.blocks[ahead] * item.block_stride * (HALF ? 1 : 2);
  }
  Floats total[COUNT][WIDE * kVectors] = {};
  for (int e = 0; e < item.head_dim; ++e) {
    Floats keys[WIDE * kVectors];
    for (int w = 0; w < WIDE; ++w) prefetch(next[w] + e * kBlock * (HALF ? 1 : 2));
#pragma GCC unroll 4
    for (int v = 0; v < WIDE * kVectors; ++v)
      keys[v] = load_cached(item.k_cache, base[v / kVectors] + e * kBlock + v % kVectors * kLanes, HALF);
#pragma GCC unroll 8
    for (int q = 0; q < COUNT; ++q)
#pragma GCC unroll 4
      for (int v = 0; v < WIDE * kVectors; ++v) total[q][v] += keys[v] * splat(item.query[q][e]);
  }
#pragma GCC unroll 8
  for (int q = 0; q < COUNT; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < WIDE * kVectors; ++v)
      store(item.scores + q * item.score_stride + block * kBlock + v * kLanes, total[q][v]);
}

// Channels e .. e + 16 * WIDE of what COUNT queries attend to; scores hold unnormalised weights.
template <int COUNT, bool HALF, int WIDE>
inline void mix_values(const AttentionItem& item, int longest, int e, const float* inverse) {
  Floats total[COUNT][WIDE * kVectors] = {};
  for (int block = 0; block * kBlock < longest; ++block) {
    const ptrdiff_t base = item.blocks[block] * item.block_stride + e;
    const int count = std::min(kBlock, longest - block * kBlock);
    const float* weights = item.scores + block * kBlock;
    const int ahead = std::min(block + 1, (longest - 1) / kBlock);
    const uint16_t* next = static_cast<const uint16_t*>(item.v_cache) +
                           (item.blocks[ahead] * item.block_stride + e) * (HALF ? 1 : 2);
    for (int p = 0; p < count; ++p) {
      prefetch(next + p * item.head_dim * (HALF ? 1 : 2));
      Floats values[WIDE * kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < WIDE * kVectors; ++v)
        values[v] = load_cached(item.v_cache, base + p * item.head_dim + v * kLanes, HALF);
#pragma GCC unroll 8
      for (int q = 0; q < COUNT; ++q)
#pragma GCC unroll 4
        for (int v = 0; v < WIDE * kVectors; ++v) total[q][v] += values[v] * splat(weights[q * item.score_stride + p]);
    }
  }
#pragma GCC unroll 8
  for (int q = 0; q < COUNT; ++q)
#pragma GCC unroll 4
    for (int v = 0; v < WIDE * kVectors; ++v) store(item.out[q] + e + v * kLanes, total[q][v] * splat(inverse[q]));
}

// Channels e .. e + WIDE - 1 of what COUNT queries attend to, from values stored like keys.
template <int COUNT, bool HALF, int WIDE>
inline void mix_transposed(const AttentionItem& item, int longest, int e, const float* inverse) {
  Floats total[COUNT][WIDE] = {};
  const auto add = [&](const float* weights, const auto& value) {
#pragma GCC unroll 2
    for (int v = 0; v < kBlock; v += kLanes) {
      Floats values[WIDE];
#pragma GCC unroll 2
      for (int w = 0; w < WIDE; ++w) values[w] = value(w, v);
#pragma GCC unroll 8
      for (int q = 0; q < COUNT; ++q) {
        const Floats weight = load(weights + q * item.score_stride + v);
#pragma GCC unroll 2
        for (int w = 0; w < WIDE; ++w) total[q][w] += values[w] * weight;
      }
    }
  };
  int block = 0;
  for (; (block + 1) * kBlock <= longest; ++block) {
    const ptrdiff_t base = item.blocks[block] * item.block_stride + e * kBlock;
    add(item.scores + block * kBlock, [&](int w, int v) { return load_cached(item.v_cache, base + w * kBlock + v, HALF); });
  }
  if (block * kBlock < longest) {
    // What lies behind the last position may be anything, even not a number.
    float padded[WIDE][kBlock] = {};
    const ptrdiff_t base = item.blocks[block] * item.block_stride + e * kBlock;
    for (int w = 0; w < WIDE; ++w)
      for (int p = 0; p < longest - block * kBlock; ++p) padded[w][p] = load_cached_one(item.v_cache, base + w * kBlock + p, HALF);
    add(item.scores + block * kBlock, [&](int w, int v) { return load(&padded[w][v]); });
  }
  for (int q = 0; q < COUNT; ++q)
    for (int w = 0; w < WIDE; ++w) item.out[q][e + w] = sum(total[q][w]) * inverse[q];
}

// Turn scores into weights exp(score - max), 0 beyond the limit; return 1 / their sum.
inline float softmax(float* scores, int limit, int padded) {
  std::fill(scores + limit, scores + padded, -std::numeric_limits<float>::infinity());
  Floats largest = load(scores);
  for (int i = kLanes; i < padded; i += kLanes) {
    const Floats x = load(scores + i);
    largest = x > largest ? x : largest;
  }
  float max = largest[0];
  for (int i = 1; i < kLanes; ++i) max = std::max(max, largest[i]);
  Floats total = {};
  for (int i = 0; i < padded; i += kLanes) {
    const Floats weight = exponential(load(scores + i) - splat(max));
    store(scores + i, weight);
    total += weight;
  }
  return 1.f / sum(total);
}

template <int COUNT, bool HALF>
void attend_queries(const AttentionItem& item) {
  constexpr int kWide = COUNT <= 3 ? 2 : 1;
  const int longest = *std::max_element(item.limit, item.limit + COUNT);
  const int blocks = (longest + kBlock - 1) / kBlock, dim = item.head_dim;
  int block = 0;
  for (; block + kWide <= blocks; block += kWide) score_blocks<COUNT, HALF, kWide>(item, block, blocks - 1);
  if (block < blocks) score_blocks<COUNT, HALF, 1>(item, block, blocks - 1);
  float inverse[COUNT];
  for (int q = 0; q < COUNT; ++q)
    inverse[q] = softmax(item.scores + q * item.score_stride, item.limit[q], blocks * kBlock);
  int e = 0;
  if (is_transposed(dim)) {
    for (; e + 2 <= dim; e += 2) mix_transposed<COUNT, HALF, 2>(item, longest, e, inverse);
    if (e < dim) mix_transposed<COUNT, HALF, 1>(item, longest, e, inverse);
    return;
  }
  for (; e + kWide * kPanel <= dim; e += kWide * kPanel) mix_values<COUNT, HALF, kWide>(item, longest, e, inverse);
  for (; e + kPanel <= dim; e += kPanel) mix_values<COUNT, HALF, 1>(item, longest, e, inverse);
}

template <int COUNT>
void attend_count(const AttentionItem& item) {
  if (item.count != COUNT) {
    if constexpr (COUNT > 1) attend_count<COUNT - 1>(item);
  } else if (item.cache_format == kFloat16) {
    attend_queries<COUNT, true>(item);
  } else {
    attend_queries<COUNT, false>(item);
  }
}

void attend(const AttentionItem& item) { attend_count<kMaxQueries>(item); }

void rotate(float* head, int head_dim, int rotary_dim, const float* cos_sin, const float* weight, float eps, float scale) {
  if (weight) {
    const float factor = 1.f / std::sqrt(sum_of_squares(head, head_dim, 0.f) / head_dim + eps);
    for (int i = 0; i < head_dim; ++i) head[i] = head[i] * factor * weight[i];
  }
  const int half = rotary_dim / 2;
  for (int i = 0; i < half; ++i) {
    const float cosine = cos_sin[i], sine = cos_sin[half + i], a = head[i], b = head[half + i];
    head[i] = a * cosine - b * sine;
    head[half + i] = b * cosine + a * sine;
  }
  if (scale != 1.f)
    for (int i = 0; i < head_dim; ++i) head[i] *= scale;
}

void write_kv(const float* k, const float* v, int head_dim, int slot, int format, void* k_block, void* v_block) {
  const bool turned = is_transposed(head_dim);
  const ptrdiff_t start = turned ? slot : ptrdiff_t(slot) * head_dim, step = turned ? kBlock : 1;
  if (format == kFloat16) {
    uint16_t* keys = static_cast<uint16_t*>(k_block) + slot;
    uint16_t* values = static_cast<uint16_t*>(v_block) + start;
    for (int e = 0; e < head_dim; ++e) {
      keys[e * kBlock] = float_to_half(k[e]);
      values[e * step] = float_to_half(v[e]);
    }
  } else {
    float* keys = static_cast<float*>(k_block) + slot;
    float* values = static_cast<float*>(v_block) + start;
    for (int e = 0; e < head_dim; ++e) {
      keys[e * kBlock] = k[e];
      values[e * step] = v[e];
    }
  }
}

// ---- side networks -----------------------------------------------------------------------------------------------------

void pool(const float* x, int inputs, int outputs, int kind, float* out) {
  const int run = inputs / outputs;
  for (int o = 0; o < outputs; ++o, x += run) {
    float value = x[0];
    for (int i = 1; i < run; ++i) value = kind == kMaxPool ? std::max(value, x[i]) : value + x[i];
    out[o] = kind == kMaxPool ? value : value / run;
  }
}

void mix(const float* x, const float* gates, int width, float* stream) {
  for (int i = 0; i < width; ++i) stream[i] = x[i] + gates[i] * (stream[i] - x[i]);
}

void blend(const float* base_share, const float* up, float scale, int width, float* base) {
  for (int i = 0; i < width; ++i) {
    const float share = base_share[i] + (1.f - scale) * (1.f - base_share[i]);
    base[i] = share * base[i] + (1.f - share) * up[i];
  }
}

void embed(const void* table, int format, int64_t row, int width, float* out, bool add) {
  for (int i = 0; i < width; ++i) {
    float value;
    if (format == kFloat32)
      value = static_cast<const float*>(table)[row * width + i];
    else if (format == kFloat16)
      value = half_to_float(static_cast<const uint16_t*>(table)[row * width + i]);
    else
      value = bfloat_to_float(static_cast<const uint16_t*>(table)[row * width + i]);
    out[i] = add ? out[i] + value : value;
  }
}

constexpr Kernels kTable = {PROA_NAME, prepare_row, panel, attend, rotate, write_kv, pool, mix, blend, embed};

}  // namespace
}  // namespace proa
