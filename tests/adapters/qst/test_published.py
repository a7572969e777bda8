"""Checkpoints of the published code: the same numbers through our side networks."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, OPTConfig
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.models.opt.modeling_opt import OPTDecoderLayer

from adapters.format import AdapterError
from adapters.qst.adapter import load_qst
from adapters.qst.convert import convert_published, read_published
from models.kernels.reference.operations import blend_side, run_side
from models.side import build_side_program
from tests.adapters.side_decoders import TOKENS, attend_whole, make_base, whole_batch

WIDE, NARROW, RANK, LAYERS, HEADS = 64, 16, 6, 3, 4
COUNT = len(TOKENS)


class PublishedDownsample(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.adapter_A = nn.Linear(WIDE, RANK, bias=False)
        self.adapter_B = nn.Linear(RANK, NARROW, bias=False)
        self.post_layer_norm = nn.LayerNorm(NARROW)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.post_layer_norm(self.adapter_B(nn.functional.silu(self.adapter_A(x))))
        return out


class Published:
    """The published side network with the layers of transformers, and its files."""

    def __init__(self, kind: str, *, is_classifier: bool = False) -> None:
        torch.manual_seed(4)
        self.kind, self.is_classifier = kind, is_classifier
        shared: dict[str, Any] = {
            "hidden_size": NARROW, "num_attention_heads": HEADS, "attn_implementation": "eager",
        }  # fmt: skip
        if kind == "llama":
            config: Any = LlamaConfig(
                intermediate_size=40, num_key_value_heads=2, rms_norm_eps=1e-5, **shared
            )
            self.layers = nn.ModuleList(LlamaDecoderLayer(config, i) for i in range(LAYERS))
            self.rotary = LlamaRotaryEmbedding(config)
            self.norm: nn.Module = LlamaRMSNorm(NARROW, eps=1e-5)
        else:
            config = OPTConfig(ffn_dim=40, dropout=0.0, word_embed_proj_dim=NARROW, **shared)
            self.layers = nn.ModuleList(OPTDecoderLayer(config, i) for i in range(LAYERS))
            self.norm = nn.LayerNorm(NARROW)
        self.downsample = nn.ModuleList(PublishedDownsample() for _ in range(LAYERS))
        self.z = nn.ParameterList(nn.Parameter(torch.randn(NARROW)) for _ in range(LAYERS))
        self.up = nn.Linear(NARROW, WIDE)
        self.final_z = nn.Parameter(torch.randn(WIDE))
        self.score = nn.Linear(WIDE, 3, bias=False)
        with torch.no_grad():
            for module in (self.layers, self.norm, self.downsample):
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.1)

    def save(self, folder: Path) -> None:
        name = "score_z" if self.is_classifier else "lm_head_z"
        ending = "path" if self.kind == "llama" else "parameters"
        contents: dict[str, object] = {
            "qst_layers_parameters": self.layers.state_dict(),
            "qst_z_parameters": self.z.state_dict(),
            "qst_downsample_parameters": self.downsample.state_dict(),
            "qst_norm_parameters": self.norm.state_dict(),
            "qst_upsample_parameters": self.up.state_dict(),
            f"{name}_{ending}": self.final_z,
        }
        if self.is_classifier:
            contents["qst_score_parameters"] = self.score.state_dict()
        for stem, content in contents.items():
            torch.save(content, folder / f"{stem}.pt")

    @torch.no_grad()
    def forward(self, hidden: list[Tensor], normed: Tensor) -> Tensor:
        mask = torch.full((1, 1, COUNT, COUNT), float("-inf")).triu(1)
        more: dict[str, Any] = {"attention_mask": mask}
        if self.kind == "llama":
            positions = torch.arange(COUNT)[None]
            more["position_embeddings"] = self.rotary(hidden[0][None], positions)
        stream = self.downsample[0](hidden[0])
        for i in range(LAYERS):
            z = self.z[i].sigmoid()
            mixed = (1 - z) * self.downsample[i](hidden[i + 1]) + z * stream
            out = self.layers[i](mixed[None], **more)
            stream = (out[0] if isinstance(out, tuple) else out).view(COUNT, NARROW)
        up, z = self.up(self.norm(stream)), self.final_z.sigmoid()
        if self.kind == "opt":
            return z * up + (1 - z) * normed
        return (1 - z) * up + z * normed


@pytest.mark.parametrize("is_classifier", [False, True], ids=["causal_lm", "classifier"])
@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_converted_adapter_computes_what_the_published_code_does(
    tmp_path: Path, kind: str, is_classifier: bool
) -> None:
    base, _ = make_base(kind)
    if kind == "opt":  # it has as many key heads as query heads
        layers = [dataclasses.replace(layer, num_key_value_heads=HEADS) for layer in base.layers]
        base = dataclasses.replace(base, layers=tuple(layers))
    published = Published(kind, is_classifier=is_classifier)
    published.save(tmp_path)
    convert_published(
        tmp_path, tmp_path / "adapter", base, base_id="b", base_fingerprint="f",
        base_quantization="nf4",
    )  # fmt: skip
    adapter = load_qst(tmp_path / "adapter", base, fingerprint="f", model_id="b")
    generator = torch.Generator().manual_seed(1)
    hidden = [torch.randn(COUNT, WIDE, generator=generator) for _ in range(LAYERS + 1)]
    normed = torch.randn(COUNT, WIDE, generator=generator)
    program, batch = build_side_program(adapter.network, base), whole_batch([TOKENS])
    side = run_side(program, hidden, batch.positions.long(), attend=attend_whole(batch))
    ours = blend_side(program, normed, side)
    torch.testing.assert_close(ours, published.forward(hidden, normed), rtol=0, atol=2e-5)
    assert adapter.qst.num_labels == 3 * is_classifier


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_file_with_code_in_it_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Published("llama").save(tmp_path)
    torch.save({"0": Evil()}, tmp_path / "qst_z_parameters.pt")
    with pytest.raises(AdapterError, match="qst_z_parameters.pt: .* could run code: refused"):
        read_published(tmp_path, make_base("llama")[0])
    assert not (tmp_path / "ran").exists()


def remove_norm(folder: Path) -> None:
    (folder / "qst_norm_parameters.pt").unlink()


def damage(folder: Path) -> None:
    (folder / "qst_norm_parameters.pt").write_bytes(b"PK\x03\x04 nothing")


def put_list(folder: Path) -> None:
    torch.save([torch.zeros(2)], folder / "qst_norm_parameters.pt")


def skip_gate(folder: Path) -> None:
    torch.save({"0": torch.zeros(16), "2": torch.zeros(16)}, folder / "qst_z_parameters.pt")


def add_norm_before(folder: Path) -> None:
    path = folder / "qst_downsample_parameters.pt"
    content = torch.load(path, weights_only=True)
    torch.save({**content, "0.pre_layer_norm.weight": torch.ones(64)}, path)


def drop_layer(folder: Path) -> None:
    path = folder / "qst_layers_parameters.pt"
    content = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in content.items() if not k.startswith("2.")}, path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_norm, "qst_norm_parameters.pt is missing"),
        (damage, "qst_norm_parameters.pt: damaged"),
        (put_list, "must hold tensors by name, got list"),
        (skip_gate, "a tensor is missing or misshapen"),
        (add_norm_before, "downsamples.0.pre_layer_norm.weight: not a tensor of this side"),
        (drop_layer, "layers.2.attn_norm.weight: missing; .*layers.2.down.weight: missing"),
    ],
)
def test_checkpoint_that_is_not_whole_is_refused(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    Published("llama").save(tmp_path)
    change(tmp_path)
    with pytest.raises(AdapterError, match=message):
        read_published(tmp_path, make_base("llama")[0])


def test_other_families_were_never_published(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="has Llama and OPT only, not neox"):
        read_published(tmp_path, make_base("neox")[0])
