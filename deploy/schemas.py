"""Bodies of requests: what the API accepts, and within which bounds. Called by api.py.

A field that asks for nothing is accepted (null, an empty list of tools); one that would change the reply and is not offered is
refused by its name.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator
from pydantic.json_schema import models_json_schema

from deploy.generation import Sampling

MOST_FIELDS, MOST_OBJECTS = 64, 5000  # of one object, and of all of a body: each may become an error that is built
SURROGATES = {code: "\ufffd" for code in range(0xD800, 0xE000)}  # halves of a character, which no encoding can write


class NotJSON(ValueError):
    """The body cannot be read; the message says why, `status` how HTTP calls it."""

    status = 400


class HalfCharacter(NotJSON):
    """A text of the body has half of a surrogate pair, which no encoding can write."""

    status = 422


def only(*values):
    """A field that may be there, with one of these values, which ask for nothing."""

    def check(value):
        # 0 and 0.0 ask for the same, but completions' `logprobs` 0 for the token's own probability and false for none
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            raise ValueError("not offered by this server; leave it out")
        return value

    return Annotated[Any, AfterValidator(check), WithJsonSchema({"enum": list(values)})]


class Strict(BaseModel):
    """A field that is not known is refused, and so is one that this server would ignore; null is as good as not sent."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def drop_null(cls, data):
        """OpenAI's clients send null for what they leave to the server."""
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Body(Strict):
    """What every request may say."""

    model: str | None = Field(None, max_length=200, description="one of /v1/models; may be left out where there is one")


class StreamOptions(Strict):
    """Whether the last chunk of a stream tells the usage."""

    include_usage: bool = False
    include_obfuscation: bool = Field(False, description="changes nothing: chunks are not padded")


class Accepted(Body):
    """What OpenAI's clients send along and what changes no reply."""

    user: str | None = Field(None, max_length=200)
    safety_identifier: str | None = Field(None, max_length=200)
    prompt_cache_key: str | None = Field(None, max_length=200)
    store: bool | None = Field(None, description="nothing is stored")
    metadata: dict[str, str] | None = None
    service_tier: str | None = Field(None, max_length=50)


class DrawnBody(Accepted):
    """How text is drawn, as all of OpenAI's routes for text say it, with their defaults where they have one."""

    temperature: float = Field(0.7, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(0.95, gt=0, le=1)
    repetition_penalty: float = Field(1.1, ge=1, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool = False

    def drawn(self, **more) -> Sampling:
        """As the engine takes it."""
        seed = None if self.seed is None else self.seed % 2**32
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            seed=seed,
            **more,
        )


class SamplingBody(DrawnBody):
    """What chat and completions share beside."""

    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    stop: (
        Annotated[str, Field(max_length=1000)]
        | Annotated[list[Annotated[str, Field(max_length=1000)]], Field(fail_fast=True, max_length=4)]
        | None
    ) = None
    n: int = Field(1, ge=1, le=4)
    stream_options: StreamOptions | None = None
    logprobs: only(False) = None
    logit_bias: only({}) = None
    frequency_penalty: only(0) = Field(None, description="see repetition_penalty")
    presence_penalty: only(0) = Field(None, description="see repetition_penalty")

    def sampling(self) -> Sampling:
        """As the engine takes it."""
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        return self.drawn(max_tokens=self.max_tokens, stop=tuple(text for text in stop if text), n=self.n)


class TextPart(Strict):
    """One of the parts that OpenAI's clients may send as `content`."""

    type: Literal["text"]
    text: str


def with_content(schema: dict) -> None:
    """For /docs: a message says something; only an assistant's may be null."""
    schema["required"] = ["role", "content"]
    schema["properties"]["content"]["anyOf"] = schema["properties"]["content"]["anyOf"][:2]


class Message(Strict):
    """One turn of a conversation. An assistant's reply can be sent back as it came."""

    model_config = ConfigDict(json_schema_extra=with_content)
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None
    tool_calls: only([]) = None
    annotations: only([]) = None

    @model_validator(mode="after")
    def somebody_speaks(self):
        """Only an assistant may say nothing."""
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content: needed for the role {self.role}")
        return self

    def turn(self) -> dict:
        """As chat templates know it; parts on lines of their own, as tasks/chat_sft learns them."""
        content = self.content or ""
        text = content if isinstance(content, str) else "\n".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatBody(SamplingBody):
    """https://platform.openai.com/docs/api-reference/chat/create"""

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=1000)
    documents: str | None = Field(
        None, max_length=200, description="answer the last message from these, with `citations`"
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    tools: only([]) = None
    tool_choice: only("none", "auto") = None
    parallel_tool_calls: bool | None = Field(None, description="there are no tools")
    response_format: only({"type": "text"}) = None
    modalities: only(["text"]) = None

    @model_validator(mode="after")
    def somebody_asks(self):
        """Documents are searched for what the user said last."""
        if self.documents is not None and self.messages[-1].role != "user":
            raise ValueError("documents: the last message has to be the user's question")
        return self

    @model_validator(mode="after")
    def one_limit(self):
        """`max_completion_tokens` is the newer name of `max_tokens`."""
        self.max_tokens = self.max_completion_tokens or self.max_tokens
        return self


TokenIds = Annotated[list[Annotated[int, Field(ge=0, strict=True)]], Field(fail_fast=True, min_length=1)]


class CompletionBody(SamplingBody):
    """https://platform.openai.com/docs/api-reference/completions/create"""

    prompt: str | TokenIds | Annotated[list[str | TokenIds], Field(fail_fast=True, min_length=1, max_length=32)] = (
        Field(
            description="a text, token ids of this model, or a list of either; ids are taken as they are, control tokens too"
        )
    )
    best_of: only(1) = None
    echo: only(False) = None
    suffix: only("") = None

    def prompts(self) -> list:
        """Each a text or token ids."""
        return [self.prompt] if isinstance(self.prompt, str) or isinstance(self.prompt[0], int) else self.prompt


class ResponsePart(Strict):
    """A part of a message: text that was asked, or that a model wrote, as it came."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: only([]) = None
    logprobs: only([]) = None


class ResponseMessage(Strict):
    """One turn of a conversation. A response's `output` can be sent back as it came."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ResponsePart], Field(fail_fast=True)]
    id: str | None = Field(None, max_length=200)
    status: Literal["in_progress", "completed", "incomplete"] | None = None
    phase: str | None = Field(None, max_length=50)

    def turn(self) -> dict:
        """As chat templates know it; parts on lines of their own, as tasks/chat_sft learns them."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextConfig(Strict):
    """Text is all that there is."""

    format: only({"type": "text"}) = None
    verbosity: only("medium") = None


class ObfuscationOptions(Strict):
    """Changes nothing: events are not padded."""

    include_obfuscation: bool = False


class ResponsesBody(DrawnBody):
    """https://platform.openai.com/docs/api-reference/responses/create; nothing is stored, so no response can be continued."""

    input: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[ResponseMessage], Field(fail_fast=True, min_length=1, max_length=1000)]
    )
    instructions: str | None = None
    documents: str | None = Field(None, max_length=200, description="as of /v1/chat/completions")
    max_output_tokens: int | None = Field(None, ge=1, le=1_000_000)
    stream_options: ObfuscationOptions | None = None
    text: TextConfig | None = None
    tools: only([]) = None
    tool_choice: only("none", "auto") = None
    parallel_tool_calls: bool | None = Field(None, description="there are no tools")
    include: only([]) = None
    background: only(False) = None
    truncation: only("disabled") = None
    top_logprobs: only(0) = None
    prompt_cache_retention: str | None = Field(None, max_length=50)

    @model_validator(mode="after")
    def somebody_asks(self):
        """Documents are searched for what the user said last."""
        if self.documents is not None and self.messages()[-1]["role"] != "user":
            raise ValueError("documents: the last message has to be the user's question")
        return self

    def messages(self) -> list[dict]:
        """As chat templates know them; `instructions` come first."""
        said = [{"role": "user", "content": self.input}] if isinstance(self.input, str) else None
        said = said or [message.turn() for message in self.input]
        return [{"role": "system", "content": self.instructions}] * bool(self.instructions) + said

    def sampling(self) -> Sampling:
        """As the engine takes it."""
        return self.drawn(max_tokens=self.max_output_tokens)


class EmbeddingsBody(Accepted):
    """https://platform.openai.com/docs/api-reference/embeddings/create; texts only: ids of another tokenizer would mislead."""

    input: str | Annotated[list[str], Field(fail_fast=True, min_length=1, max_length=2048)]
    encoding_format: Literal["float", "base64"] = "float"


class SearchBody(Strict):
    """A question to documents."""

    documents: str = Field(max_length=200, description="the name of an index: its file without folder and ending")
    query: str = Field(min_length=1)
    top_k: int = Field(5, ge=1, le=50)


class SummarizeBody(Body):
    """A text, and the most tokens of its summary."""

    text: str = Field(min_length=1)
    max_tokens: int = Field(128, ge=1, le=1024)


class AnswerBody(Body):
    """A question about a text, or to documents."""

    question: str = Field(min_length=1, max_length=2000)
    context: str | None = Field(None, min_length=1, max_length=100_000)
    documents: str | None = Field(None, max_length=200, description="in the place of a context")

    @model_validator(mode="after")
    def one_place(self):
        """Where the answer is looked for."""
        if (self.context is None) == (self.documents is None):
            raise ValueError("context: give it, or documents, and not both")
        return self


class FillBody(Body):
    """A text with [MASK] in it, once."""

    text: str = Field(min_length=1)
    top_k: int = Field(5, ge=1, le=50)


class ClassifyBody(Body):
    """A text to sort, and how many of its labels to tell."""

    text: str = Field(min_length=1)
    top_k: int = Field(5, ge=1, le=1000)


def parse(schema: type[Strict], raw: bytes) -> Strict:
    """A body as its schema has it. Within bounds that hold whatever was sent, so it takes milliseconds.

    Raises:
        NotJSON: no JSON, too many fields or objects, nested too deeply, half a character.
        pydantic.ValidationError: a value that is not allowed; few errors, since lists end at the first.
    """
    objects = 0

    def bounded(pairs):
        nonlocal objects
        objects += 1
        if len(pairs) > MOST_FIELDS or objects > MOST_OBJECTS:
            raise NotJSON(f"more than {MOST_FIELDS} fields in an object, or more than {MOST_OBJECTS:,} objects.")
        return dict(pairs)

    def constant(name):
        raise NotJSON(f"{name} is no JSON.")

    try:
        # Windows' programs write a byte order mark
        data = json.loads(raw.decode("utf-8-sig"), object_pairs_hook=bounded, parse_constant=constant)
    except NotJSON:
        raise
    except (ValueError, RecursionError) as error:  # the error may quote the body
        place = f" at character {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise NotJSON(f"the body is not JSON in UTF-8{place}.") from None
    try:
        json.dumps(data, ensure_ascii=False).encode("utf8")
    except UnicodeEncodeError:
        raise HalfCharacter(
            "the body has half of a surrogate pair (\\ud800 to \\udfff), which is no character."
        ) from None
    return schema.model_validate(data)


def one_line(errors: list[dict]) -> str:
    """The first of pydantic's errors, without values, which may be as long as the body."""
    unknown = "not known to this server; leave it out"
    lines = [
        f"{'.'.join(map(str, each['loc'])) or 'body'}: "
        + (unknown if each["type"] == "extra_forbidden" else each["msg"].removeprefix("Value error, "))
        for each in errors[:5]
    ]
    return "; ".join(line.translate(SURROGATES)[:300] for line in lines)


def openapi_schemas() -> dict:
    """The schemas of all bodies, for /openapi.json."""
    bodies = (
        ChatBody,
        CompletionBody,
        ResponsesBody,
        EmbeddingsBody,
        SearchBody,
        SummarizeBody,
        AnswerBody,
        FillBody,
        ClassifyBody,
    )
    found = models_json_schema([(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}")
    return found[1]["$defs"]
