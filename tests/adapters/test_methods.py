"""The registry of methods, and the order of chains."""

from pathlib import Path
from typing import Any

import pytest

from adapters.format import AdapterConfig, AdapterError, Host, StoredAdapter
from adapters.methods import METHODS, derive_variant, method_of, order_chain


def make_stored(name: str, *chain: str, method: str = "disp") -> StoredAdapter:
    config = AdapterConfig(
        method=method, base_id="tiny", base_fingerprint="ab" * 32, base_quantization="none",
        fields={}, chain=chain,
    )  # fmt: skip
    return StoredAdapter(config=config, tensors={}, digest=name, folder=Path(name))


def given(**adapters: StoredAdapter) -> dict[Path, StoredAdapter]:
    return {Path(name): stored for name, stored in adapters.items()}


def test_methods_say_what_their_adapters_are() -> None:
    assert (METHODS["qst"].kind, METHODS["disp"].kind) == ("side_network", "variant")


def test_unknown_method_is_refused_and_known_ones_are_named() -> None:
    config = make_stored("x", method="lora" + "!" * 200).config
    message = (
        r"must be one of qst \(QST side network\), disp \(pruned variant\), "
        r"mixed_rank \(mixed-rank variant\), temperature \(temperature head\); got 'lora!*'$"
    )
    with pytest.raises(AdapterError, match=message) as error:
        method_of(config)
    assert "!" * 77 not in str(error.value)


def test_chain_is_ordered_whatever_the_order_of_its_folders() -> None:
    adapters = given(c=make_stored("3"), a=make_stored("1"), b=make_stored("2"))
    assert order_chain(("1", "2", "3"), adapters) == [Path("a"), Path("b"), Path("c")]
    assert order_chain((), {}) == []


def test_first_missing_link_is_named() -> None:
    with pytest.raises(
        AdapterError, match="the base with 1, then 2, then 3; give the folder of 2,"
    ):
        order_chain(("1", "2", "3"), given(a=make_stored("1")))


def test_folder_that_is_not_in_the_chain_is_named() -> None:
    with pytest.raises(AdapterError, match="b: is no part of the chain, which is the base with 1$"):
        order_chain(("1",), given(a=make_stored("1"), b=make_stored("2")))


def test_nothing_sits_on_a_side_network() -> None:
    spec: Any = None
    host = Host(spec=spec, fingerprint="f", quantization="none", model_id="tiny")
    with pytest.raises(AdapterError, match="x/y: it is a QST side network; nothing can sit on one"):
        derive_variant(Path("x/y"), make_stored("1", method="qst"), host)
