"""Who is admitted, how much at once, and what a refusal looks like. Called by api.py."""

import asyncio
import functools
import hmac
import ipaddress
import json
import logging
import os
import time
import traceback
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields
from urllib.parse import urlsplit

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response

from deploy.inference import TooLong
from shared import UserError

log = logging.getLogger("uvicorn.error")
HEALTH = ("/livez", "/readyz")
WORK = ("/v1/chat/completions", "/v1/completions", "/summarize", "/answer", "/fill-mask")


@dataclass(frozen=True)
class Limits:
    """Body in bytes; requests admitted at once, of which `running` compute; seconds a request may take; seconds for SIGTERM."""

    body: int = 1_000_000
    admitted: int = 32
    running: int = 2
    queue_seconds: float = 30
    first_token_seconds: float = 30
    total_seconds: float = 120
    drain_seconds: float = 25

    @classmethod
    def from_environment(cls) -> "Limits":
        """TASKBOOK_LIMIT_ADMITTED=64 and so on. Raises UserError for what is no positive number."""
        values = {}
        for each in fields(cls):
            text = os.environ.get(f"TASKBOOK_LIMIT_{each.name.upper()}")
            if text:
                try:
                    values[each.name] = each.type(text)
                except ValueError:
                    values[each.name] = 0
                if not values[each.name] > 0:
                    raise UserError(f"TASKBOOK_LIMIT_{each.name.upper()}={text}: expected a positive number.")
        return cls(**values)


class Refused(Exception):
    """An answer that is no result: HTTP status, what is wrong and, for 503, when to come back (seconds)."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status, self.retry_after = status, retry_after


class ClientGone(Exception):
    """The client closed its connection: nobody waits for the answer."""


class EventStream(Response):
    """Server-sent events. The status is sent with the first one, so that what fails before is an ordinary error."""

    def __init__(self, chunks):
        super().__init__()
        self.chunks = chunks

    async def __call__(self, scope, receive, send):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        started = False
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                content = f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
                await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def defect(error: Exception) -> Refused:
    """500 for what should not happen. Its place is logged, never its text, which may quote a prompt."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return Refused(500, "the server failed.")


def explain(error: Exception) -> tuple[int, dict]:
    """Status and body, in OpenAI's form, of what went wrong."""
    message, code = str(error), None
    if isinstance(error, Refused):
        status = error.status
    elif isinstance(error, TooLong):
        status, code = 400, "context_length_exceeded"
    elif isinstance(error, UserError):
        status = 400
    elif isinstance(error, RequestValidationError):
        status = 422
        # the value is left out: it may be as long as the body
        message = "; ".join(f"{'.'.join(map(str, e['loc'][1:])) or 'body'}: {e['msg']}" for e in error.errors()[:5])
    else:  # starlette's: no such route, wrong method
        status, message = error.status_code, str(error.detail)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """503 tells when to come back, 401 how to log in."""
    status, content = explain(error)
    headers = dict(getattr(error, "headers", None) or {})
    if getattr(error, "retry_after", None):
        headers["Retry-After"] = str(error.retry_after)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(content, status, headers)


class AdmissionMiddleware:
    """Outermost: the key, admission, the deadline of a request and how it ended. Full is said before anything is parsed."""

    def __init__(self, app, service, key: str | None):
        self.app, self.service, self.key = app, service, key
        full = Refused(503, f"{service.limits.admitted} requests are being served, which is the limit.", 2)
        self.full = error_response(full)  # made once: a flood of them must cost little

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        service, refused = self.service, self._refuses(scope, dict(scope["headers"]))
        answer = error_response(refused) if refused else self.app
        if not refused and scope["method"] == "POST" and scope["path"] in WORK:
            if service.admitted < service.limits.admitted:
                return await self._admitted(scope, receive, send)
            service.refused.labels(scope["path"]).inc()
            answer = self.full
        if answer is not self.app:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):  # cheaper than wait_for, which makes a task
                    await read_away(receive, service.limits.body)
        await answer(scope, receive, send)

    async def _admitted(self, scope, receive, send):
        service, route, status, complete = self.service, scope["path"], None, False

        async def watched(message):
            nonlocal status, complete
            status = message.get("status", status)
            complete = message["type"] == "http.response.body" and not message.get("more_body")
            await send(message)

        service.admitted += 1
        service.accepted.labels(route).inc()
        began, outcome, failure = time.perf_counter(), "failed", None
        deadline = asyncio.timeout(service.limits.total_seconds)
        service.deadlines.add(deadline)
        try:
            async with deadline:
                async with service.turn:  # one begins after the other, so that a refusal does not wait for their work
                    await asyncio.sleep(0.002)  # as long as about ten refusals take
                await self.app(scope, receive, watched)
            outcome = "finished" if status == 200 else "failed"
        except ClientGone:
            outcome = "cancelled"
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        except TimeoutError:
            failure = Refused(504, "the answer took longer than the server allows.")
        except Exception as error:
            if complete:  # the client left as the last byte was written
                outcome = "finished" if status == 200 else "failed"
            else:
                failure = error.__cause__ if isinstance(error.__cause__, Refused | UserError) else defect(error)
        finally:
            service.deadlines.discard(deadline)
            service.admitted -= 1
            service.outcomes.labels(route, outcome).inc()
            service.total.labels(route).observe(time.perf_counter() - began)
        if failure and status is None:
            await error_response(failure)(scope, receive, send)
        elif failure:  # in the middle of a stream
            body = f"data: {json.dumps(explain(failure)[1])}\n\n".encode()
            with suppress(TimeoutError):  # a client that does not read is not waited for again
                await asyncio.wait_for(send({"type": "http.response.body", "body": body}), 1)

    def _refuses(self, scope, headers) -> Refused | None:
        if scope["path"] in HEALTH or scope["method"] == "OPTIONS":  # a browser's preflight carries no key
            return None
        if self.key:
            given = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            if not hmac.compare_digest(given, self.key.encode()):
                return Refused(401, "a key is needed: Authorization: Bearer <TASKBOOK_API_KEY>.")
            return None
        server = (scope.get("server") or ("",))[0]
        with suppress(ValueError):  # no address at all in `Host`
            host = urlsplit("//" + headers.get(b"host", b"").decode("latin1")).hostname or ""
            if is_loopback(host) and is_loopback(server):
                return None
        return Refused(403, "without TASKBOOK_API_KEY this server answers only on this machine, as localhost.")


def is_not_503(record: logging.LogRecord) -> bool:
    """Filter of the access log: /metrics counts what a full server refuses, and a line for each would slow a flood of them."""
    return record.args[-1:] != (503,)


async def read_away(receive, most: int) -> None:
    """Takes the body of a request that is refused: left unread, it would reset the connection before the answer is read."""
    while most > 0:
        message = await receive()
        if not message.get("more_body"):
            return
        most -= len(message["body"])


@functools.lru_cache  # asked twice for each request, a refused one too
def is_loopback(host: str) -> bool:
    """Whether a name or address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


ERRORS = {
    400: "too long for the model, or not what this model does",
    404: "no such model",
    413: "body too large",
    422: "a value that is not allowed",
    503: "full, or stopping; Retry-After says when to come back",
    504: "a deadline passed",
}
