"""Choosing tokens: sampling parameters, temperature strategies, filters and the sampler.

Tensors and token ids in, token ids out. Nothing here knows a tokenizer, a model or a server.
"""

from decoding.draw import derive_seed
from decoding.logprobs import LogitsError, TopLogprobs, token_logprobs
from decoding.options import ParameterError
from decoding.params import SamplingParams
from decoding.row import Row
from decoding.sampler import Sampled, Sampler
from decoding.strategies import STRATEGIES, Strategy, parse_strategy, strategy_schema
from decoding.tables import TOKEN_CLASSES, TokenTables, build_token_tables

__all__ = [
    "STRATEGIES",
    "TOKEN_CLASSES",
    "LogitsError",
    "ParameterError",
    "Row",
    "Sampled",
    "Sampler",
    "SamplingParams",
    "Strategy",
    "TokenTables",
    "TopLogprobs",
    "build_token_tables",
    "derive_seed",
    "parse_strategy",
    "strategy_schema",
    "token_logprobs",
]
