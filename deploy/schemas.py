"""Bodies of requests: what the API accepts, and within which bounds. Called by api.py."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deploy.inference import Sampling


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
