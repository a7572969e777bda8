"""What an adapter can be."""

from typing import Literal

Kind = Literal["variant", "side_network"]
"""A variant is a decoder of its own, which runs in the base's place; a side network reads the
hidden states of base or variant and changes what comes out of them."""
