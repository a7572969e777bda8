"""Forks of a base's last layers, which the vLLM backend refuses by name."""

from pathlib import Path

import pytest

from adapters.format import AdapterError
from adapters.qst.adapter import save_qst
from serve.backends.vllm.settings import find_forms, heads_of
from tests.adapters.side_decoders import make_network, paper_base


def test_fork_is_refused_by_name_and_takes_no_room(tmp_path: Path) -> None:
    spec, _ = paper_base()
    forks = [make_network(spec, side_attention="base", side_layers=2), make_network(spec)]
    for i, network in enumerate(forks):
        save_qst(
            tmp_path / str(i), network, base_id="tiny", base_fingerprint="0" * 64,
            base_quantization="none",
        )  # fmt: skip
    assert find_forms([tmp_path / "0"], spec) == []
    forms = find_forms([tmp_path / "0", tmp_path / "1"], spec)
    assert forms == [heads_of(forks[1].side_network())]
    with pytest.raises(AdapterError, match="side_attention base: .*--backend native"):
        heads_of(forks[0].side_network())
