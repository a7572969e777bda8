// Attention over blocks of cached keys and values, and what fills them.
#pragma once
#include "vectors.h"

namespace proa {
namespace {

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

}  // namespace
}  // namespace proa
