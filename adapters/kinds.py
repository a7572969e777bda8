"""What an adapter can be."""

from typing import Literal

Kind = Literal["variant", "side_network", "temperature_head"]
"""A variant is a decoder of its own, which runs in the base's place; a side network reads the
hidden states of base or variant and changes what comes out of them, or classifies; a temperature
head reads the final one and gives the temperature of the next token."""
