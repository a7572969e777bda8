"""POST /tokenize and /detokenize, with the bodies of vLLM and of llama.cpp."""

from functools import partial

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from serve.api.body import read_request
from serve.api.context import ApiContext, run_work
from serve.api.errors import ApiError, encode_json
from serve.api.logprobs import name_token
from serve.api.prompts import decode_tokens, encode_chat, encode_text
from serve.api.resolve import split_model
from serve.api.schema import DetokenizeBody, TokenizeBody

# Which of prompt, content and messages an option goes with.
_OWNERS_OF = {
    "add_special_tokens": ("prompt", "messages"),
    "add_special": ("content",),
    "parse_special": ("content",),
    "with_pieces": ("content",),
    "add_generation_prompt": ("messages",),
}


def build_tokenization_router(context: ApiContext) -> APIRouter:
    """Return the routes that show the tokenizer."""
    router = APIRouter()

    @router.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_request(request, TokenizeBody, context.settings)
        split_model(body.model, context)
        token_ids = await _tokenize(context, body)
        work = partial(_describe_tokens, context, body, token_ids)
        answer = await run_work(work, size=len(token_ids))
        return Response(answer, media_type="application/json")

    @router.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_request(request, DetokenizeBody, context.settings)
        split_model(body.model, context)
        if body.tokens is None:
            raise ApiError("tokens must be a list.", param="tokens", code="invalid_type")
        text = await decode_tokens(context, body.tokens, param="tokens")
        answer = encode_json({"prompt": text, "content": text})
        return Response(answer, media_type="application/json")

    return router


async def _tokenize(context: ApiContext, body: TokenizeBody) -> list[int]:
    given = [name for name in ("prompt", "content", "messages") if getattr(body, name) is not None]
    if len(given) != 1:
        raise ApiError(
            "Give exactly one of prompt, content and messages.",
            param=given[1] if given else "prompt",
            code="invalid_value",
        )
    for option, owners in _OWNERS_OF.items():
        if getattr(body, option) is not None and given[0] not in owners:
            needed = " or ".join(owners)
            raise ApiError(f"{option} needs {needed}.", param=option, code="invalid_value")
    if body.messages is not None:
        return await encode_chat(
            context,
            body.messages,
            add_special_tokens=body.add_special_tokens,
            add_generation_prompt=body.add_generation_prompt,
        )
    if body.prompt is not None:
        text, allow, add = body.prompt, True, body.add_special_tokens is not False
    else:
        assert body.content is not None
        text, allow, add = body.content, body.parse_special is not False, bool(body.add_special)
    return await encode_text(
        context, text, allow_special=allow, add_special_tokens=add, param=given[0]
    )


def _describe_tokens(context: ApiContext, body: TokenizeBody, token_ids: list[int]) -> bytes:
    names = None
    if body.return_token_strs or body.with_pieces:
        names = [name_token(context.tokenizer, token_id) for token_id in token_ids]
    tokens: list[object] = list(token_ids)
    if names is not None and body.with_pieces:
        tokens = [{"id": i, "piece": name} for i, name in zip(token_ids, names, strict=True)]
    return encode_json(
        {
            "count": len(token_ids),
            "max_model_len": context.backend.max_context_tokens,
            "tokens": tokens,
            "token_strs": names if body.return_token_strs else None,
        }
    )
