"""Send or collect the answer to a generation; shared by all endpoints that generate."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from serve.api.chunks import DONE, ChunkWriter, Details
from serve.api.context import run_work
from serve.api.errors import encode_json
from serve.api.generation import Generation, Piece
from serve.api.schema import StreamOptions

_NO_DETAILS = Details()


async def stream_answer(
    generation: Generation,
    writer: ChunkWriter,
    *,
    num_choices: int,
    opening: Callable[[int, str | None], str],
    describe: Callable[[Piece], Details] | None,
    options: StreamOptions | None,
    usage: Callable[[], dict[str, object]] | None = None,
    prepare: Callable[[list[Piece]], Awaitable[None]] | None = None,
    on_end: Callable[[], Awaitable[None]] | None = None,
) -> AsyncGenerator[bytes, None]:
    """Yield the events of a streamed answer, one item for each step.

    Args:
        generation: gives the pieces.
        writer: writes the chunks.
        num_choices: how many answers there are.
        opening: writes what comes before a choice's first text, given its index and the usage.
        describe: gives log probabilities and trace of a piece, if the client asked for any.
        options: which usage to send.
        usage: gives it; None is the usage of the generation.
        prepare: awaited before a step's pieces are written.
        on_end: awaited when all choices have ended, before the client is told.
    """
    count = usage or generation.usage
    with_usage = options is not None and bool(options.include_usage)
    is_continuous = options is not None and with_usage and bool(options.continuous_usage_stats)
    is_open = [False] * num_choices
    async with aclosing(generation.steps()) as steps:
        async for pieces in steps:
            so_far = writer.usage_field(count()) if is_continuous else None
            if prepare is not None:
                await prepare(pieces)
            events = []
            for piece in pieces:
                index = piece.choice
                if not is_open[index]:
                    is_open[index] = True
                    events.append(opening(index, so_far))
                details = None
                if describe is not None and piece.output.token_id is not None:
                    details = describe(piece)
                if piece.text and details is None:
                    events.append(writer.text(index, piece.text, so_far))
                elif piece.text or (details is not None and piece.finish_reason is None):
                    assert details is not None
                    events.append(writer.detailed(index, piece.text, details, so_far))
                    details = None
                if piece.finish_reason is not None:
                    end = details or _NO_DETAILS
                    events.append(writer.finish(index, piece.finish_reason, end, so_far))
            data = "".join(events)
            if data:
                yield data.encode()
    if on_end is not None:
        await on_end()
    if with_usage:
        yield writer.usage_only(count()).encode() + DONE
    else:
        yield DONE


class Answer:
    """A whole choice.

    Attributes:
        text: all of its text.
        pieces: its tokens.
        finish_reason: why it ended.
    """

    def __init__(self) -> None:
        self.text = ""
        self.pieces: list[Piece] = []
        self.finish_reason: str | None = None


async def collect_answers(generation: Generation, num_choices: int) -> list[Answer]:
    """Return the choices when all have ended."""
    answers = [Answer() for _ in range(num_choices)]
    texts: list[list[str]] = [[] for _ in answers]
    async with aclosing(generation.steps()) as steps:
        async for pieces in steps:
            for piece in pieces:
                answer = answers[piece.choice]
                texts[piece.choice].append(piece.text)
                if piece.output.token_id is not None:
                    answer.pieces.append(piece)
                answer.finish_reason = piece.finish_reason
    for answer, parts in zip(answers, texts, strict=True):
        answer.text = "".join(parts)
    return answers


async def encode_whole(
    head: dict[str, object],
    field: str,
    make: Callable[[int, Answer], dict[str, object]],
    answers: Sequence[Answer],
    usage: dict[str, object],
    *,
    num_values: int,
) -> bytes:
    """Return the JSON of a whole answer, made in a thread where it would hold up other requests.

    Args:
        head: fields before the choices.
        field: name of the list of choices.
        make: writes a choice, given its index and what was generated.
        answers: of all choices.
        usage: the last field.
        num_values: log probabilities, trace entries and the like, about.
    """

    def encode() -> bytes:
        # Choice by choice: a single call would not let other threads run.
        choices = b",".join(encode_json(make(i, answer)) for i, answer in enumerate(answers))
        start, end = encode_json(head)[:-1], encode_json({"usage": usage})[1:]
        return b'%s,"%s":[%s],%s' % (start, field.encode(), choices, end)

    return await run_work(encode, size=num_values)


def count_tokens(answers: Sequence[Answer]) -> int:
    """Return how many tokens answers have."""
    return sum(len(answer.pieces) for answer in answers)
