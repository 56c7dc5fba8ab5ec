"""OpenAI's chat completions and completions: the whole answer, and the chunks of a stream. Called by api.py."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from deploy.generation import Chunk, Usage
from deploy.schemas import SamplingBody

CHAT = "chat.completion"


async def as_answer(events: AsyncIterator, model: str, kind: str, count: int, more: Callable[[], dict]) -> dict:
    """The answer of a request that is not streamed.

    Args:
        events: what a job emits.
        model: its name.
        kind: the object's name.
        count: replies.
        more: what else the answer says, asked after the first output.
    """
    texts, reasons = [""] * count, [None] * count
    async for event in events:
        if isinstance(event, Chunk):
            texts[event.row] += event.text
            reasons[event.row] = event.reason or reasons[event.row]
        else:
            usage = as_usage(event)
    choices = [
        {"index": row, **({"message": {"role": "assistant", "content": t}} if kind == CHAT else {"text": t})}
        | {"logprobs": None, "finish_reason": reason}
        for row, (t, reason) in enumerate(zip(texts, reasons, strict=True))
    ]
    return {**_head(kind, model), "object": kind, "choices": choices, "usage": usage, **more()}


async def as_chunks(
    events: AsyncGenerator, body: SamplingBody, model: str, kind: str, more: Callable[[], dict]
) -> AsyncIterator[dict]:
    """The chunks of a stream; arguments as of `as_answer`. The first one says what `more` does."""
    chat = kind == CHAT
    head = _head(kind, model) | {"object": "chat.completion.chunk" if chat else "text_completion"}
    begun = set()
    async with aclosing(events):
        async for event in events:
            if isinstance(event, Chunk):
                content = {"text": event.text}
                if chat:
                    role = {} if event.row in begun else {"role": "assistant"}
                    content = {"delta": role | ({"content": event.text} if event.text else {})}
                first = {} if begun else more()
                begun.add(event.row)
                choice = {"index": event.row, **content, "logprobs": None, "finish_reason": event.reason}
                yield head | {"choices": [choice]} | first
            elif body.stream_options and body.stream_options.include_usage:
                yield head | {"choices": [], "usage": as_usage(event)}


def _head(kind: str, model: str) -> dict:
    name = f"{'chatcmpl' if kind == CHAT else 'cmpl'}-{uuid.uuid4().hex}"
    return {"id": name, "created": int(time.time()), "model": model}


def as_usage(event: Usage) -> dict:
    """In OpenAI's words."""
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "total_tokens": event.prompt_tokens + event.completion_tokens,
    }
