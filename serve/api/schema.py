"""Wire models of the requests.

Unset and null mean the same everywhere. Descriptions, ranges and defaults of sampling parameters
come from `decoding`, which also checks the ranges.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast, Field
from pydantic.config import JsonDict

from decoding import SamplingParams
from decoding.options import options_of, schema_of
from serve.api.values import (
    Content,
    LogitBias,
    MaybeTokenIds,
    Metadata,
    Nothing,
    OnePrompt,
    Prompt,
    Role,
    StopTexts,
    TokenIds,
    VoteValue,
)

# Fields that would change the answer, with the values that ask for nothing. Other values are
# refused by name, whatever `unknown_fields` says.
UNSUPPORTED_FIELDS: dict[str, tuple[object, ...]] = {
    "audio": (None,),
    "best_of": (None,),
    "chat_template": (None,),
    "chat_template_kwargs": (None, {}),
    "documents": (None, []),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "prompt_logprobs": (None,),
    "reasoning_effort": (None,),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "verbosity": (None,),
    "web_search_options": (None,),
}

_OPTIONS = options_of(SamplingParams)
MAX_ARMS = 16
MAX_MESSAGES = 2**14
MAX_LABEL_CHARS = 128
_NAME: JsonDict = {"pattern": "^[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}$"}
_MODEL = "The served id, id:adapter, or either with @strategy."
_SPECIAL = (
    "Add what the tokenizer puts around a text, such as the begin token. Default: true with "
    "prompt; false with messages, where the chat template writes it."
)
_TRACE = "Give each choice a decoding_trace: one entry for each generated token."


def _sampling(name: str) -> Any:
    spec, default = _OPTIONS[name]
    schema = schema_of(spec, default)
    schema.pop("type")
    return Field(None, json_schema_extra=schema)  # type: ignore[arg-type]


class WireModel(BaseModel):
    """Base of all wire models: exact types, finite numbers, no unknown fields."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


class StreamOptions(WireModel):
    """What an event stream carries besides text."""

    include_usage: bool | None = Field(None, description="End with a chunk that has the usage.")
    continuous_usage_stats: bool | None = Field(
        None, description="With include_usage: every chunk has the usage so far."
    )


class SamplingFields(WireModel):
    """How tokens are chosen and when a sequence ends."""

    temperature: float | None = _sampling("temperature")
    top_p: float | None = _sampling("top_p")
    top_k: int | None = _sampling("top_k")
    min_p: float | None = _sampling("min_p")
    typical_p: float | None = _sampling("typical_p")
    presence_penalty: float | None = _sampling("presence_penalty")
    frequency_penalty: float | None = _sampling("frequency_penalty")
    repetition_penalty: float | None = _sampling("repetition_penalty")
    logit_bias: LogitBias = _sampling("logit_bias")
    seed: int | None = _sampling("seed")
    stop: StopTexts = _sampling("stop")
    stop_token_ids: MaybeTokenIds = _sampling("stop_token_ids")
    include_stop_str_in_output: bool | None = _sampling("include_stop_str_in_output")
    ignore_eos: bool | None = _sampling("ignore_eos")
    min_tokens: int | None = _sampling("min_tokens")
    max_tokens: int | None = _sampling("max_tokens")
    decoding: dict[str, Any] | None = Field(
        None, description="A decoding strategy and its parameters; see /v1/decoding_strategies."
    )
    adapter_scale: float | None = Field(
        None,
        description="How much of the model's side network: 0 is what it sits on, exactly. "
        "Default: 1.",
        json_schema_extra={"minimum": 0, "maximum": 1},
    )


class GenerationBody(SamplingFields):
    """Fields that chat and text completions share."""

    model: str | None = Field(None, description=_MODEL + " Default: the base.")
    n: int | None = Field(
        None,
        description="How many answers to each prompt. Default: 1.",
        json_schema_extra={"minimum": 1},
    )
    stream: bool | None = Field(None, description="Send the answer as server-sent events.")
    stream_options: StreamOptions | None = None
    add_special_tokens: bool | None = Field(None, description=_SPECIAL)
    return_decoding_trace: bool | None = Field(None, description=_TRACE)
    user: str | None = Field(None, description="Keeps its arm in an experiment; no other effect.")
    metadata: Metadata = Field(None, description="Accepted, no effect.")
    store: Literal[False] | None = Field(None, description="Accepted; nothing is stored.")
    service_tier: str | None = Field(None, description="Accepted, no effect.")
    safety_identifier: str | None = Field(None, description="Like user, and before it.")
    prompt_cache_key: str | None = Field(None, description="Accepted, no effect.")
    parallel_tool_calls: bool | None = Field(None, description="Accepted, no effect.")


class Message(WireModel):
    """One turn of a conversation. The role `developer` counts as `system`."""

    role: Role
    content: Content
    name: str | None = Field(None, description="Accepted, no effect.")
    refusal: Nothing = None
    annotations: Nothing = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Nothing = None
    reasoning_content: Nothing = None


class ResponseFormat(WireModel):
    """Only plain text."""

    type: Literal["text"]


def _check_number(value: object) -> object:
    if isinstance(value, list) and len(value) > MAX_MESSAGES:
        raise ValueError(f"must be at most {MAX_MESSAGES} messages")
    return value


_NUMBER: JsonDict = {"minItems": 1, "maxItems": MAX_MESSAGES}
Messages = Annotated[
    list[Message], FailFast(), BeforeValidator(_check_number), Field(json_schema_extra=_NUMBER)
]
MaybeMessages = Annotated[
    list[Message] | None,
    FailFast(),
    BeforeValidator(_check_number),
    Field(json_schema_extra=_NUMBER),
]


class ChatBody(GenerationBody):
    """Body of /v1/chat/completions."""

    messages: Messages
    max_completion_tokens: int | None = Field(
        None,
        description="Like max_tokens; the smaller one counts. Default: fill the context.",
        json_schema_extra={"minimum": 1},
    )
    logprobs: bool | None = Field(None, description="Report log probabilities.")
    top_logprobs: int | None = Field(
        None,
        description="Alternatives per token.",
        json_schema_extra={"minimum": 0, "maximum": _OPTIONS["logprobs"][0].maximum},
    )
    response_format: ResponseFormat | None = None


class CompletionBody(GenerationBody):
    """Body of /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(
        None,
        description="Most tokens to generate. Default: 16.",
        json_schema_extra={"minimum": 0},
    )
    suffix: str | None = Field(None, description="Text after the completion, if the model can.")
    echo: bool | None = Field(None, description="Repeat the prompt before the completion.")
    logprobs: int | None = _sampling("logprobs")
    best_of: int | None = Field(None, description="Only the value of n.")


class ComparisonArm(SamplingFields):
    """One arm of a comparison: a model and what differs from the shared fields."""

    model: str = Field(description=_MODEL)
    label: str | None = Field(
        None, max_length=MAX_LABEL_CHARS, description="Name of the arm. Default: its model."
    )


class CompareBody(SamplingFields):
    """Body of /v1/compare: one of messages and prompt; sampling fields hold for every arm."""

    messages: MaybeMessages = None
    prompt: Annotated[OnePrompt | None, Field(description="Text or token ids.")] = None
    arms: Annotated[list[ComparisonArm] | None, FailFast()] = Field(
        None,
        min_length=1,
        max_length=MAX_ARMS,
        description="Their fields win over the shared ones.",
        json_schema_extra={"minItems": 1, "maxItems": MAX_ARMS},
    )
    experiment: str | None = Field(
        None, description="In place of arms: those of a paired experiment of the server."
    )
    add_special_tokens: bool | None = Field(None, description=_SPECIAL)
    common_random_numbers: bool | None = Field(
        None, description="All arms draw with the same seed. Default: true."
    )
    stream: bool | None = Field(None, description="Send the answer as server-sent events.")
    return_decoding_trace: bool | None = Field(None, description=_TRACE)


class ClassifyBody(WireModel):
    """Body of /v1/classify."""

    model: str = Field(description="The id of an adapter that classifies, id:adapter.")
    input: Prompt = Field(description="A text or a list of them, each perhaps as token ids.")
    user: str | None = Field(None, description="Accepted, no effect.")


class VoteBody(WireModel):
    """Body of /v1/compare/{id}/vote."""

    vote: VoteValue = Field(description="The index of the better arm, or one of the words.")


class FeedbackBody(WireModel):
    """Body of /v1/feedback."""

    id: str = Field(description="Of the answer, or of the comparison.")
    rating: float | None = Field(
        None,
        description="Of one answer: 0 is useless, 1 could not be better.",
        json_schema_extra={"minimum": 0, "maximum": 1},
    )
    accepted: bool | None = Field(
        None, description="Of one answer: whether it was taken over, as a completion is."
    )
    preferred: str | None = Field(
        None, description="Of a comparison: the label of the better arm, or tie."
    )


class AdapterBody(WireModel):
    """Body of POST /v1/adapters."""

    name: str = Field(description="The id becomes base:name.", json_schema_extra=_NAME)
    path: str = Field(description="The adapter's folder, below the server's adapter root.")


class LoadAdapterBody(WireModel):
    """Body of /v1/load_lora_adapter: AdapterBody in vLLM's words."""

    lora_name: str = Field(json_schema_extra=_NAME)
    lora_path: str


class UnloadAdapterBody(WireModel):
    """Body of /v1/unload_lora_adapter."""

    lora_name: str


class TokenizeBody(WireModel):
    """Body of /tokenize: one of prompt, content (as in llama.cpp) and messages."""

    model: str | None = None
    prompt: str | None = None
    content: str | None = None
    messages: MaybeMessages = None
    add_special_tokens: bool | None = Field(None, description=_SPECIAL)
    add_special: bool | None = Field(None, description="With content; default false.")
    parse_special: bool | None = Field(None, description="With content; default true.")
    add_generation_prompt: bool | None = Field(None, description="With messages; default true.")
    return_token_strs: bool | None = Field(None, description="Return token_strs as well.")
    with_pieces: bool | None = Field(None, description="With content: tokens as objects.")


class DetokenizeBody(WireModel):
    """Body of /detokenize."""

    model: str | None = None
    tokens: TokenIds
