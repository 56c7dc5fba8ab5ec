"""Serves models over HTTP: OpenAI's chat and completions, and /summarize, /answer, /fill-mask.

    python -m deploy.api --model outputs/chat_sft --model pypi:smollm2-135m-instruct
    uvicorn deploy.api:app                    # the same with TASKBOOK_MODELS="outputs/chat_sft pypi:..."

Environment: TASKBOOK_API_KEY (asked on every route but health; needed to listen beyond this machine), TASKBOOK_MODELS,
TASKBOOK_ORIGINS (web pages that may call it, none by default), and the fields of `Limits` as TASKBOOK_LIMIT_QUEUED and so on.
Neither prompts nor keys are logged.
"""

import argparse
import asyncio
import functools
import gc
import hmac
import ipaddress
import json
import logging
import os
import signal
import sys
import time
import traceback
import uuid
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

from deploy.inference import DEFAULT_MODEL, Engine, Piece, Sampling, TooLong, Usage, Workers
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


class Service:
    """Models, counters and limits of one server. Touched by the event loop only: its only lock, `turn`, spaces out beginnings.

    accepted = finished + failed + cancelled + those in `admitted` now.
    """

    def __init__(self, names: list[str], limits: Limits):
        self.names, self.limits, self.engines = names, limits, {}
        self.ready = self.draining = False
        self.error: UserError | None = None
        self.admitted, self.deadlines, self.turn = 0, set(), asyncio.Lock()
        self.registry = CollectorRegistry()
        counter = {"registry": self.registry, "labelnames": ("route",)}
        self.accepted = Counter("taskbook_accepted", "Requests admitted", **counter)
        self.refused = Counter("taskbook_refused", "Requests turned away, the server was full", **counter)
        self.outcomes = Counter("taskbook_done", "Requests by outcome", ("route", "outcome"), registry=self.registry)
        self.tokens = Counter("taskbook_tokens", "Tokens read and written", ("kind",), registry=self.registry)
        self.first = Histogram("taskbook_first_output_seconds", "Until the first output", **counter)
        self.total = Histogram("taskbook_request_seconds", "Until the end", **counter)
        Gauge("taskbook_admitted", "Requests inside now", registry=self.registry).set_function(lambda: self.admitted)

    def load(self) -> None:
        """Loads and warms up every model; runs in a thread."""
        workers = Workers(self.limits.running)
        for name in self.names:
            self.engines[model_id(name)] = Engine(name, workers=workers)
        gc.collect()
        gc.freeze()  # libraries and models stay: looking through them again for garbage halts the server for 0.2 s each time
        self.ready = True

    def engine(self, model: str | None) -> Engine:
        """Looks a name up among the models that were loaded; it is never a path. Without a name: the only one."""
        if not self.ready or self.draining:
            raise Refused(503, "the server is " + ("stopping." if self.draining else "loading its models."), 5)
        if model is None and len(self.engines) == 1:
            return next(iter(self.engines.values()))
        if model not in self.engines:
            raise Refused(404, f"no model {model!r} here; GET /v1/models lists them.")
        return self.engines[model]

    def drain(self) -> None:
        """No new work; what runs may finish within `drain_seconds`."""
        self.draining = True
        latest = asyncio.get_running_loop().time() + self.limits.drain_seconds
        for deadline in self.deadlines:
            if deadline.when() is not None and deadline.when() > latest:
                deadline.reschedule(latest)

    async def events(self, request: Request, submit):
        """What the job emits (`Piece`s and a result), as it comes; raises Refused 504 and ClientGone, and cancels the job."""
        loop, queue, began = asyncio.get_running_loop(), asyncio.Queue(), time.perf_counter()
        # in a thread: a long text takes a while to encode
        job = await asyncio.to_thread(submit, lambda event: loop.call_soon_threadsafe(queue.put_nowait, event))

        async def watch():
            while (await request.receive())["type"] != "http.disconnect":
                pass
            job.cancel()  # here and not where events are read, which may be waiting for the network
            queue.put_nowait(ClientGone())

        watcher = asyncio.create_task(watch())
        try:
            await _first(queue, self.limits.queue_seconds, "the server is busy: no model was free in time.")
            event = await _first(queue, self.limits.first_token_seconds, "the first output took too long.")
            self.first.labels(request.url.path).observe(time.perf_counter() - began)
            while True:
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, Usage):
                    self.tokens.labels("read").inc(event.prompt_tokens)
                    self.tokens.labels("written").inc(event.completion_tokens)
                yield event
                if not isinstance(event, Piece):
                    return
                event = await queue.get()
        finally:
            job.cancel()
            watcher.cancel()


async def _first(queue: asyncio.Queue, seconds: float, otherwise: str):
    try:
        event = await asyncio.wait_for(queue.get(), seconds)
    except TimeoutError as error:
        raise Refused(504, otherwise) from error
    if isinstance(event, Exception):
        raise event
    return event


def model_id(name: str) -> str:
    """What clients call a model: the last part of a folder's name, other names as they are."""
    return Path(name).name if Path(name).expanduser().is_dir() else name


# Requests


class Body(BaseModel):
    """A field that is not known is refused, and so is one that this server would ignore."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = Field(None, max_length=200, description="one of /v1/models; may be left out where there is one")


class SamplingBody(Body):
    """What OpenAI's two routes share, with their defaults where they have one."""

    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float = Field(0.7, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(0.95, gt=0, le=1)
    repetition_penalty: float = Field(1.1, ge=1, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[Annotated[str, Field(min_length=1, max_length=100)]] | None = Field(None, max_length=4)
    n: int = Field(1, ge=1, le=4)
    stream: bool = False
    stream_options: dict[Literal["include_usage"], bool] | None = None
    user: str | None = Field(None, max_length=200)
    logprobs: Literal[False, None] = Field(None, description="not offered")
    frequency_penalty: Literal[0, None] = Field(None, description="not offered; see repetition_penalty")
    presence_penalty: Literal[0, None] = Field(None, description="not offered; see repetition_penalty")

    def sampling(self) -> Sampling:
        """As the engine takes it."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        seed = None if self.seed is None else self.seed % 2**32
        return Sampling(self.max_tokens, self.temperature, self.top_p, self.repetition_penalty, seed, stop, self.n)


class TextPart(BaseModel):
    """One of the parts that OpenAI's clients may send as `content`."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]


class ChatBody(SamplingBody):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    messages: list[Message] = Field(min_length=1, max_length=1000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)

    @model_validator(mode="after")
    def one_limit(self):
        """`max_completion_tokens` is the newer name of `max_tokens`."""
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


class CompletionBody(SamplingBody):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: str


class SummarizeBody(Body):
    """A text, and the most tokens of its summary."""

    text: str = Field(min_length=1)
    max_tokens: int = Field(128, ge=1, le=1024)


class AnswerBody(Body):
    """A question about a text."""

    question: str = Field(min_length=1, max_length=2000)
    context: str = Field(min_length=1)


class FillBody(Body):
    """A text with [MASK] in it, once."""

    text: str = Field(min_length=1)
    top_k: int = Field(5, ge=1, le=50)


# Answers


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


class Door:
    """Outermost: the key, admission, the deadline of a request and how it ended. Full is said before anything is parsed."""

    def __init__(self, app, service: Service, key: str | None):
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


# The application


def create_app(
    names: list[str], limits: Limits | None = None, key: str | None = None, origins: tuple[str, ...] = ()
) -> FastAPI:
    """The server of these models. They are loaded when it starts, in the background: /livez answers at once, /readyz then."""
    limits = limits or Limits()
    service = Service(names, limits)

    @asynccontextmanager
    async def lifespan(app):
        loop, previous = asyncio.get_running_loop(), None
        sys.setswitchinterval(5e-5)  # threads that compute would keep the event loop waiting for 5 ms each time
        logging.getLogger("uvicorn.access").addFilter(is_not_503)

        def stop(number, frame):
            loop.call_soon_threadsafe(service.drain)
            server = getattr(previous, "__self__", None)
            if isinstance(server, uvicorn.Server):
                server.should_exit = True  # its own handler would end the process by the signal, not with code 0
            elif callable(previous):
                previous(number, frame)

        with suppress(ValueError):  # not the main thread: in a test
            previous = signal.signal(signal.SIGTERM, stop)

        def load():
            try:
                service.load()
                log.info("ready: %s", ", ".join(service.engines))
            except Exception as error:
                service.error = error if isinstance(error, UserError) else UserError(f"{type(error).__name__}: {error}")
                log.error("%s", service.error)
                if previous:
                    os.kill(os.getpid(), signal.SIGTERM)

        loading = asyncio.create_task(asyncio.to_thread(load))
        yield
        loading.cancel()

    app = FastAPI(title="LM Taskbook", lifespan=lifespan)
    app.state.service = service
    errors = {status: {"description": text} for status, text in ERRORS.items()}

    @app.exception_handler(UserError)
    @app.exception_handler(Refused)
    @app.exception_handler(RequestValidationError)
    @app.exception_handler(HTTPException)
    async def failed(request, error):
        return error_response(error)

    async def one(request: Request, submit) -> dict | list:
        async for event in service.events(request, submit):
            result = event
        return result

    async def text(request: Request, body: SamplingBody, submit, kind: str):
        """Both of OpenAI's routes; `kind` is the object's name in its answers."""
        chat = kind == "chat.completion"
        name = body.model or next(iter(service.engines))
        head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": name,
        }
        if body.stream:
            return EventStream(streamed(request, body, submit, head, chat))
        texts, reasons = [""] * body.n, [None] * body.n
        async for event in service.events(request, submit):
            if isinstance(event, Piece):
                texts[event.row] += event.text
                reasons[event.row] = event.reason or reasons[event.row]
            else:
                usage = as_usage(event)
        choices = [
            {"index": row, **({"message": {"role": "assistant", "content": t}} if chat else {"text": t})}
            | {"logprobs": None, "finish_reason": reason}
            for row, (t, reason) in enumerate(zip(texts, reasons, strict=True))
        ]
        return {**head, "object": kind, "choices": choices, "usage": usage}

    async def streamed(request, body, submit, head, chat):
        """The chunks of a stream."""
        head = head | {"object": "chat.completion.chunk" if chat else "text_completion"}

        def chunk(row, text, reason=None, **delta):
            content = {"delta": delta | ({"content": text} if text else {})} if chat else {"text": text}
            return head | {"choices": [{"index": row, **content, "logprobs": None, "finish_reason": reason}]}

        fresh = set(range(body.n))
        async with aclosing(service.events(request, submit)) as events:
            async for event in events:
                if isinstance(event, Piece):
                    role = {"role": "assistant"} if chat and event.row in fresh else {}
                    fresh.discard(event.row)
                    yield chunk(event.row, event.text, event.reason, **role)
                elif (body.stream_options or {}).get("include_usage"):
                    yield head | {"choices": [], "usage": as_usage(event)}

    @app.post("/v1/chat/completions", responses=errors)
    async def chat_completions(request: Request, body: ChatBody):
        """A reply to a conversation."""
        messages = [
            {"role": m.role, "content": m.content if isinstance(m.content, str) else "".join(p.text for p in m.content)}
            for m in body.messages
        ]
        model = service.engine(body.model)
        return await text(request, body, lambda emit: model.chat(messages, body.sampling(), emit), "chat.completion")

    @app.post("/v1/completions", responses=errors)
    async def completions(request: Request, body: CompletionBody):
        """The continuation of a text."""
        model = service.engine(body.model)
        return await text(
            request, body, lambda emit: model.complete(body.prompt, body.sampling(), emit), "text_completion"
        )

    @app.get("/v1/models")
    async def models():
        """Which models answer here, and what each is for."""
        return {
            "object": "list",
            "data": [
                {"id": name, "object": "model", "created": 0, "owned_by": "taskbook", "task": each.task}
                | {"artifact": each.artifact, "context": each.context}
                for name, each in service.engines.items()
            ],
        }

    @app.post("/summarize", responses=errors)
    async def summarize(request: Request, body: SummarizeBody):
        """A summary: `summary`."""
        model = service.engine(body.model)
        return await one(request, lambda emit: model.summarize(body.text, body.max_tokens, emit))

    @app.post("/answer", responses=errors)
    async def answer(request: Request, body: AnswerBody):
        """Where the answer stands: `answer` ("" if the text has none), `start`, `end`, `score`."""
        model = service.engine(body.model)
        return await one(request, lambda emit: model.answer(body.question, body.context, emit))

    @app.post("/fill-mask", responses=errors)
    async def fill_mask(request: Request, body: FillBody):
        """The likeliest words for the blank."""
        model = service.engine(body.model)
        return {"words": await one(request, lambda emit: model.fill(body.text, body.top_k, emit))}

    @app.get("/livez")
    async def livez():
        """The process answers."""
        return {"status": "alive"}

    @app.get("/readyz", responses={503: {"description": "not yet, or no longer"}})
    async def readyz():
        """Every model is loaded and has computed once, and the server is not stopping."""
        if not service.ready or service.draining:
            raise Refused(503, "stopping." if service.draining else "loading.", 1)
        return {"status": "ready"}

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics():
        """For Prometheus."""
        return PlainTextResponse(generate_latest(service.registry), media_type="text/plain; version=0.0.4")

    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=limits.body)
    app.add_middleware(Door, service=service, key=key)
    return app


ERRORS = {
    400: "too long for the model, or not what this model does",
    404: "no such model",
    413: "body too large",
    422: "a value that is not allowed",
    503: "full, or stopping; Retry-After says when to come back",
    504: "a deadline passed",
}


def as_usage(event: Usage) -> dict:
    """In OpenAI's words."""
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "total_tokens": event.prompt_tokens + event.completion_tokens,
    }


def from_environment(names: list[str] | None = None) -> FastAPI:
    """The application as the environment describes it."""
    names = names or os.environ.get("TASKBOOK_MODELS", DEFAULT_MODEL).split()
    origins = tuple(os.environ.get("TASKBOOK_ORIGINS", "").split())
    return create_app(names, Limits.from_environment(), os.environ.get("TASKBOOK_API_KEY") or None, origins)


def main(argv: list[str] | None = None) -> int:
    """The command line above; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.api", description="Serves models over HTTP.")
    parser.add_argument("--model", action="append", help="Hub id, folder or pypi: name; may be repeated")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    options = parser.parse_args(argv)
    try:
        if not is_loopback(options.host) and not os.environ.get("TASKBOOK_API_KEY"):
            raise UserError(
                f"--host {options.host} is reached from other machines, and there is no key: set TASKBOOK_API_KEY to a long "
                "random text, which clients send as their API key."
            )
        app = from_environment(options.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with suppress(KeyboardInterrupt):
        uvicorn.run(app, host=options.host, port=options.port)
    return 2 if app.state.service.error else 0


def __getattr__(name: str):
    """`deploy.api:app`, made when uvicorn asks for it: importing this file reads no environment."""
    if name == "app":
        return from_environment()
    raise AttributeError(name)


if __name__ == "__main__":
    sys.exit(main())
