// Vectors of PROA_LANES floats and what is computed on them.
#pragma once
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
constexpr int kDirectRows = kLanes == 16 ? 8 : kFewRows;  // rows for which codes of blocks are expanded in registers
constexpr int kTileBytes = 8 * 1024;       // expanded weights kept in the first-level cache
constexpr int kAhead = 3072;               // bytes that weights read once are asked for ahead

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
inline void prefetch_once(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

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

}  // namespace
}  // namespace proa
