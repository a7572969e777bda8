// What each instruction set implements; runtime.cpp divides the work among threads and calls these.
#pragma once
#include "program.h"

namespace proa {

// A group of 32 codes of a row: x = scale * code, and code = 8-bit code or 128 * first 8-bit code + second.
struct RowGroup {
  float scale;
  float offset;      // scale * sum of the codes
  int32_t minus[3];  // minus the sums of the first half, of the second, of both
};

// Inputs of a linear, made ready by `prepare_row`: float32 rows, 16-bit codes with a scale for each group, or 8-bit codes.
struct Activations {
  float* values;         // (rows, stride)
  int16_t* codes;        // (rows, stride)
  float* scales;         // (rows, groups)
  int stride;            // inputs rounded up to whole groups
  int groups;            // 0: dense
  int rows;
  int8_t* bytes;         // (groups, rows, 32), or (groups, rows, 2, 32): first codes of a group, then second ones
  RowGroup* row_groups;  // (groups, rows)
  int32_t kind;          // InputKind
};

constexpr int kMaxQueries = 6;  // that read the same keys and values at once
// Positions are cut into spans at fixed places, each with a softmax of its own; these are merged first to last. So bits depend
// neither on who computes which span nor on what else is in the batch.
constexpr int kSpan = 256;
constexpr int num_spans(int positions) { return (positions + kSpan - 1) / kSpan; }

struct AttentionItem {
  const float* query[kMaxQueries];  // rotated, scaled
  float* out[kMaxQueries];
  int limit[kMaxQueries];           // keys each query sees
  int count;
  int head_dim;
  const int32_t* blocks;
  const char* k_cache;    // of this layer, at the head
  const char* v_cache;
  ptrdiff_t key_stride;   // bytes between blocks
  ptrdiff_t value_stride;
  int cache_format;
  float* scratch;         // attention_scratch floats
};

constexpr int kFewRows = 3;  // rows for which codes are expanded in registers

// out(rows, 16) = activations x panel of `piece`; `tile` is scratch of kTileFloats at a multiple of 64 bytes. The bits of a row
// are the same in every instruction set and for any number of rows.
typedef void PanelFunction(const Piece& piece, int panel, int group, int inputs, const Activations& act, int rows, float* out,
                           float* tile);

// Not shared between files, each of which is compiled for its own instruction set.
static inline int longest_limit(const AttentionItem& item) {
  int longest = 0;
  for (int q = 0; q < item.count; ++q) longest = item.limit[q] > longest ? item.limit[q] : longest;
  return longest;
}

// Floats of what a span leaves to be merged.
constexpr size_t span_floats(int head_dim) { return size_t(kMaxQueries) * (head_dim + 2); }
constexpr size_t attention_scratch(int head_dim, int spans) {
  return size_t(kMaxQueries) * kSpan + spans * span_floats(head_dim);
}

struct Kernels {
  const char* name;
  PanelFunction *few, *many;
  void panel(const Piece& piece, int index, int group, int inputs, const Activations& act, int rows, float* out,
             float* tile) const {
    (rows <= kFewRows ? few : many)(piece, index, group, inputs, act, rows, out, tile);
  }
  // Put (or add) rows of a panel, each plus its bias, where they belong, `stride` floats apart.
  void (*write_rows)(const float* out, int rows, const float* bias, bool accumulate, float* target, ptrdiff_t stride);
  // Run an op's prologue on one row of `src` and store it as row `row` of `act`. `scratch` holds norm_width floats.
  void (*prepare_row)(const Op& op, const float* src, int row, const Activations& act, float* scratch);
  void (*attend)(const AttentionItem& item);
  // The same in parts: each span into (count, head_dim + 2) floats; once all are there, one after the other, their merger.
  void (*attend_span)(const AttentionItem& item, int span, float* partials);
  void (*merge_spans)(const AttentionItem& item, float* partials);
  // Normalise (if weight), rotate and scale one head in place.
  void (*rotate)(float* head, int head_dim, int rotary_dim, const float* cos_sin, const float* weight, float eps,
                 float scale);
  void (*write_kv)(const float* k, const float* v, int head_dim, int slot, int format, void* k_block, void* v_block);
  // Narrow `inputs` values to `outputs` runs' largest or mean.
  void (*pool)(const float* x, int inputs, int outputs, int kind, float* out);
  // out = x + amount * (y - x), each of them `width` values; y is at `stream`, which becomes the result.
  void (*mix)(const float* x, const float* gates, int width, float* stream);
  // base = share * base + (1 - share) * up with share = base_share + (1 - scale) * (1 - base_share).
  void (*blend)(const float* base_share, const float* up, float scale, int width, float* base);
  void (*embed)(const void* table, int format, int64_t row, int width, float* out, bool add);
};

constexpr int kTileFloats = 16 * 1024;  // 64 KiB

// Tables of one instruction set; they exist on x86-64 only.
const Kernels* kernels_avx2();
const Kernels* kernels_avxvnni();
const Kernels* kernels_avx512();
const Kernels* kernels_amx();
// What kernels_amx does, with tiles in plain C++ and AVX2: slow, to test that code on every processor.
const Kernels* kernels_tiles();

// The kernels of a name, or null if this processor does not run them. "auto": what proved fastest here, for few rows and for many.
const Kernels* find_kernels(const char* name);

}  // namespace proa
