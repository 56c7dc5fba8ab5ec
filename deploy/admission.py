"""Who is admitted, how much at once, and what a refusal looks like. Called by api.py."""

import asyncio
import base64
import functools
import hmac
import ipaddress
import json
import logging
import os
import re
import time
import traceback
from contextlib import aclosing, suppress
from dataclasses import dataclass, fields

from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError

from deploy.schemas import SURROGATES, NotJSON, one_line
from shared import UserError
from shared.data.encoding import TooLong

log = logging.getLogger("uvicorn.error")
HEALTH = ("/livez", "/readyz")
WORK = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings")
WORK += ("/search", "/summarize", "/answer", "/fill-mask", "/classify")
DOCS = ("/docs", "/redoc", "/openapi.json")  # a browser opens them, and asks for the key as a password
HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9.-]+)(?::[0-9]+)?")


@dataclass(frozen=True)
class Limits:
    """Body in bytes, and seconds in which it has to come; requests admitted at once; replies that one model writes at once;
    seconds a request may take; seconds for SIGTERM."""

    body: int = 1_000_000
    body_seconds: float = 5
    admitted: int = 32
    running: int = 16
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
        self.status, self.retry_after, self.scheme = status, retry_after, "Bearer"


class ClientGone(Exception):
    """The client closed its connection: nobody waits for the answer."""


class EventStream(Response):
    """Server-sent events. The status is sent with the first one, so that what fails before is an ordinary error."""

    def __init__(self, chunks, named: bool = False):
        super().__init__()
        self.chunks, self.named = chunks, named  # named: each with its type, as /v1/responses has them, and no [DONE]

    async def __call__(self, scope, receive, send):
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        started = False
        async with aclosing(self.chunks) as chunks:
            async for chunk in chunks:
                if not started:
                    started = True
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                name = f"event: {chunk['type']}\n" if self.named else ""
                content = f"{name}data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode()
                await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"" if self.named else b"data: [DONE]\n\n"})


def defect(error: Exception) -> Refused:
    """500 for what should not happen. Its place is logged, never its text, which may quote a prompt."""
    log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return Refused(500, "the server failed.")


def explain(error: Exception) -> tuple[int, dict]:
    """Status and body, in OpenAI's form, of what went wrong."""
    message, code = str(error), None
    if isinstance(error, Refused | NotJSON):
        status = error.status
    elif isinstance(error, TooLong):
        status, code = 400, "context_length_exceeded"
    elif isinstance(error, UserError):
        status = 400
    elif isinstance(error, ValidationError):
        status = 422
        message = one_line(error.errors(include_url=False, include_input=False, include_context=False))
    else:  # starlette's: no such route, wrong method
        status, message = error.status_code, str(error.detail)
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return status, {"error": {"message": message.translate(SURROGATES), "type": kind, "param": None, "code": code}}


def error_response(error: Exception) -> JSONResponse:
    """503 tells when to come back, 401 how to log in."""
    status, content = explain(error)
    headers = dict(getattr(error, "headers", None) or {})
    if getattr(error, "retry_after", None):
        headers["Retry-After"] = str(error.retry_after)
    if status == 401:
        headers["WWW-Authenticate"] = error.scheme
    if status in (408, 413):  # the rest of the body is not read
        headers["Connection"] = "close"
    return JSONResponse(content, status, headers)


class AdmissionMiddleware:
    """Outermost: the key, the body, admission, the deadline of a request and how it ended. Full is said before anything is
    parsed, and a request takes no slot before its body is here."""

    def __init__(self, app, service, key: str | None):
        self.app, self.service, self.key = app, service, key
        full = Refused(503, f"{service.limits.admitted} requests are being served, which is the limit.", 2)
        self.full = error_response(full)  # made once: a flood of them must cost little

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        service, refused = self.service, self._refuses(scope, scope["headers"]) or compressed(scope["headers"])
        answer = error_response(refused) if refused else self.app
        if not refused and scope["method"] == "POST" and scope["path"] in WORK:
            try:
                full = service.admitted >= service.limits.admitted
                body = None if full else await self._body(scope["headers"], receive)
                if not full and service.admitted < service.limits.admitted:  # others may have come in between
                    return await self._admitted(scope, replayed(body, receive), send)
            except ClientGone:
                return
            except Refused as error:
                return await error_response(error)(scope, receive, send)
            service.refused.labels(scope["path"]).inc()
            answer = self.full
        if answer is not self.app:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):  # cheaper than wait_for, which makes a task
                    await read_away(receive, service.limits.body)
        await answer(scope, receive, send)

    async def _body(self, headers, receive) -> bytes:
        """All of a body. Raises Refused: too large, too slow, or too much is on its way at once; ClientGone."""
        limits, service, parts, size = self.service.limits, self.service, [], 0
        too_large = Refused(413, f"the body has more than {limits.body:,} bytes.")
        announced = dict(headers).get(b"content-length", b"0")
        if not announced.isdigit() or int(announced) > limits.body:
            raise too_large
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    parts.append(part)
                    size, service.arriving = size + len(part), service.arriving + len(part)
                    if size > limits.body:
                        raise too_large
                    if service.arriving > limits.admitted * limits.body:
                        raise Refused(503, "too many bodies are on their way.", 2)
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            raise Refused(408, f"the body did not come within {limits.body_seconds:g} s.") from None
        finally:
            service.arriving -= size

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
            scheme, _, given = dict(headers).get(b"authorization", b"").partition(b" ")
            given = given.strip()
            browser = scope["path"] in DOCS and scope["method"] == "GET"  # nowhere else: a browser sends it unasked
            if browser and scheme.lower() == b"basic":
                with suppress(ValueError):
                    scheme, given = b"bearer", base64.b64decode(given, validate=True).partition(b":")[2]
            if scheme.lower() != b"bearer" or not hmac.compare_digest(given, self.key.encode()):
                refused = Refused(401, "a key is needed: Authorization: Bearer <TASKBOOK_API_KEY>.")
                if browser:
                    refused.scheme = 'Basic realm="any name, and TASKBOOK_API_KEY as the password"'
                return refused
            return None
        server = (scope.get("server") or ("",))[0]
        hosts = [HOST.fullmatch(value.decode("latin1")) for name, value in headers if name == b"host"]
        if len(hosts) == 1 and hosts[0] and is_loopback(hosts[0][1].strip("[]")) and is_loopback(server):
            return None
        return Refused(403, "without TASKBOOK_API_KEY this server answers only on this machine, as localhost.")


def compressed(headers) -> Refused | None:
    """What to say of a body that would have to be unpacked, to nobody knows how many bytes."""
    coding = dict(headers).get(b"content-encoding", b"").decode("latin1").strip()
    if coding.lower() in ("", "identity"):
        return None
    return Refused(415, f"a body in Content-Encoding {coding[:50]} is not read: send it as it is.")


def replayed(body: bytes, receive):
    """As `receive`, for an application that has yet to read the body."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again():
        return messages.pop() if messages else await receive()

    return again


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
    400: "no JSON, too long for the model, or not what this model does",
    404: "no such model or documents",
    408: "the body did not come in time",
    413: "body too large",
    415: "the body is compressed",
    422: "a value that is not allowed",
    503: "full, or stopping; Retry-After says when to come back",
    504: "a deadline passed",
}
