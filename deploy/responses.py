"""OpenAI's Responses API: the object and the events that tell of one reply. Called by api.py."""

import itertools
import time
import uuid
from collections.abc import AsyncIterator, Callable

from deploy.generation import Chunk
from deploy.schemas import ResponsesBody


async def response_events(
    events: AsyncIterator, body: ResponsesBody, model: str, more: Callable[[], dict]
) -> AsyncIterator[dict]:
    """What a job emits as the events of a stream; the last one's `response` is the whole answer.

    https://platform.openai.com/docs/api-reference/responses-streaming

    Args:
        more: what else the answer says, asked after the first output.
    """
    number, item = itertools.count(), f"msg_{uuid.uuid4().hex}"
    place = {"item_id": item, "output_index": 0, "content_index": 0}
    response = {
        "id": f"resp_{uuid.uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "status": "in_progress",
        "model": model,
        "output": [],
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "store": False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
    }

    def event(kind: str, **content) -> dict:
        return {"type": f"response.{kind}", "sequence_number": next(number), **content}

    def part(text: str) -> dict:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def message(status: str, *parts: dict) -> dict:
        return {"type": "message", "id": item, "role": "assistant", "status": status, "content": list(parts)}

    text = reason = usage = None
    async for each in events:
        if text is None:  # with the first output: what fails before is an ordinary error
            text, response = "", response | more()
            yield event("created", response=response)
            yield event("in_progress", response=response)
            yield event("output_item.added", output_index=0, item=message("in_progress"))
            yield event("content_part.added", **place, part=part(""))
        if not isinstance(each, Chunk):
            usage = each
            continue
        text, reason = text + each.text, each.reason or reason
        if each.text:
            yield event("output_text.delta", **place, delta=each.text, logprobs=[])
    status = "incomplete" if reason == "length" else "completed"
    yield event("output_text.done", **place, text=text, logprobs=[])
    yield event("content_part.done", **place, part=part(text))
    yield event("output_item.done", output_index=0, item=message(status, part(text)))
    response |= {"status": status, "output": [message(status, part(text))]}
    response["incomplete_details"] = {"reason": "max_output_tokens"} if status == "incomplete" else None
    response["usage"] = {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }
    yield event(status, response=response)
