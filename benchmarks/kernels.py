"""Time the kernels of one decoder layer: ours, plain torch's and bitsandbytes'.

    python -m benchmarks.kernels

Weights are random, in the shapes of a model's layer. Each operation is repeated over as many
copies of its weights as a model has layers, so that they come from memory as they do in a model.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.report import RESULTS, describe_run, finish, warn_if_busy
from models.batch import PackedBatch
from models.decoder import Executor
from models.kernels.native.executor import NativeExecutor, is_native_available
from models.kernels.reference.executor import ReferenceExecutor
from models.program import LOGITS, AttentionOp, EmbedOp, LinearOp, Op, Piece, Program
from models.quantization import quantize_4bit
from models.spec import DecoderSpec, LayerSpec
from models.weights import Matrix, Quantized4Bit, Quantized8Bit, dense, quantize_8bit
from serve.machine import count_processors

BLOCK_SIZE = 16
MIN_REPEATS = 5
MIN_SECONDS = 0.3
# What expands a matrix at every call takes so long that caches do not matter.
SLOW_COPIES = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Shapes:
    """Widths of a layer; the defaults are SmolLM2-135M's.

    Attributes:
        copies: layers that the model has.
    """

    hidden_size: int = 576
    intermediate_size: int = 1536
    num_heads: int = 9
    num_kv_heads: int = 3
    head_dim: int = 64
    vocab_size: int = 49152
    copies: int = 30

    def linears(self) -> dict[str, tuple[int, int]]:
        """Give (out_features, in_features) of each linear."""
        hidden, middle = self.hidden_size, self.intermediate_size
        queries = self.num_heads * self.head_dim
        return {
            "qkv": (queries + 2 * self.num_kv_heads * self.head_dim, hidden),
            "o": (hidden, queries),
            "gate, up": (2 * middle, hidden),
            "down": (hidden, middle),
            "head (int8)": (self.vocab_size, hidden),
        }

    def spec(self) -> DecoderSpec:
        """Describe the layers, for the KV cache's sake."""
        layer = LayerSpec(
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            intermediate_size=self.intermediate_size,
        )
        return DecoderSpec(
            family="llama",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_position_embeddings=8192,
            layers=(layer,) * self.copies,
            norm="rms",
            norm_eps=1e-5,
            activation="silu",
            gated_mlp=True,
        )


def copy_matrix(weight: Matrix) -> Matrix:
    """Give the same matrix in memory of its own."""
    if isinstance(weight, Quantized4Bit):
        return replace(weight, packed=weight.packed.clone(), absmax=weight.absmax.clone())
    if isinstance(weight, Quantized8Bit):
        return replace(weight, codes=weight.codes.clone(), scales=weight.scales.clone())
    return weight.clone()


def make_program(ops: Sequence[Op], widths: dict[str, int], shapes: Shapes, rows: int) -> Program:
    """Wrap operations on buffer "x": random rows in, one small logits row out."""
    width = widths["x"]
    ending = Piece(weight=torch.zeros(16, width), bias=None, offset=0)
    last = LinearOp(
        src="x", dst=LOGITS, prologue=None, in_features=width, pieces=(ending,), selects_rows=True
    )
    table = torch.randn(rows, width)
    first = EmbedOp(dst="x", table=table, positions_table=None, positions_offset=0)
    return Program(
        ops=(first, *ops, last),
        widths=widths,
        inv_freq=torch.rand(shapes.head_dim // 2),
        rotary_scale=1.0,
        num_layers=shapes.copies,
        vocab_size=16,
    )


def linear_program(weights: Sequence[Matrix], shapes: Shapes, rows: int) -> Program:
    """Multiply the same rows with each of the matrices."""
    out_features, in_features = weights[0].shape
    ops = [
        LinearOp(
            src="x",
            dst="y",
            prologue=None,
            in_features=in_features,
            pieces=(Piece(weight=weight, bias=None, offset=0),),
        )
        for weight in weights
    ]
    return make_program(ops, {"x": in_features, "y": out_features}, shapes, rows)


def attention_program(shapes: Shapes, rows: int) -> Program:
    """Attend in every layer from the same rows."""
    width = (shapes.num_heads + 2 * shapes.num_kv_heads) * shapes.head_dim
    ops = [
        AttentionOp(
            src="x",
            dst="y",
            layer=layer,
            num_heads=shapes.num_heads,
            num_kv_heads=shapes.num_kv_heads,
            head_dim=shapes.head_dim,
            rotary_dim=shapes.head_dim,
            q_norm=None,
            k_norm=None,
            eps=1e-5,
            scale=shapes.head_dim**-0.5,
        )
        for layer in range(shapes.copies)
    ]
    widths = {"x": width, "y": shapes.num_heads * shapes.head_dim}
    return make_program(ops, widths, shapes, rows)


def decode_batch(rows: int, context: int) -> PackedBatch:
    """Give a step in which each of `rows` sequences decodes the last of `context` tokens."""
    blocks = -(-context // BLOCK_SIZE)
    return PackedBatch(
        token_ids=torch.arange(rows, dtype=torch.int32),
        positions=torch.full((rows,), context - 1, dtype=torch.int32),
        query_starts=torch.arange(rows + 1, dtype=torch.int32),
        context_lens=torch.full((rows,), context, dtype=torch.int32),
        block_tables=torch.arange(rows * blocks, dtype=torch.int32).view(rows, blocks),
        output_rows=torch.zeros(1, dtype=torch.int32),
    )


def prefill_batch(rows: int) -> PackedBatch:
    """Give a step in which one sequence of `rows` tokens is prefilled."""
    blocks = -(-rows // BLOCK_SIZE)
    return PackedBatch(
        token_ids=torch.arange(rows, dtype=torch.int32),
        positions=torch.arange(rows, dtype=torch.int32),
        query_starts=torch.tensor([0, rows], dtype=torch.int32),
        context_lens=torch.tensor([rows], dtype=torch.int32),
        block_tables=torch.arange(blocks, dtype=torch.int32).view(1, blocks),
        output_rows=torch.zeros(1, dtype=torch.int32),
    )


def time_us(call: Callable[[], object], copies: int) -> float:
    """Give the median microseconds of one of the `copies` operations that a call runs."""
    call()
    times: list[float] = []
    while len(times) < MIN_REPEATS or sum(times) < MIN_SECONDS:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return median(times) / copies * 1e6


def time_executor(executor: Executor, batch: PackedBatch, shapes: Shapes, copies: int) -> float:
    """Time a program on an executor, with a cache that holds the batch."""
    blocks = int(batch.block_tables.max()) + 1
    dtype = torch.float32 if executor.name == "reference" else torch.float16
    cache = executor.make_cache(shapes.spec(), blocks, BLOCK_SIZE, dtype)
    return time_us(lambda: executor.forward(batch, cache), copies)


def time_torch(weights: Sequence[Matrix], x: Tensor) -> float:
    """Time torch's float32 product with matrices that were expanded beforehand."""
    expanded = [dense(weight) for weight in weights]
    return time_us(lambda: [torch.nn.functional.linear(x, w) for w in expanded], len(weights))


def time_bitsandbytes(weights: Sequence[Matrix], x: Tensor) -> float | None:
    """Time bitsandbytes' 4-bit linear on the CPU, the better of bfloat16 and float32.

    Returns:
        Microseconds, or None for a matrix that is not in 4 bits.
    """
    if not isinstance(weights[0], Quantized4Bit):
        return None
    return min(_time_linear4bit(weights, x.to(dtype)) for dtype in (torch.bfloat16, torch.float32))


def _time_linear4bit(weights: Sequence[Matrix], x: Tensor) -> float:
    import bitsandbytes  # slow to import, and only a peer here

    linears = []
    for weight in weights:
        out_features, in_features = weight.shape
        linear = bitsandbytes.nn.Linear4bit(
            in_features, out_features, bias=False, compute_dtype=x.dtype, quant_type="nf4"
        )
        linear.weight = bitsandbytes.nn.Params4bit(
            dense(weight).to(x.dtype), requires_grad=False, quant_type="nf4"
        )
        linears.append(linear.to("cpu").eval())
    return time_us(lambda: [linear(x) for linear in linears], len(linears))


def measure_linears(
    shapes: Shapes, rows: Sequence[int], threads: int
) -> dict[str, dict[str, float | None]]:
    """Time every linear for every number of rows."""
    figures: dict[str, dict[str, float | None]] = {}
    for name, (out_features, in_features) in shapes.linears().items():
        is_head = name.startswith("head")
        matrix = torch.randn(out_features, in_features)
        made = quantize_8bit(matrix) if is_head else quantize_4bit(matrix)
        # A few heads are already more than any cache holds.
        weights = [copy_matrix(made) for _ in range(3 if is_head else shapes.copies)]
        for num_rows in rows:
            x = torch.randn(num_rows, in_features)
            program = linear_program(weights, shapes, num_rows)
            batch = decode_batch(num_rows, 1)
            few = weights[:SLOW_COPIES]
            slow = ReferenceExecutor(linear_program(few, shapes, num_rows))
            figures[f"{name}, {num_rows} rows"] = {
                "native": _time_native(program, batch, shapes, len(weights), threads),
                "reference": time_executor(slow, batch, shapes, len(few)),
                "torch float32": time_torch(weights, x),
                "bitsandbytes": time_bitsandbytes(few, x),
            }
    return figures


def measure_attention(
    shapes: Shapes, rows: Sequence[int], context: int, threads: int
) -> dict[str, dict[str, float | None]]:
    """Time attention of decoding rows, and of one prompt."""
    batches = {f"attention, {num} rows over {context}": decode_batch(num, context) for num in rows}
    batches[f"attention, prompt of {context}"] = prefill_batch(context)
    figures: dict[str, dict[str, float | None]] = {}
    for name, batch in batches.items():
        program = attention_program(shapes, len(batch.token_ids))
        figures[name] = {
            "native": _time_native(program, batch, shapes, shapes.copies, threads),
            "reference": time_executor(ReferenceExecutor(program), batch, shapes, shapes.copies),
        }
    return figures


def _time_native(
    program: Program, batch: PackedBatch, shapes: Shapes, copies: int, threads: int
) -> float | None:
    if not is_native_available("auto"):
        return None
    executor = NativeExecutor(program, num_threads=threads)
    return time_executor(executor, batch, shapes, copies)


def figure_table(figures: dict[str, dict[str, float | None]]) -> str:
    """Lay out microseconds per operation, one operation a line."""
    names = ("native", "reference", "torch float32", "bitsandbytes")
    width = max(map(len, figures))
    lines = [f"{'microseconds':<{width}}" + "".join(f"  {name:>14}" for name in names)]
    for operation, times in figures.items():
        cells = ["-" if (us := times.get(name)) is None else f"{us:.1f}" for name in names]
        lines.append(f"{operation:<{width}}" + "".join(f"  {cell:>14}" for cell in cells))
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the measurements.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="1,8,32,256", help="[default: %(default)s]")
    parser.add_argument("--context", type=int, default=256, help="[default: %(default)s]")
    parser.add_argument(
        "--copies", type=int, default=Shapes().copies, help="[default: %(default)s]"
    )
    parser.add_argument(
        "--threads", type=int, default=count_processors(), help="[default: %(default)s]"
    )
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="[default: %(default)s]")
    options = parser.parse_args(arguments)
    warn_if_busy()
    content = describe_run()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = [int(part) for part in options.rows.split(",")]
    shapes = Shapes(copies=options.copies)
    with torch.inference_mode():
        figures = measure_linears(shapes, rows, options.threads)
        decoding = [num for num in rows if num <= 64]
        figures |= measure_attention(shapes, decoding, options.context, options.threads)
    print(figure_table(figures))
    content |= {
        "config": {
            "rows": rows,
            "context": options.context,
            "copies": options.copies,
            "threads": options.threads,
        },
        "microseconds": {
            name: {peer: us and round(us, 2) for peer, us in times.items()}
            for name, times in figures.items()
        },
    }
    finish("kernels", content, options.output_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
