"""Serves models over HTTP: OpenAI's chat, completions, responses and embeddings; /search, /summarize, /answer and so on.

    python -m deploy.api --model outputs/chat_sft --model pypi:smollm2-135m-instruct
    uvicorn deploy.api:app --http h11         # the same with TASKBOOK_MODELS="outputs/chat_sft pypi:..."

Environment: TASKBOOK_API_KEY (asked on every route but health; needed to listen beyond this machine), TASKBOOK_MODELS,
TASKBOOK_DOCUMENTS (indexes to answer from), TASKBOOK_ORIGINS (web pages that may call it, none by default), and the fields of
`Limits` as TASKBOOK_LIMIT_QUEUED and so on.
Neither prompts nor keys are logged.
"""

import argparse
import asyncio
import base64
import gc
import logging
import os
import signal
import sys
import time
from contextlib import aclosing, asynccontextmanager, suppress

import uvicorn
from fastapi import Depends, FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from deploy.admission import (
    ERRORS,
    AdmissionMiddleware,
    ClientGone,
    EventStream,
    Limits,
    Refused,
    error_response,
    is_loopback,
    is_not_503,
    log,
)
from deploy.completions import CHAT, as_answer, as_chunks
from deploy.documents import Collection, answer_from, cited, open_collections, reply_from
from deploy.generation import Chunk, Usage
from deploy.inference import DEFAULT_MODEL, Engine, model_id
from deploy.responses import response_events
from deploy.schemas import (
    AnswerBody,
    ChatBody,
    ClassifyBody,
    CompletionBody,
    EmbeddingsBody,
    FillBody,
    NotJSON,
    ResponsesBody,
    SamplingBody,
    SearchBody,
    SummarizeBody,
    openapi_schemas,
    parse,
)
from deploy.workers import Task, Workers
from shared import UserError
from shared.retrieval.answers import citations


class Service:
    """Models, counters and limits of one server. Touched by the event loop only: its only lock, `turn`, spaces out beginnings.

    accepted = finished + failed + cancelled + those in `admitted` now.
    """

    def __init__(self, names: list[str], limits: Limits, documents: tuple[str, ...] = ()):
        self.names, self.documents, self.limits = names, documents, limits
        self.engines, self.collections, self.workers = {}, {}, None
        self.ready = self.draining = False
        self.error: UserError | None = None
        self.admitted, self.deadlines, self.turn = 0, set(), asyncio.Lock()
        self.arriving = 0  # bytes of bodies that are not here yet
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
        """Loads and warms up every model, opens every index; runs in a thread."""
        self.workers, self.collections = Workers(), open_collections(self.documents)
        named = list(map(model_id, self.names))
        if twice := {name for name in named if named.count(name) > 1}:
            raise UserError(f"two models are named {twice.pop()!r}: name each once, or rename the folder of one.")
        for name in self.names:
            self.engines[model_id(name)] = Engine(name, workers=self.workers, replies=self.limits.running)
        gc.collect()
        gc.freeze()  # libraries and models stay: looking through them again for garbage halts the server for 0.2 s each time
        self.ready = True

    def works(self) -> None:
        """Raises Refused while models are loaded, and when the server stops."""
        if not self.ready or self.draining:
            raise Refused(503, "the server is " + ("stopping." if self.draining else "loading its models."), 5)

    def engine(self, model: str | None) -> Engine:
        """Looks a name up among the models that were loaded; it is never a path. Without a name: the only one."""
        self.works()
        if model is None and len(self.engines) == 1:
            return next(iter(self.engines.values()))
        if model not in self.engines:
            raise Refused(404, f"no model {model!r} here; GET /v1/models lists them.")
        return self.engines[model]

    def collection(self, name: str) -> Collection:
        """Looks a name up among the documents that were opened; it is never a path."""
        self.works()
        if name not in self.collections:
            there = f"there are: {', '.join(self.collections)}" if self.collections else "none were named at the start"
            raise Refused(404, f"no documents {name!r} here; {there}.")
        return self.collections[name]

    def drain(self) -> None:
        """No new work; what runs may finish within `drain_seconds`."""
        self.draining = True
        latest = asyncio.get_running_loop().time() + self.limits.drain_seconds
        for deadline in self.deadlines:
            if deadline.when() is not None and deadline.when() > latest:
                deadline.reschedule(latest)

    async def events(self, request: Request, submit):
        """What the job emits (`Chunk`s and a result), as it comes; raises Refused 504 and ClientGone, and cancels the job."""
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
                if not isinstance(event, Chunk):
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


def create_app(
    names: list[str],
    limits: Limits | None = None,
    key: str | None = None,
    origins: tuple[str, ...] = (),
    documents: tuple[str, ...] = (),
) -> FastAPI:
    """The server of these models and indexes. They are loaded when it starts, in the background: /livez answers at once, /readyz
    then."""
    limits = limits or Limits()
    service = Service(names, limits, documents)

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

    # The middleware looks at keys; this tells /docs that there is one
    app = FastAPI(title="LM Taskbook", lifespan=lifespan, dependencies=[Depends(HTTPBearer(auto_error=False))])
    app.state.service = service
    errors = {status: {"description": text} for status, text in ERRORS.items()}

    def describe():
        if app.openapi_schema is None:
            FastAPI.openapi(app)["components"].setdefault("schemas", {}).update(openapi_schemas())
        return app.openapi_schema

    app.openapi = describe

    def post(path: str, schema):
        """A route whose function gets the request and its body, read in a thread and within bounds; see `schemas.parse`."""

        def decorated(function):
            async def route(request: Request):
                return await function(request, await asyncio.to_thread(parse, schema, await request.body()))

            route.__name__, route.__doc__ = function.__name__, function.__doc__
            reference = {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}
            content = {"requestBody": {"content": {"application/json": reference}, "required": True}}
            return app.post(path, responses=errors, openapi_extra=content)(route)

        return decorated

    @app.exception_handler(UserError)
    @app.exception_handler(Refused)
    @app.exception_handler(NotJSON)
    @app.exception_handler(ValidationError)
    @app.exception_handler(HTTPException)
    async def failed(request, error):
        return error_response(error)

    async def one(request: Request, submit) -> dict | list:
        async for event in service.events(request, submit):
            result = event
        return result

    async def text(request: Request, body: SamplingBody, submit, kind: str, prompts: int = 1, more=dict):
        """Both of OpenAI's routes for text."""
        events, name = service.events(request, submit), body.model or next(iter(service.engines))
        if body.stream:
            return EventStream(as_chunks(events, body, name, kind, more))
        return await as_answer(events, name, kind, prompts * body.n, more)

    def reply(body: ChatBody | ResponsesBody, messages: list[dict]):
        """What submits a conversation, asking the documents that the body names, and what then tells their citations."""
        model = service.engine(body.model)
        if body.documents is None:
            return lambda emit: model.chat(messages, body.sampling(), emit), dict
        collection, found = service.collection(body.documents), []

        def submit(emit):
            found.append(collection.find(messages[-1]["content"]))
            return reply_from(found[0], model, messages, body.sampling(), emit)

        return submit, lambda: {"citations": cited(found[0])}

    @post("/v1/chat/completions", ChatBody)
    async def chat_completions(request: Request, body: ChatBody):
        """A reply to a conversation; with `documents`, from what they say, with `citations`."""
        submit, more = reply(body, [message.turn() for message in body.messages])
        return await text(request, body, submit, CHAT, more=more)

    @post("/search", SearchBody)
    async def search(request: Request, body: SearchBody):
        """The passages of documents that answer a question best, the best first."""
        collection = service.collection(body.documents)

        def run(jobs):
            jobs[0].emit(citations(collection.find(body.query, body.top_k).passages))

        return {"passages": await one(request, lambda emit: service.workers.submit(Task(emit, run)))}

    @post("/v1/completions", CompletionBody)
    async def completions(request: Request, body: CompletionBody):
        """The continuation of a text."""
        model, prompts = service.engine(body.model), body.prompts()

        def submit(emit):
            return model.complete(prompts, body.sampling(), emit)

        return await text(request, body, submit, "text_completion", len(prompts))

    @post("/v1/responses", ResponsesBody)
    async def responses(request: Request, body: ResponsesBody):
        """A reply to a text or a conversation, as chat completions give it. What was said before is sent again."""
        (submit, more), name = reply(body, body.messages()), body.model or next(iter(service.engines))

        async def told():
            async with aclosing(service.events(request, submit)) as events:
                async for event in response_events(events, body, name, more):
                    yield event

        if body.stream:
            return EventStream(told(), named=True)
        async for event in told():
            last = event
        return last["response"]

    @post("/v1/embeddings", EmbeddingsBody)
    async def embeddings(request: Request, body: EmbeddingsBody):
        """A vector of length 1 for each text: the mean of its tokens' last hidden states, or the first one's."""
        model, texts = service.engine(body.model), [body.input] if isinstance(body.input, str) else body.input
        found = await one(request, lambda emit: model.embed(texts, emit))
        vectors = [
            base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
            for vector in found["vectors"].astype("<f4")
        ]
        data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(vectors)]
        usage = {"prompt_tokens": found["tokens"], "total_tokens": found["tokens"]}
        return {"object": "list", "data": data, "model": model.name, "usage": usage}

    def described(name: str, engine: Engine) -> dict:
        about = {"id": name, "object": "model", "created": 0, "owned_by": "taskbook", "task": engine.task}
        return about | {"artifact": engine.artifact, "context": engine.context}

    @app.get("/v1/models")
    async def models():
        """Which models answer here, and what each is for."""
        return {"object": "list", "data": [described(name, each) for name, each in service.engines.items()]}

    @app.get("/v1/models/{name:path}", responses={404: {"description": ERRORS[404]}})
    async def model(name: str):
        """What one of them is for."""
        return described(name, service.engine(name))

    @post("/summarize", SummarizeBody)
    async def summarize(request: Request, body: SummarizeBody):
        """A summary: `summary`."""
        model = service.engine(body.model)
        return await one(request, lambda emit: model.summarize(body.text, body.max_tokens, emit))

    @post("/answer", AnswerBody)
    async def answer(request: Request, body: AnswerBody):
        """Where the answer stands: `answer` ("" if none does), `start`, `end`, `score`; with `documents` the citation."""
        model = service.engine(body.model)
        if body.documents is None:
            return await one(request, lambda emit: model.answer(body.question, body.context, emit))
        collection, found = service.collection(body.documents), []

        def submit(emit):
            found.append(collection.find(body.question))
            return answer_from(found[0], model, body.question, emit)

        return await one(request, submit) | {"citations": cited(found[0])}

    @post("/fill-mask", FillBody)
    async def fill_mask(request: Request, body: FillBody):
        """The likeliest words for the blank."""
        model = service.engine(body.model)
        return {"words": await one(request, lambda emit: model.fill(body.text, body.top_k, emit))}

    @post("/classify", ClassifyBody)
    async def classify(request: Request, body: ClassifyBody):
        """The labels of a text, the likeliest first: `labels`."""
        model = service.engine(body.model)
        return {"labels": await one(request, lambda emit: model.classify(body.text, body.top_k, emit))}

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

    app.add_middleware(AdmissionMiddleware, service=service, key=key)
    if origins:  # outermost: or a browser would not let a page read why it was refused
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def from_environment(names: list[str] | None = None, documents: list[str] | None = None) -> FastAPI:
    """The application as the environment describes it, where arguments do not."""
    names = names or os.environ.get("TASKBOOK_MODELS", DEFAULT_MODEL).split()
    documents = documents or os.environ.get("TASKBOOK_DOCUMENTS", "").split()
    origins = tuple(os.environ.get("TASKBOOK_ORIGINS", "").split())
    key = os.environ.get("TASKBOOK_API_KEY") or None
    return create_app(names, Limits.from_environment(), key, origins, tuple(documents))


def main(argv: list[str] | None = None) -> int:
    """The command line above; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m deploy.api", description="Serves models over HTTP.")
    parser.add_argument("--model", action="append", help="Hub id, folder or pypi: name; may be repeated")
    parser.add_argument(
        "--documents",
        action="append",
        help="an index to answer from: a file, org/name on the Hub, or http(s)://server:port/collection; may be repeated",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on")
    options = parser.parse_args(argv)
    try:
        if not is_loopback(options.host) and not os.environ.get("TASKBOOK_API_KEY"):
            raise UserError(
                f"--host {options.host} is reached from other machines, and there is no key: set TASKBOOK_API_KEY to a long "
                "random text, which clients send as their API key."
            )
        app = from_environment(options.model, options.documents)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with suppress(KeyboardInterrupt):
        # h11 bounds the headers, httptools does not; uvloop would be taken where it happens to be installed
        uvicorn.run(app, host=options.host, port=options.port, http="h11", loop="asyncio")
    return 2 if app.state.service.error else 0


def __getattr__(name: str):
    """`deploy.api:app`, made when uvicorn asks for it: importing this file reads no environment."""
    if name == "app":
        return from_environment()
    raise AttributeError(name)


if __name__ == "__main__":
    sys.exit(main())
