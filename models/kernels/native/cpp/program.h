// The program of a decoder as the native executor reads it. Mirrored field by field in structs.py, one folder up.
#pragma once
#include <cstddef>
#include <cstdint>

namespace proa {

constexpr int kPanel = 16;      // outputs of a linear that lie side by side in memory
constexpr int kBlock = 16;      // positions in a KV cache block
constexpr int kMaxActivation = 8191;  // 64 products of a 13-bit activation and a 12-bit weight fit an int32

enum OpKind : int32_t { kEmbed = 0, kLinear = 1, kAttention = 2, kTap = 3 };
enum Prologue : int32_t { kPlain = 0, kRmsNorm = 1, kLayerNorm = 2, kActivation = 3, kGatedActivation = 4 };
enum Activation : int32_t { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };
enum PoolKind : int32_t { kNoPool = 0, kMaxPool = 1, kAvgPool = 2 };
// What the inputs of a linear become: floats for dense ones, 16-bit codes for kCodes4 and kCodes8, one or two 8-bit codes for blocks.
enum InputKind : int32_t { kFloats = 0, kWords = 1, kByte = 2, kTwoBytes = 3 };
enum Format : int32_t {
  kCodes4 = 0, kCodes8 = 1, kFloat32 = 2, kBFloat16 = 3, kFloat16 = 4,
  kQ40 = 5, kQ41 = 6, kQ50 = 7, kQ51 = 8, kQ80 = 9, kQ4K = 10, kQ5K = 11, kQ6K = 12, kIq4Nl = 13,  // panels.h
};
enum CacheFormat : int32_t { kCacheFloat32 = 0, kCacheFloat16 = 1, kCacheInt8 = 2 };

// One matrix of a linear; several share an input. `data` holds panels of 16 outputs, the last one padded:
// codes: for each group of inputs 16 * group codes, then 16 float32 scales; dense: 16 values for each input.
struct Piece {
  const void* data;
  const float* bias;
  const int16_t* codebook;  // 16 entries for kCodes4
  int32_t format;
  int32_t outputs;
  int32_t dst_offset;
  int32_t reserved;
};

struct Op {
  const Piece* pieces;
  const float* norm_weight;
  const float* norm_bias;
  const int32_t* gather;   // kept inputs, or null
  const int32_t* scatter;  // where each output is added, or null
  const float* q_norm;
  const float* k_norm;
  const void* table;
  const void* position_table;
  int32_t kind;
  int32_t prologue;
  int32_t activation;
  int32_t num_pieces;
  int32_t group;  // inputs per scale for codes, 0 for dense
  int32_t src;
  int32_t dst;
  int32_t inputs;      // width of the linear's input
  int32_t norm_width;  // width that the norm reads
  int32_t accumulate;
  int32_t select_rows;
  int32_t layer;  // of attention; which tap
  int32_t num_heads;
  int32_t num_kv_heads;
  int32_t head_dim;
  int32_t rotary_dim;
  int32_t table_format;
  int32_t position_format;
  int32_t position_offset;
  float eps;
  float scale;
  int32_t input_kind;
};

// A side network: a narrow decoder that reads the residual stream at every tap. All of its weights are dense.
struct Side {
  const Op* downs;            // (layers + 1, 3): first matrix, second matrix, norm; no pieces or a plain prologue: absent
  const Op* ops;              // of all layers, buffer 0 being the stream
  const int32_t* op_starts;   // (layers + 1)
  const Op* up;               // final norm and upsampling
  const float* gates;         // (layers, width)
  const float* base_share;    // (hidden)
  const float* inv_freq;
  const int32_t* widths;      // of the buffers
  int32_t num_buffers;
  int32_t num_layers;
  int32_t width;
  int32_t hidden;
  int32_t pool;               // PoolKind
  int32_t rotary_dim;
  int32_t max_inputs;         // widest input or width of a linear or norm
  float rotary_scale;
};

// A side network and the cache that it reads and fills.
struct SideEntry {
  const Side* side;
  void* const* k_cache;  // as in Step
  void* const* v_cache;
};

// What a fork adds to one matrix of a linear: left * (right * x). Panels of float32; null: nothing.
struct Delta {
  const float* right;  // (inputs of the linear) to rank
  const float* left;   // rank to the outputs of the piece
  int32_t rank;
  int32_t reserved;
};

constexpr int kForkPieces = 3;  // of a linear: queries, keys and values

// The last layers of the base once more, with differences.
struct Fork {
  const Delta* deltas;  // (operations from first_op on, kForkPieces)
  int32_t first_op;     // behind the tap where it leaves the base
  int32_t max_rank;
};

struct Step {
  const int32_t* token_ids;
  const int32_t* positions;
  const int32_t* query_starts;
  const int32_t* context_lens;
  const int32_t* block_tables;
  const int32_t* output_rows;
  const int32_t* write_starts;  // first position of each sequence whose keys and values are written, or null
  void* const* k_cache;  // one per layer: (num_blocks, kv_heads, head_dim, 16); see key_bytes
  void* const* v_cache;  // one per layer: (num_blocks, kv_heads, 16, head_dim), or as the keys if is_transposed(head_dim)
  const float* inv_freq;
  const SideEntry* sides;               // (num_sides), each on all of the step's tokens of one sequence
  const int32_t* side_sequences;        // which sequence each reads
  const int32_t* side_block_tables;
  const int32_t* side_write_starts;     // as write_starts
  const float* side_scales;             // how much of it goes into the logits; 0: it fills its cache only
  const Fork* const* forks;             // (num_forks)
  const int32_t* fork_outputs;          // which output each stands in for, increasing
  const int32_t* fork_sequences;        // which sequence that belongs to
  const float* fork_scales;             // how much of it goes into the logits
  const float* states;  // (num_outputs, hidden) that the last operation reads in place of its source and norm, or null
  float* final_states;  // (num_outputs, hidden) to receive what the last operation multiplies, or null
  float* logits;
  float* taps;  // (layers + 1, T, hidden), or null
  int32_t num_tokens;
  int32_t num_sequences;
  int32_t num_outputs;
  int32_t block_table_stride;
  int32_t cache_format;  // CacheFormat
  int32_t num_sides;
  int32_t side_block_table_stride;
  int32_t first_op;      // runs operations first_op .. last_op - 1; buffers keep what they hold
  int32_t last_op;
  int32_t first_tap;     // which tap `taps` starts with
  float rotary_scale;
  int32_t num_forks;
};

// Values of heads that do not fill panels are stored like keys, so that they are read in whole vectors too.
inline bool is_transposed(int head_dim) { return head_dim % kPanel != 0; }

constexpr int kKeyGroup = 32;  // channels of 8-bit keys that share a scale; few channels of keys are far larger than others

// Bytes of a head's keys, or values, in one block. Behind 8-bit codes lie bfloat16 scales, one for each position and key group:
// (groups, 16).
constexpr ptrdiff_t head_bytes(int head_dim, int cache_format, int groups) {
  const ptrdiff_t elements = ptrdiff_t(head_dim) * kBlock;
  return cache_format == kCacheInt8 ? elements + groups * kBlock * 2 : elements * (cache_format == kCacheFloat16 ? 2 : 4);
}
constexpr ptrdiff_t key_bytes(int head_dim, int cache_format) {
  return head_bytes(head_dim, cache_format, (head_dim + kKeyGroup - 1) / kKeyGroup);
}
constexpr ptrdiff_t value_bytes(int head_dim, int cache_format) { return head_bytes(head_dim, cache_format, 1); }

}  // namespace proa
