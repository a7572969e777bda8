// Runs a decoder's program: all threads walk the list of operations together and meet at barriers.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "kernels.h"
#include "side.h"
#include "threads.h"

namespace proa {
namespace {

// Flush denormals while kernels run: they cost a hundred cycles each and carry nothing.
class FlushDenormals {
 public:
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  const unsigned saved_;
};

struct Scratch {
  std::vector<float> row, out, attention, values, scales, mixed;
  std::vector<int16_t> codes;
  std::vector<RowGroup> row_groups;
  float* tile = nullptr;
  std::vector<float> tile_storage;
};

template <typename T>
void grow(std::vector<T>& v, size_t size) {
  if (v.size() < size) v.resize(size);
}

class Program {
 public:
  Program(const Op* ops, int num_ops, const int32_t* widths, int num_buffers, Pool* pool, const Kernels* kernels)
      : ops_(ops, ops + num_ops), widths_(widths, widths + num_buffers), buffers_(num_buffers), pool_(pool),
        kernels_(kernels), sides_(pool, kernels), counters_(num_ops), is_split_(num_ops),
        scratch_(pool->size()) {
    size_t row = 0;
    for (const Op& op : ops_) {
      row = std::max<size_t>(row, op.norm_width + op.inputs);
      max_inputs_ = std::max<int>(max_inputs_, (op.inputs + 63) / 64 * 64);
      if (op.kind == kAttention) rotary_dim_ = std::max(rotary_dim_, op.rotary_dim);
    }
    for (Scratch& s : scratch_) {
      s.row.resize(row + 64);
      s.tile_storage.resize(kTileFloats + 16);
      s.tile = reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(s.tile_storage.data()) + 63) / 64 * 64);
      s.codes.resize(max_inputs_);
      s.values.resize(max_inputs_);
      s.mixed.resize(2 * max_inputs_);
      s.scales.resize(max_inputs_ / 4 + 1);
      s.row_groups.resize(max_inputs_ / 32);
    }
  }

  void run(const Step& step) {
    const auto turn = pool_->acquire();
    prepare(step);
    pool_->run([&](int thread) {
      FlushDenormals flush;
      walk(step, thread);
    });
  }

 private:
  void prepare(const Step& step) {
    plan_forks(step);
    const Step& widest = step.num_forks ? forked_ : step;
    const size_t rows = std::max(widest.num_tokens, step.num_outputs);
    for (size_t i = 0; i < buffers_.size(); ++i) grow(buffers_[i], size_t(widest.num_tokens) * widths_[i]);
    bool has_codes = false, has_dense = false;
    for (const Op& op : ops_)
      if (op.kind == kLinear) (op.group ? has_codes : has_dense) = true;
    if (has_codes) {
      grow(codes_, rows * max_inputs_);
      grow(scales_, rows * (max_inputs_ / 16 + 1));
      grow(row_groups_, rows * (max_inputs_ / 32));
    }
    if (has_dense) grow(values_, rows * max_inputs_);
    grow(cos_sin_, rows * rotary_dim_);
    for (Scratch& s : scratch_) grow(s.out, rows * kPanel);
    const int spans = plan_attention(step);
    for (auto& counter : counters_) counter.store(0, std::memory_order_relaxed);
    if (step.num_sides) sides_.prepare(step, ops_.back(), spans);
  }

  // From the first forked layer on a fork is one more token, in a sequence of its own that writes nothing and reads the cache
  // of the one that it forked from: the base's weights are read once for both.
  void plan_forks(const Step& step) {
    fork_op_ = std::numeric_limits<int>::max();
    if (!step.num_forks) return;
    const int tokens = step.num_tokens, sequences = step.num_sequences, forks = step.num_forks, stride = step.block_table_stride;
    positions_.assign(step.positions, step.positions + tokens);
    starts_.assign(step.query_starts, step.query_starts + sequences + 1);
    lens_.assign(step.context_lens, step.context_lens + sequences);
    tables_.assign(step.block_tables, step.block_tables + size_t(sequences) * stride);
    writes_.assign(sequences, 0);
    if (step.write_starts) writes_.assign(step.write_starts, step.write_starts + sequences);
    fork_of_.assign(step.num_outputs, -1);
    size_t rank = 0;
    for (int f = 0; f < forks; ++f) {
      const Fork& fork = *step.forks[f];
      fork_op_ = std::min(fork_op_, fork.first_op);
      rank = std::max<size_t>(rank, fork.max_rank);
      fork_of_[step.fork_outputs[f]] = f;
      const int position = step.positions[step.output_rows[step.fork_outputs[f]]];
      const int32_t* table = step.block_tables + size_t(step.fork_sequences[f]) * stride;
      positions_.push_back(position);
      starts_.push_back(tokens + f + 1);
      lens_.push_back(position + 1);
      tables_.insert(tables_.end(), table, table + stride);
      writes_.push_back(std::numeric_limits<int32_t>::max());
    }
    thin_stride_ = rank;
    grow(thin_, forks * kForkPieces * rank);
    forked_ = step;
    forked_.positions = positions_.data();
    forked_.query_starts = starts_.data();
    forked_.context_lens = lens_.data();
    forked_.block_tables = tables_.data();
    forked_.write_starts = writes_.data();
    forked_.num_tokens += forks;
    forked_.num_sequences += forks;
  }

  const Delta* delta_of(const Step& step, int fork, int op, int piece) const {
    const Fork& of = *step.forks[fork];
    const Delta* delta = of.deltas + (op - of.first_op) * kForkPieces + piece;
    return op >= of.first_op && delta->right ? delta : nullptr;
  }

  float* thin(int fork, int piece) { return thin_.data() + (size_t(fork) * kForkPieces + piece) * thin_stride_; }

  // The first factor of what a fork adds to a linear, of an input that is made ready.
  void narrow(const Step& step, int fork, int index, const float* ready, Scratch& scratch) {
    const Op& op = ops_[index];
    const Activations act{const_cast<float*>(ready), nullptr, nullptr, op.inputs, 0};
    alignas(64) float out[kPanel];
    for (int p = 0; p < op.num_pieces; ++p)
      if (const Delta* delta = delta_of(step, fork, index, p)) {
        const Piece right{delta->right, nullptr, nullptr, kFloat32, delta->rank, 0, 0};
        for (int i = 0; i < num_panels(right); ++i) {
          kernels_->panel(right, i, 0, op.inputs, act, 1, out, scratch.tile);
          std::copy(out, out + std::min(kPanel, delta->rank - i * kPanel), thin(fork, p) + i * kPanel);
        }
      }
  }

  // Add the second factor's products to a panel of every fork's row.
  void widen(const Step& step, int index, int piece, int panel, Scratch& scratch) {
    const Op& op = ops_[index];
    const int outputs = op.pieces[piece].outputs, first = panel * kPanel, count = std::min(kPanel, outputs - first);
    const int column = op.pieces[piece].dst_offset + first;
    alignas(64) float out[kPanel];
    for (int f = 0; f < step.num_forks; ++f)
      if (const Delta* delta = delta_of(step, f, index, piece)) {
        const Piece left{delta->left, nullptr, nullptr, kFloat32, outputs, 0, 0};
        kernels_->panel(left, panel, 0, delta->rank, {thin(f, piece), nullptr, nullptr, delta->rank, 0}, 1, out, scratch.tile);
        float* row = buffers_[op.dst].data() + size_t(step.num_tokens - step.num_forks + f) * widths_[op.dst];
        for (int i = 0; i < count; ++i) row[op.scatter ? op.scatter[column + i] : column + i] += out[i];
      }
  }

  // What the head reads of an output that a fork has a part in: the base's normed state, the fork's, or a mean of both.
  const float* blend_fork(const Op& op, const Step& step, int output, Scratch& scratch) {
    const int fork = fork_of_[output];
    const float scale = step.fork_scales[fork];
    const auto normed = [&](int row, float* out) {
      kernels_->prepare_row(op, buffers_[op.src].data() + size_t(row) * widths_[op.src], 0, {out, nullptr, nullptr, op.inputs, 0},
                            scratch.row.data());
    };
    float* base = scratch.mixed.data();
    float* mixed = base + max_inputs_;
    normed(step.num_tokens - step.num_forks + fork, mixed);
    if (scale == 1.f) return mixed;
    normed(step.output_rows[output], base);
    for (int i = 0; i < op.inputs; ++i) mixed[i] = base[i] + scale * (mixed[i] - base[i]);
    return mixed;
  }

  void walk(const Step& step, int thread) {
    const int threads = pool_->size();
    const int half = rotary_dim_ / 2;
    const Step& widest = step.num_forks ? forked_ : step;
    for (int t = thread; half && step.first_op == 0 && t < widest.num_tokens; t += threads) {
      float* row = cos_sin_.data() + size_t(t) * rotary_dim_;
      for (int i = 0; i < half; ++i) {
        const float angle = float(widest.positions[t]) * step.inv_freq[i];
        row[i] = std::cos(angle) * step.rotary_scale;
        row[half + i] = std::sin(angle) * step.rotary_scale;
      }
    }
    for (int i = step.first_op; i < step.last_op; ++i) {
      const Op& op = ops_[i];
      const Step& now = i < fork_op_ ? step : forked_;
      if (i == fork_op_) {
        std::vector<float>& stream = buffers_[ops_[i - 1].src];  // of the tap
        const size_t width = widths_[ops_[i - 1].src];
        for (int f = 0; f < step.num_forks; ++f)  // whoever copies a row makes it ready, too
          if ((step.num_tokens + f) % threads == thread)
            std::memcpy(stream.data() + (step.num_tokens + f) * width, stream.data() + step.output_rows[step.fork_outputs[f]] * width, width * 4);
      }
      switch (op.kind) {
        case kEmbed:
          for (int t = thread; t < step.num_tokens; t += threads) {
            float* out = buffers_[op.dst].data() + size_t(t) * widths_[op.dst];
            kernels_->embed(op.table, op.table_format, step.token_ids[t], widths_[op.dst], out, false);
            if (op.position_table)
              kernels_->embed(op.position_table, op.position_format, step.positions[t] + op.position_offset,
                              widths_[op.dst], out, true);
          }
          pool_->barrier.wait();
          break;
        case kLinear:
          linear(i, now, thread, counters_[i]);
          break;
        case kAttention:
          attention(op, now, thread, counters_[i], is_split_[i]);
          break;
        case kTap:
          for (int t = thread; step.taps && t < step.num_tokens; t += threads)
            std::memcpy(step.taps + (size_t(op.layer - step.first_tap) * step.num_tokens + t) * widths_[op.src],
                        buffers_[op.src].data() + size_t(t) * widths_[op.src], widths_[op.src] * 4);
          if (step.num_sides) sides_.tap(step, op.layer, buffers_[op.src].data(), widths_[op.src], thread);
          break;
      }
    }
  }

  void linear(int op_index, const Step& step, int thread, std::atomic<int>& counter) {
    const Op& op = ops_[op_index];
    const int threads = pool_->size(), first_fork = op_index < fork_op_ || op.select_rows ? std::numeric_limits<int>::max() : step.num_tokens - step.num_forks;
    const int rows = op.select_rows ? step.num_outputs : step.num_tokens;
    if (rows == 0) return;
    Scratch& scratch = scratch_[thread];
    const float* src = buffers_[op.src].data();
    const size_t src_stride = widths_[op.src];
    const int groups = op.group ? (op.inputs + op.group - 1) / op.group : 0;
    // A single row is made ready by every thread for itself, which saves a barrier.
    Activations act;
    act.groups = groups;
    act.stride = op.group ? groups * op.group : op.inputs;
    act.values = rows == 1 ? scratch.values.data() : values_.data();
    act.codes = rows == 1 ? scratch.codes.data() : codes_.data();
    act.scales = rows == 1 ? scratch.scales.data() : scales_.data();
    act.kind = op.input_kind;
    act.rows = rows;
    act.bytes = reinterpret_cast<int8_t*>(act.codes);
    act.row_groups = rows == 1 ? scratch.row_groups.data() : row_groups_.data();
    const auto prepare_row = [&](int r) {
      const float* ready = nullptr;  // normed already
      if (op.select_rows) {
        if (step.states) ready = step.states + r * size_t(op.inputs);
        else if (step.num_forks && fork_of_[r] >= 0) ready = blend_fork(op, step, r, scratch);
        else if (step.num_sides) ready = sides_.blended(r);
      }
      if (ready) {
        Op plain = op;
        plain.prologue = kPlain;
        plain.gather = nullptr;
        kernels_->prepare_row(plain, ready, r, act, scratch.row.data());
      } else {
        const float* read = src + (op.select_rows ? step.output_rows[r] : r) * src_stride;
        kernels_->prepare_row(op, read, r, act, scratch.row.data());
        const float* kept = scratch.row.data() + (op.gather ? op.norm_width : 0);
        ready = op.prologue == kPlain ? read : groups ? kept : act.values + ptrdiff_t(r) * act.stride;
        if (r >= first_fork) narrow(step, r - first_fork, op_index, ready, scratch);
      }
      if (op.select_rows && step.final_states && (rows > 1 || thread == 0))
        std::memcpy(step.final_states + r * size_t(op.inputs), ready, op.inputs * 4);
    };
    if (rows == 1) {
      prepare_row(0);
    } else {
      for (int r = thread; r < rows; r += threads) prepare_row(r);
      pool_->barrier.wait();
    }
    int total = 0;
    for (int p = 0; p < op.num_pieces; ++p) total += num_panels(op.pieces[p]);
    const int head = total / (2 * threads);  // panels that each thread begins with; the rest goes to those that are done
    // Small shares even out the threads; with few rows a share must still outweigh the counter.
    const int shares = threads * (rows > 4 ? 32 : 8);
    const int chunk = (total + shares - 1) / shares;
    int first = thread * head, last = first + head;
    while (first < total) {
      int piece = 0, index = first;
      while (index >= num_panels(op.pieces[piece])) index -= num_panels(op.pieces[piece++]);
      for (int n = first; n < last; ++n, ++index) {
        if (index == num_panels(op.pieces[piece])) ++piece, index = 0;
        kernels_->panel(op.pieces[piece], index, op.group, op.inputs, act, rows, scratch.out.data(), scratch.tile);
        write_panel(op, op.pieces[piece], index, step, rows, scratch.out.data());
        if (first_fork < rows) widen(step, op_index, piece, index, scratch);
      }
      first = threads * head + counter.fetch_add(chunk, std::memory_order_relaxed);
      last = std::min(first + chunk, total);
    }
    pool_->barrier.wait();
  }

  static int num_panels(const Piece& piece) { return (piece.outputs + kPanel - 1) / kPanel; }

  void write_panel(const Op& op, const Piece& piece, int index, const Step& step, int rows, const float* out) {
    const int first = index * kPanel, count = std::min(kPanel, piece.outputs - first);
    float bias[kPanel] = {};
    if (piece.bias) std::copy(piece.bias + first, piece.bias + first + count, bias);
    const int column = piece.dst_offset + first;
    const size_t stride = op.dst < 0 ? size_t(piece.outputs) : size_t(widths_[op.dst]);
    float* target = op.dst < 0 ? step.logits : buffers_[op.dst].data();
    if (count == kPanel && !op.scatter) return kernels_->write_rows(out, rows, bias, op.accumulate, target + column, stride);
    for (int r = 0; r < rows; ++r, out += kPanel, target += stride) {
      float* cells = target + column;
      if (op.scatter)
        for (int i = 0; i < count; ++i) target[op.scatter[column + i]] += out[i] + bias[i];
      else
        for (int i = 0; i < count; ++i) cells[i] = (op.accumulate ? cells[i] : 0.f) + (out[i] + bias[i]);
    }
  }

  // Rotate and store the keys and values of one token's key-value head, and rotate the queries that read it.
  void write_head(const Op& op, const Step& step, int token, int sequence, int head) {
    const int dim = op.head_dim, group = op.num_heads / op.num_kv_heads;
    float* row = buffers_[op.src].data() + size_t(token) * widths_[op.src];
    const float* cos_sin = cos_sin_.data() + size_t(token) * rotary_dim_;
    for (int h = head * group; h < (head + 1) * group; ++h)
      kernels_->rotate(row + h * dim, dim, op.rotary_dim, cos_sin, op.q_norm, op.eps, op.scale);
    float* k = row + (op.num_heads + head) * dim;
    const float* v = row + (op.num_heads + op.num_kv_heads + head) * dim;
    const int position = step.positions[token];
    if (step.write_starts && position < step.write_starts[sequence]) return;
    kernels_->rotate(k, dim, op.rotary_dim, cos_sin, op.k_norm, op.eps, 1.f);
    const ptrdiff_t block = step.block_tables[size_t(sequence) * step.block_table_stride + position / kBlock];
    const ptrdiff_t at = block * op.num_kv_heads + head;
    kernels_->write_kv(k, v, dim, position % kBlock, step.cache_format,
                       static_cast<char*>(step.k_cache[op.layer]) + at * key_bytes(dim, step.cache_format),
                       static_cast<char*>(step.v_cache[op.layer]) + at * value_bytes(dim, step.cache_format));
  }

  // One item: up to kMaxQueries (token, query head) pairs of one sequence that read the same key-value head.
  static int num_items(const Op& op, const Step& step, int sequence) {
    const int pairs = (step.query_starts[sequence + 1] - step.query_starts[sequence]) * (op.num_heads / op.num_kv_heads);
    return (pairs + kMaxQueries - 1) / kMaxQueries * op.num_kv_heads;
  }

  // Order sequences, longest first, and choose the attentions whose items are split; return the spans of the longest.
  int plan_attention(const Step& step) {
    is_decode_ = step.num_tokens == step.num_sequences;
    const auto longest_first = [](const Step& step, std::vector<int>& order) {
      order.resize(step.num_sequences);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return step.context_lens[a] > step.context_lens[b]; });
    };
    longest_first(step, order_);
    if (step.num_forks) longest_first(forked_, fork_order_);
    const int longest = order_.empty() ? 0 : step.context_lens[order_[0]], spans = num_spans(longest);
    for (size_t i = 0; i < ops_.size(); ++i) {
      const Op& op = ops_[i];
      const Step& now = int(i) < fork_op_ ? step : forked_;
      is_split_[i] = 0;
      if (op.kind != kAttention) continue;
      for (Scratch& s : scratch_) grow(s.attention, attention_scratch(op.head_dim, spans));
      if (spans < 2 || pool_->size() == 1) continue;
      size_t work = 0, parts = 0;
      for (int b = 0; b < now.num_sequences; ++b) {
        const size_t items = num_items(op, now, b);
        work += items * now.context_lens[b];
        parts += items * num_spans(now.context_lens[b]);
      }
      // Whole items of the longest sequence would leave threads waiting for the last of them.
      is_split_[i] = 2 * size_t(pool_->size()) * longest > work;
      if (!is_split_[i]) continue;
      grow(partials_, parts * span_floats(op.head_dim));
      if (arrived_.size() < parts) arrived_ = std::vector<std::atomic<int>>(parts);
    }
    return spans;
  }

  void attention(const Op& op, const Step& step, int thread, std::atomic<int>& counter, bool is_split) {
    const int heads = op.num_kv_heads, group = op.num_heads / heads;
    const int* starts = step.query_starts;
    const bool is_forked = &step == &forked_;
    const std::vector<int>& order = is_forked ? fork_order_ : order_;
    // With one token each and one item a head, whoever takes the item also writes the head: no barrier.
    const bool is_fused = is_decode_ && !is_forked && group <= kMaxQueries && !is_split;
    if (!is_fused) {
      int sequence = 0;
      for (int i = thread; i < step.num_tokens * heads; i += pool_->size()) {
        while (i / heads >= starts[sequence + 1]) ++sequence;
        write_head(op, step, i / heads, sequence, i % heads);
      }
      pool_->barrier.wait();
    }
    const auto parts_of = [&](int sequence) { return is_split ? num_spans(step.context_lens[sequence]) : 1; };
    const auto count_of = [&](int sequence) { return num_items(op, step, sequence) * parts_of(sequence); };
    int next = 0, before = 0;
    for (;;) {
      const int task = counter.fetch_add(1, std::memory_order_relaxed);
      while (next < step.num_sequences && task - before >= count_of(order[next])) before += count_of(order[next++]);
      if (next == step.num_sequences) break;
      const int sequence = order[next], parts = parts_of(sequence), item = (task - before) / parts, head = item % heads;
      // The last pairs see most, so they come first.
      const int first = (num_items(op, step, sequence) / heads - 1 - item / heads) * kMaxQueries;
      if (is_fused) write_head(op, step, starts[sequence], sequence, head);
      const AttentionItem work = make_item(op, step, thread, sequence, head, first);
      if (is_split)
        attend_part(work, before + item * parts, (task - before) % parts, parts);
      else
        kernels_->attend(work);
    }
    pool_->barrier.wait();
  }

  // Attend one span of an item whose parts lie at `at`; whoever does the last one merges them.
  void attend_part(const AttentionItem& item, int at, int span, int parts) {
    float* partials = partials_.data() + at * span_floats(item.head_dim);
    if (span < num_spans(longest_limit(item)))
      kernels_->attend_span(item, span, partials + size_t(span) * item.count * (item.head_dim + 2));
    if (arrived_[at].fetch_add(1, std::memory_order_acq_rel) + 1 < parts) return;
    arrived_[at].store(0, std::memory_order_relaxed);
    kernels_->merge_spans(item, partials);
  }

  AttentionItem make_item(const Op& op, const Step& step, int thread, int sequence, int head, int first) {
    const int group = op.num_heads / op.num_kv_heads, dim = op.head_dim;
    const ptrdiff_t keys = key_bytes(dim, step.cache_format), values = value_bytes(dim, step.cache_format);
    AttentionItem item;
    item.count = std::min(kMaxQueries, (step.query_starts[sequence + 1] - step.query_starts[sequence]) * group - first);
    item.head_dim = dim;
    item.blocks = step.block_tables + size_t(sequence) * step.block_table_stride;
    item.key_stride = op.num_kv_heads * keys;
    item.value_stride = op.num_kv_heads * values;
    item.k_cache = static_cast<char*>(step.k_cache[op.layer]) + head * keys;
    item.v_cache = static_cast<char*>(step.v_cache[op.layer]) + head * values;
    item.cache_format = step.cache_format;
    item.scratch = scratch_[thread].attention.data();
    for (int i = 0; i < item.count; ++i) {
      const int token = step.query_starts[sequence] + (first + i) / group;
      const int query = head * group + (first + i) % group;
      item.query[i] = buffers_[op.src].data() + size_t(token) * widths_[op.src] + query * dim;
      item.out[i] = buffers_[op.dst].data() + size_t(token) * widths_[op.dst] + query * dim;
      item.limit[i] = step.positions[token] + 1;
    }
    return item;
  }

  const std::vector<Op> ops_;
  const std::vector<int> widths_;
  std::vector<std::vector<float>> buffers_;
  Pool* pool_;
  const Kernels* kernels_;
  SideRunner sides_;
  std::vector<std::atomic<int>> counters_, arrived_;  // of an operation, of an item's spans
  std::vector<char> is_split_;                        // of an attention's items
  std::vector<int> order_, fork_order_;               // of the sequences
  Step forked_ = {};                                  // the step with its forks as tokens
  int fork_op_ = 0;                                   // from which on it is run
  std::vector<int32_t> positions_, starts_, lens_, tables_, writes_, fork_of_;  // what it points to; the fork of each output
  std::vector<float> thin_;                           // (forks, kForkPieces, thin_stride_)
  size_t thin_stride_ = 0;
  std::vector<Scratch> scratch_;
  std::vector<int16_t> codes_;
  std::vector<RowGroup> row_groups_;
  std::vector<float> scales_, values_, cos_sin_, partials_;
  int max_inputs_ = 64, rotary_dim_ = 0;
  bool is_decode_ = false;
};

}  // namespace
}  // namespace proa

extern "C" {

// The layout that structs.py mirrors: of the structures of its STRUCTURES, size and offset of the last field; 0 after them.
int proa_layout(int i) {
  using namespace proa;
  static const int layout[] = {
      sizeof(Piece),     offsetof(Piece, reserved),    sizeof(Op),   offsetof(Op, input_kind),   sizeof(Side), offsetof(Side, rotary_scale),
      sizeof(SideEntry), offsetof(SideEntry, v_cache), sizeof(Delta), offsetof(Delta, reserved), sizeof(Fork), offsetof(Fork, max_rank),
      sizeof(Step), offsetof(Step, num_forks),
  };
  return i < int(sizeof(layout) / sizeof(int)) ? layout[i] : 0;
}

// Digest of the sources that this was built of; setup.py defines it.
const char* proa_sources() { return PROA_SOURCES; }

const char* proa_kernels_name(const char* wanted) {
  const proa::Kernels* kernels = proa::find_kernels(wanted);
  return kernels ? kernels->name : "";
}

void* proa_pool_create(int threads) { return new proa::Pool(threads); }
void proa_pool_destroy(void* pool) { delete static_cast<proa::Pool*>(pool); }

void* proa_program_create(const proa::Op* ops, int num_ops, const int32_t* widths, int num_buffers, void* pool,
                          const char* kernels) {
  return new proa::Program(ops, num_ops, widths, num_buffers, static_cast<proa::Pool*>(pool), proa::find_kernels(kernels));
}
void proa_program_destroy(void* program) { delete static_cast<proa::Program*>(program); }
void proa_program_run(void* program, const proa::Step* step) { static_cast<proa::Program*>(program)->run(*step); }

// Repack 4-bit codes, two in a byte of `packed`, row after row, and scales (outputs, groups) into panels.
void proa_pack_codes4(const uint8_t* packed, const float* scales, int outputs, int inputs, int group, uint8_t* out) {
  const int groups = inputs / group, panels = (outputs + 15) / 16;
  for (int p = 0; p < panels; ++p) {
    for (int g = 0; g < groups; ++g) {
      for (int pair = 0; pair < group / 2; pair += 2, out += 32) {
        for (int o = 0; o < 16; ++o) {
          const int64_t row = int64_t(p) * 16 + o;
          // Where a pair of this output goes in 32 bytes, so that unpacking interleaves them in order.
          const int at = (o / 4 % 2) * 16 + (o / 8) * 8 + (o % 4) * 2;
          for (int k = 0; k < 2; ++k) {
            uint8_t low = 0, high = 0;
            if (row < outputs) {
              const int64_t first = row * inputs + g * group + pair * 2 + k, second = first + 2;
              low = first % 2 ? packed[first / 2] & 15 : packed[first / 2] >> 4;
              high = second % 2 ? packed[second / 2] & 15 : packed[second / 2] >> 4;
            }
            out[at + k] = uint8_t(low | high << 4);
          }
        }
      }
      float* target = reinterpret_cast<float*>(out);
      for (int o = 0; o < 16; ++o) {
        const int64_t row = int64_t(p) * 16 + o;
        target[o] = row < outputs ? scales[row * groups + g] : 0.f;
      }
      out += 64;
    }
  }
}

}  // extern "C"
