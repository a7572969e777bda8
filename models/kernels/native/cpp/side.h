// Runs the side networks of a step, layer by layer at the taps of the base.
//
// Rows are cut into strips that share a side network; a strip stays with one thread, so a decode step needs no barrier and
// the other threads go on with the base meanwhile.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "threads.h"

namespace proa {

class SideRunner {
 public:
  SideRunner(Pool* pool, const Kernels* kernels) : pool_(pool), kernels_(kernels), scratch_(pool->size()) {}

  // Plan a step's rows. `head` is the base's last operation, whose norm the blend needs.
  void prepare(const Step& step, const Op& head, int spans) {
    head_ = &head;
    entries_.resize(step.num_sides);
    for (int s = 0; s < step.num_sides; ++s) {
      const int32_t* blocks = step.side_block_tables + size_t(s) * step.side_block_table_stride;
      entries_[s] = {step.sides[s], blocks, step.side_sequences[s], step.side_write_starts[s], step.side_scales[s]};
    }
    std::stable_sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return std::less<const Side*>()(a.side, b.side); });
    output_of_.assign(step.num_tokens, -1);
    for (int o = 0; o < step.num_outputs; ++o) output_of_[step.output_rows[o]] = o;
    is_blended_.assign(step.num_outputs, 0);
    rows_.clear();
    needs_barrier_ = false;
    size_t kept = 0, rotary = 0, wide = 0, inputs = 0, hidden = 0, heads = 0;
    for (const Entry& entry : entries_) {
      const Side& side = *entry.side;
      const int first = step.query_starts[entry.sequence], last = step.query_starts[entry.sequence + 1];
      needs_barrier_ |= last - first > 1;
      for (int t = first; t < last; ++t) {
        const int output = entry.scale > 0 ? output_of_[t] : -1;
        rows_.push_back({&entry, t, output});
        if (output >= 0) is_blended_[output] = 1;
      }
      kept = std::max<size_t>(kept, side.widths[kStream] + side.widths[kHeads]);
      rotary = std::max<size_t>(rotary, side.rotary_dim);
      heads = std::max<size_t>(heads, side.widths[kHeads]);
      for (int b = kHeads + 1; b < side.num_buffers; ++b) wide = std::max<size_t>(wide, side.widths[b]);
      inputs = std::max<size_t>(inputs, side.max_inputs);
      hidden = std::max<size_t>(hidden, side.hidden);
      buffers_ = std::max(buffers_, side.num_buffers);
    }
    kept_stride_ = kept;
    rotary_stride_ = rotary;
    wide_stride_ = wide;
    hidden_ = hidden;
    const int threads = pool_->size(), count = int(rows_.size());
    const int longest = std::clamp((count + threads - 1) / threads, 1, kStripRows);
    strips_.clear();
    for (int r = 0; r < count; ++r) {
      if (strips_.empty() || strips_.back().count == longest || rows_[strips_.back().first].entry->side != rows_[r].entry->side)
        strips_.push_back({r, 0});
      ++strips_.back().count;
    }
    grow(kept_, count * kept);
    grow(cos_sin_, count * rotary);
    grow(blended_, size_t(step.num_outputs) * hidden);
    for (Scratch& s : scratch_) {
      grow(s.values, kStripRows * inputs);
      grow(s.narrow, kStripRows * inputs);
      grow(s.wide, kStripRows * std::max({wide * buffers_, hidden, inputs}));
      grow(s.row, 2 * inputs + 64);
      grow(s.attention, attention_scratch(int(heads / 3), spans));  // a head each of queries, keys and values, or more
      grow(s.tile, kTileFloats + 16);
    }
  }

  // Take the base's rows (num_tokens, stride) at tap `index`. Called by every thread.
  void tap(const Step& step, int index, const float* x, size_t stride, int thread) {
    Scratch& scratch = scratch_[thread];
    for (size_t s = thread; s < strips_.size(); s += pool_->size()) begin_layer(step, strips_[s], index, x, stride, scratch);
    if (index == 0) return;
    if (needs_barrier_) pool_->barrier.wait();
    for (size_t s = thread; s < strips_.size(); s += pool_->size()) end_layer(step, strips_[s], index, x, stride, scratch);
    if (index == rows_[0].entry->side->num_layers) pool_->barrier.wait();
  }

  // The blended final state of an output row, or null if no side network takes part in it.
  const float* blended(int output) const { return is_blended_[output] ? blended_.data() + size_t(output) * hidden_ : nullptr; }

 private:
  static constexpr int kStripRows = 32, kStream = 0, kHeads = 1;

  struct Entry : SideEntry {
    const int32_t* blocks;
    int sequence, write_start;
    float scale;
  };
  struct Row {
    const Entry* entry;
    int token, output;
  };
  struct Strip {
    int first, count;
  };
  struct Scratch {
    std::vector<float> values, narrow, wide, row, attention, tile;
    float out[kStripRows * kPanel];
  };

  static void grow(std::vector<float>& v, size_t size) {
    if (v.size() < size) v.resize(size);
  }

  // Row `r` of the step, row `local` of its strip.
  float* cell(int buffer, int r, int local, Scratch& scratch) {
    const Side& side = *rows_[r].entry->side;
    if (buffer <= kHeads) return kept_.data() + r * kept_stride_ + (buffer == kHeads ? side.widths[kStream] : 0);
    return scratch.wide.data() + (size_t(buffer) * kStripRows + local) * wide_stride_;
  }

  template <typename Source, typename Target>
  void linear(const Op& op, int count, Scratch& scratch, Source source, Target target) {
    const Activations act{scratch.values.data(), nullptr, nullptr, op.inputs, 0};
    for (int i = 0; i < count; ++i) kernels_->prepare_row(op, source(i), i, act, scratch.row.data());
    float* tile = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(scratch.tile.data()) + 63) / 64 * 64);
    for (int p = 0; p < op.num_pieces; ++p) {
      const Piece& piece = op.pieces[p];
      for (int first = 0; first < piece.outputs; first += kPanel) {
        kernels_->panel(piece, first / kPanel, 0, op.inputs, act, count, scratch.out, tile);
        const int width = std::min(kPanel, piece.outputs - first);
        for (int i = 0; i < count; ++i) {
          float* cells = target(i) + piece.dst_offset + first;
          for (int o = 0; o < width; ++o) {
            const float value = scratch.out[i * kPanel + o] + (piece.bias ? piece.bias[first + o] : 0.f);
            cells[o] = op.accumulate ? cells[o] + value : value;
          }
        }
      }
    }
  }

  // Apply an operation's norm, if it has one, to a row.
  void normalise(const Op& op, const float* x, int width, float* out, Scratch& scratch) {
    Op norm = op;
    norm.gather = nullptr;
    norm.inputs = width;
    kernels_->prepare_row(norm, x, 0, {out, nullptr, nullptr, width, 0}, scratch.row.data());
  }

  void run_ops(const Strip& strip, int first, int last, Scratch& scratch) {
    const Side& side = *rows_[strip.first].entry->side;
    for (int i = first; i < last; ++i) {
      const Op& op = side.ops[i];
      linear(op, strip.count, scratch, [&](int l) { return cell(op.src, strip.first + l, l, scratch); },
             [&](int l) { return cell(op.dst, strip.first + l, l, scratch); });
    }
  }

  static int attention_of(const Side& side, int layer) {
    int i = side.op_starts[layer];
    while (side.ops[i].kind != kAttention) ++i;
    return i;
  }

  // Narrow, mix, and everything up to writing keys and values.
  void begin_layer(const Step& step, const Strip& strip, int index, const float* x, size_t stride, Scratch& scratch) {
    const Side& side = *rows_[strip.first].entry->side;
    const Op* down = side.downs + index * 3;
    const auto state = [&](int l) { return x + rows_[strip.first + l].token * stride; };
    float* narrow = scratch.narrow.data();
    const auto narrowed = [&](int l) { return narrow + size_t(l) * side.width; };
    float* thin = scratch.wide.data();
    const auto thinned = [&](int l) { return thin + size_t(l) * down[1].inputs; };
    if (side.pool) {
      for (int l = 0; l < strip.count; ++l) kernels_->pool(state(l), side.hidden, side.width, side.pool, narrowed(l));
    } else if (down[1].num_pieces) {
      linear(down[0], strip.count, scratch, state, thinned);
      linear(down[1], strip.count, scratch, thinned, narrowed);
    } else {
      linear(down[0], strip.count, scratch, state, narrowed);
    }
    for (int l = 0; l < strip.count; ++l) {
      float* stream = cell(kStream, strip.first + l, l, scratch);
      if (down[2].prologue != kPlain) normalise(down[2], narrowed(l), side.width, narrowed(l), scratch);
      if (index)
        kernels_->mix(narrowed(l), side.gates + (index - 1) * side.width, side.width, stream);
      else
        std::memcpy(stream, narrowed(l), side.width * 4);
    }
    if (index == 0) return rotations(step, strip);
    const int attention = attention_of(side, index - 1);
    run_ops(strip, side.op_starts[index - 1], attention, scratch);
    for (int l = 0; l < strip.count; ++l) write_heads(side.ops[attention], step, strip.first + l);
  }

  void end_layer(const Step& step, const Strip& strip, int index, const float* x, size_t stride, Scratch& scratch) {
    const Side& side = *rows_[strip.first].entry->side;
    const int attention = attention_of(side, index - 1);
    for (int first = 0; first < strip.count;) {
      int last = first + 1;
      while (last < strip.count && rows_[strip.first + last].entry == rows_[strip.first + first].entry) ++last;
      attend(side.ops[attention], step, strip, first, last, scratch);
      first = last;
    }
    run_ops(strip, attention + 1, side.op_starts[index], scratch);
    if (index == side.num_layers) blend(strip, x, stride, scratch);
  }

  void rotations(const Step& step, const Strip& strip) {
    for (int r = strip.first; r < strip.first + strip.count; ++r) {
      const Side& side = *rows_[r].entry->side;
      float* row = cos_sin_.data() + r * rotary_stride_;
      const int half = side.rotary_dim / 2;
      for (int i = 0; i < half; ++i) {
        const float angle = float(step.positions[rows_[r].token]) * side.inv_freq[i];
        row[i] = std::cos(angle) * side.rotary_scale;
        row[half + i] = std::sin(angle) * side.rotary_scale;
      }
    }
  }

  void write_heads(const Op& op, const Step& step, int r) {
    const Entry& entry = *rows_[r].entry;
    const int dim = op.head_dim, position = step.positions[rows_[r].token];
    float* heads = kept_.data() + r * kept_stride_ + entry.side->widths[kStream];
    const float* cos_sin = cos_sin_.data() + r * rotary_stride_;
    for (int h = 0; h < op.num_heads; ++h)
      kernels_->rotate(heads + h * dim, dim, op.rotary_dim, cos_sin, op.q_norm, op.eps, op.scale);
    if (position < entry.write_start) return;
    for (int h = 0; h < op.num_kv_heads; ++h) {
      float* k = heads + (op.num_heads + h) * dim;
      kernels_->rotate(k, dim, op.rotary_dim, cos_sin, op.k_norm, op.eps, 1.f);
      const ptrdiff_t at = ptrdiff_t(entry.blocks[position / kBlock]) * op.num_kv_heads + h;
      kernels_->write_kv(k, heads + (op.num_heads + op.num_kv_heads + h) * dim, dim, position % kBlock, step.cache_format,
                         static_cast<char*>(entry.k_cache[op.layer]) + at * key_bytes(dim, step.cache_format),
                         static_cast<char*>(entry.v_cache[op.layer]) + at * value_bytes(dim, step.cache_format));
    }
  }

  // Attend rows first .. last - 1 of a strip, which are of one sequence.
  void attend(const Op& op, const Step& step, const Strip& strip, int first, int last, Scratch& scratch) {
    const Entry& entry = *rows_[strip.first + first].entry;
    const int group = op.num_heads / op.num_kv_heads, dim = op.head_dim, pairs = (last - first) * group;
    AttentionItem item;
    item.head_dim = dim;
    item.blocks = entry.blocks;
    const ptrdiff_t keys = key_bytes(dim, step.cache_format), values = value_bytes(dim, step.cache_format);
    item.key_stride = op.num_kv_heads * keys;
    item.value_stride = op.num_kv_heads * values;
    item.cache_format = step.cache_format;
    item.scratch = scratch.attention.data();
    for (int head = 0; head < op.num_kv_heads; ++head) {
      item.k_cache = static_cast<char*>(entry.k_cache[op.layer]) + head * keys;
      item.v_cache = static_cast<char*>(entry.v_cache[op.layer]) + head * values;
      for (int pair = 0; pair < pairs; pair += item.count) {
        item.count = std::min(kMaxQueries, pairs - pair);
        for (int i = 0; i < item.count; ++i) {
          const int local = first + (pair + i) / group, query = head * group + (pair + i) % group;
          item.query[i] = cell(op.src, strip.first + local, local, scratch) + query * dim;
          item.out[i] = cell(op.dst, strip.first + local, local, scratch) + query * dim;
          item.limit[i] = step.positions[rows_[strip.first + local].token] + 1;
        }
        kernels_->attend(item);
      }
    }
  }

  void blend(const Strip& strip, const float* x, size_t stride, Scratch& scratch) {
    const Side& side = *rows_[strip.first].entry->side;
    int chosen[kStripRows], count = 0;
    for (int l = 0; l < strip.count; ++l)
      if (rows_[strip.first + l].output >= 0) chosen[count++] = strip.first + l;
    float* up = scratch.wide.data();
    linear(*side.up, count, scratch, [&](int i) { return cell(kStream, chosen[i], 0, scratch); },
           [&](int i) { return up + size_t(i) * side.hidden; });
    for (int i = 0; i < count; ++i) {
      const Row& row = rows_[chosen[i]];
      float* out = blended_.data() + size_t(row.output) * hidden_;
      normalise(*head_, x + row.token * stride, side.hidden, out, scratch);
      kernels_->blend(side.base_share, up + size_t(i) * side.hidden, row.entry->scale, side.hidden, out);
    }
  }

  Pool* pool_;
  const Kernels* kernels_;
  const Op* head_ = nullptr;
  std::vector<Scratch> scratch_;
  std::vector<Entry> entries_;
  std::vector<Row> rows_;
  std::vector<Strip> strips_;
  std::vector<int> output_of_;
  std::vector<char> is_blended_;
  std::vector<float> kept_, cos_sin_, blended_;
  size_t kept_stride_ = 0, rotary_stride_ = 0, wide_stride_ = 0, hidden_ = 0;
  int buffers_ = 0;
  bool needs_barrier_ = false;
};

}  // namespace proa
