"""Shapes of the answers, for the published schema only: what is sent is written by hand."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from serve.experiments.comparison import BOTH_BAD, TIE


class AnswerModel(BaseModel):
    """Base of all answers: no fields beside those that are named."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(AnswerModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None = Field(description="The field at fault, as the client spelt it.")
    code: str | None = Field(description="A short name that a program can compare with.")


class Error(AnswerModel):
    """Every error, also as the last event of a stream that fails."""

    error: ErrorDetail


class PromptTokensDetails(AnswerModel):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(AnswerModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Candidate(AnswerModel):
    """A token that was tried."""

    token: str
    token_id: int
    score: float = Field(
        description="Mean log probability of the token and of what was looked at after it."
    )


class TraceEntry(AnswerModel):
    """A generated token in a decoding trace."""

    token: str
    token_id: int
    token_class: str = Field(alias="class")
    temperature: float
    entropy: float = Field(description="In nats.")
    logprob: float
    stage: str | None = Field(
        None, description="Where the token stands, with a strategy that has stages."
    )
    candidates: list[Candidate] | None = Field(
        None, description="What was tried before this token was taken, with look_ahead."
    )


FinishReason = Literal["stop", "length"]
Trace = list[TraceEntry]


class TopLogprob(AnswerModel):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A generated token and what else could have come."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(AnswerModel):
    """Log probabilities of a chat's choice."""

    content: list[TokenLogprob]
    refusal: None


class AssistantMessage(AnswerModel):
    """What was answered."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(AnswerModel):
    """One answer of a chat."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    decoding_trace: Trace | None = None


class ChatAnswer(AnswerModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(AnswerModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: None = None


class ChatChunkChoice(AnswerModel):
    """What a chunk adds to an answer of a chat."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    decoding_trace: Trace | None = None


class ChatChunk(AnswerModel):
    """An event of a streamed chat."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class TextLogprobs(AnswerModel):
    """Log probabilities of a text's choice; a prompt's first token has none."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class TextChoice(AnswerModel):
    """One completion of a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason
    decoding_trace: Trace | None = None


class TextAnswer(AnswerModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage


class TextChunkChoice(AnswerModel):
    """What a chunk adds to a text."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason | None
    decoding_trace: Trace | None = None


class TextChunk(AnswerModel):
    """An event of a streamed text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | None = None


class ComparedArm(AnswerModel):
    """The answer of one arm: a message, or a text where a prompt was given."""

    index: int
    label: str
    model: str
    message: AssistantMessage | None = None
    text: str | None = None
    finish_reason: FinishReason
    usage: Usage
    decoding_trace: Trace | None = None


class ComparisonAnswer(AnswerModel):
    """Answer of /v1/compare."""

    id: str
    object: Literal["comparison"]
    created: int
    arms: list[ComparedArm]
    usage: Usage


class ComparisonUsage(Usage):
    """Tokens of a comparison, and of each arm alone."""

    arms: list[Usage]


class ComparisonChunk(AnswerModel):
    """An event of a streamed comparison: of one arm, or the usage."""

    id: str
    object: Literal["comparison.chunk"]
    created: int
    arm: int | None = None
    delta: Delta | None = None
    text: str | None = None
    finish_reason: FinishReason | None = None
    decoding_trace: Trace | None = None
    usage: ComparisonUsage | None = None


class PairTally(AnswerModel):
    """Votes on a pair of arms."""

    arms: list[dict[str, Any]]
    wins: list[int]
    ties: int
    both_bad: int
    votes: int
    win_rate: float | None
    interval: list[float] | None
    confidence: float


class VoteAnswer(AnswerModel):
    """Answer of /v1/compare/{id}/vote."""

    id: str
    object: Literal["comparison.vote"]
    created: int
    vote: int | Literal[TIE, BOTH_BAD]  # type: ignore[valid-type]
    label: str | None
    tally: list[PairTally]


class PairTallyList(AnswerModel):
    """All votes."""

    object: Literal["list"]
    data: list[PairTally]


class ExperimentArm(AnswerModel):
    """An arm of an experiment as it is configured."""

    label: str
    model: str
    fields: dict[str, Any]
    weight: float


class ExperimentEntry(AnswerModel):
    """An experiment as it is configured."""

    id: str
    object: Literal["experiment"]
    unit: Literal["user", "conversation", "request", "paired"]
    arms: list[ExperimentArm]


class ExperimentList(AnswerModel):
    """All experiments."""

    object: Literal["list"]
    data: list[ExperimentEntry]


class ExperimentArmReport(ExperimentArm):
    """An arm, and what it was asked."""

    exposures: int
    units: int
    first_token_s: float | None
    seconds: float | None
    completion_tokens: float | None
    failures: int


class OutcomeOfArm(AnswerModel):
    """What clients said of an arm's answers."""

    count: int
    units: int
    mean: float | None


class Difference(AnswerModel):
    """A difference to the first arm; interval and p hold at all times together."""

    value: float
    low: float
    high: float
    p: float
    verdict: Literal["better", "worse", "undecided"]


class DifferencePoint(AnswerModel):
    """A difference at some time."""

    created: float
    value: float
    low: float
    high: float
    p: float


class OutcomeReport(AnswerModel):
    """One kind of outcome: of each arm, of each against the first, and that over time."""

    arms: dict[str, OutcomeOfArm]
    differences: dict[str, Difference | None]
    series: dict[str, list[DifferencePoint]]


class ExperimentReport(AnswerModel):
    """What is known of an experiment."""

    object: Literal["experiment.report"]
    name: str
    unit: Literal["user", "conversation", "request", "paired"]
    arms: list[ExperimentArmReport]
    outcomes: dict[str, OutcomeReport]
    confidence: float


class Classification(AnswerModel):
    """What a text is."""

    index: int
    label: str | None = Field(description="The likeliest class; null for a regression.")
    probs: list[float] = Field(description="Of each class, in the order of labels.")
    score: float | None = Field(description="Of a regression.")
    num_classes: int


class ClassifyAnswer(AnswerModel):
    """Answer of /v1/classify."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    labels: list[str]
    data: list[Classification]
    usage: Usage


class FeedbackAnswer(AnswerModel):
    """What was kept."""

    id: str
    object: Literal["feedback"]
    experiment: str
    arm: str | None


class ModelEntry(AnswerModel):
    """A model id that may be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    x_kind: str = Field(
        description="What the id stands for: base, variant, side_network, classifier, "
        "temperature_head, strategy or experiment."
    )


class ModelList(AnswerModel):
    """All model ids."""

    object: Literal["list"]
    data: list[ModelEntry]


class AdapterEntry(AnswerModel):
    """What is attached to the base."""

    id: str
    object: Literal["adapter"]
    name: str
    method: str
    kind: str = Field(description="side_network, variant or temperature_head.")
    labels: list[str] | None = Field(description="What it tells apart, if it classifies.")
    description: str
    num_parameters: int
    num_bytes: int
    on: str | None
    removed: float | None
    speed: float | None
    is_loaded: bool
    num_running: int
    created: int


class AdapterList(AnswerModel):
    """All that is attached."""

    object: Literal["list"]
    data: list[AdapterEntry]


class AdapterDeleted(AnswerModel):
    """What was detached."""

    id: str
    object: Literal["adapter"]
    deleted: Literal[True]


class StrategyEntry(AnswerModel):
    """A decoding strategy, with a JSON Schema of its parameters."""

    id: str
    object: Literal["decoding_strategy"]
    model: str
    is_default: bool
    parameters: dict[str, Any] = Field(alias="schema")


class StrategyList(AnswerModel):
    """All decoding strategies."""

    object: Literal["list"]
    data: list[StrategyEntry]


class TokenPiece(AnswerModel):
    """A token with its text."""

    id: int
    piece: str


class TokenizeAnswer(AnswerModel):
    """Answer of /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int] | list[TokenPiece]
    token_strs: list[str] | None


class DetokenizeAnswer(AnswerModel):
    """Answer of /detokenize; both fields have the text."""

    prompt: str
    content: str


class Status(AnswerModel):
    """All is well."""

    status: Literal["ok"]


class Version(AnswerModel):
    """The server's version."""

    version: str
