"""A model that is loaded once and serves many: text, answers, summaries, words, labels, vectors. Used by api.py and app.py.

    engine = Engine("outputs/chat_sft")
    for piece in stream(lambda emit: engine.chat([{"role": "user", "content": "Hi"}], Sampling(), emit)):
        print(getattr(piece, "text", ""), end="")

Work is done in other threads: of `Workers`, and of a `Writer` for each model that writes text. What a thread has to say it hands
to `emit`, which must return at once.
"""

import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue

import regex

from deploy.deadline import Deadline
from deploy.generation import REPLIES, Chunk, Sampling, TextJob, Writer
from deploy.workers import Job, Task, Workers
from shared import UserError
from shared.data.encoding import PlainText, TooLong
from shared.inference.golden import GOLDEN
from shared.inference.model import load
from shared.inference.positions import check_summary
from shared.inference.qa_windows import check_question, question_room, window_of
from shared.publish.hub import pull
from shared.retrieval.answers import best_answer
from shared.retrieval.encoder import default_prompt, settings_of

DEFAULT_MODEL = "pypi:smollm2-135m-instruct"
DEFAULT_MAX_TOKENS = 512
ENCODING_SECONDS = 10  # for a text; the longest that fits takes about one
MASK = re.compile(r"\[MASK\]|<mask>|_{3,}")


def as_learnt(text: str) -> str:
    """A text in the characters of those that models here learn from (`shared.data.cleaning`): some keyboards and systems write a
    letter and its accent apart, or end lines with \\r\\n, and most tokenizers take that for something else.
    """
    return unicodedata.normalize("NFC", text.replace("\r\n", "\n"))


def placed(answer: dict, context: str) -> dict:
    """An answer that was found in `as_learnt(context)`, as it stands in the context itself."""
    if as_learnt(context) == context or not answer["answer"]:
        return answer
    ends = {0: 0}  # in `context`, of each letter by its end in the text that was read
    read = original = 0
    for letter in regex.findall(r"\X", context):
        read, original = read + len(as_learnt(letter)), original + len(letter)
        ends[read] = original
    start = max(end for end in ends if end <= answer["start"])
    end = min(end for end in ends if end >= answer["end"])
    return answer | {"answer": context[ends[start] : ends[end]], "start": ends[start], "end": ends[end]}


class Engine:
    """One model by name.

    Attributes:
        name, folder, task, artifact, context: what it is; `name` without its folders, `task` as on the Hub, `context` in tokens.

    Raises:
        UserError: no such model, unsafe, or its output is no longer what it was when it was exported.
    """

    def __init__(self, name: str, artifact: str | None = None, workers: Workers | None = None, replies: int = REPLIES):
        self.name, self.folder, self.workers = model_id(name), pull(name), workers or Workers()
        self.model = load(self.folder, artifact)
        if (self.model.folder / GOLDEN).is_file():
            self.model.verify()
        self.task, self.artifact, self.context = self.model.task, self.model.artifact, self.model.context
        self._written = self.model.tokenizer
        self._deadline = Deadline(ENCODING_SECONDS)
        self._text = PlainText(self.model.tokenizer, self.context)
        self.model.tokenizer = self._text.tokenizer
        self.warm_up()
        if self.task == "text-generation":
            self._writer = Writer(self.model, self._written.backend_tokenizer, replies)

    def warm_up(self) -> None:
        """One forward, so that the first user does not wait for it."""
        if self.task == "text-generation":
            self.model.generate([self._encode("a") or [0]], max_new_tokens=1)
        elif self.task == "fill-mask":
            self.model.fill(self._text.tokenizer.mask_token)
        elif self.task == "question-answering":
            self.model.answer("Who?", "She.")
        elif self.task == "text-classification":
            self.model.classify(["A text."])
        elif self.task == "feature-extraction":
            self.model.embed(["A text."])
        else:
            self.model.summarize(["A text."], max_new_tokens=1)

    @property
    def chats(self) -> bool:
        """Whether it has a chat template."""
        return self.task == "text-generation" and bool(self._written.chat_template)

    def chat(self, messages: list[dict], sampling: Sampling, emit: Callable) -> Job:
        """Replies to a conversation. Messages have `role` and `content`. Emits `Chunk`s, then `Usage`."""
        self._needs("text-generation")
        messages = [{**message, "content": as_learnt(message["content"])} for message in messages]
        return self._submit([self._deadline.run(self._text.encode_chat, messages)], sampling, emit)

    def complete(self, prompts: str | list[str | list[int]], sampling: Sampling, emit: Callable) -> Job:
        """Continues a text, or several, which may be token ids. Emits `Chunk`s, whose rows count through, then `Usage`."""
        self._needs("text-generation")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        ids = [self._encode(as_learnt(prompt)) if isinstance(prompt, str) else prompt for prompt in prompts]
        prompts = [row or [self._written.bos_token_id or 0] for row in ids]
        return self._submit(prompts, sampling, emit, continues=True)

    def check_question(self, question: str) -> None:
        """Raises UserError for a question that is too long (TooLong), or a model of another task."""
        self._needs("question-answering")
        self._encode(question)  # refuses a book before it is read whole
        room = question_room(self._text.tokenizer, *window_of(self.model.config, self.context))
        check_question(self._deadline.run(self._text.split, question), room)

    def answer(self, question: str, context: str, emit: Callable) -> Job:
        """Finds the answer in a text. Emits the dict of `Model.answer`, with `confidence` that there is one."""
        self.check_question(question)
        self._deadline.run(self._text.split, context)  # only that it can be encoded: it is read in windows

        def run(jobs):
            questions, contexts = (list(texts) for texts in zip(*(job.item for job in jobs), strict=True))
            found = self._answers(questions, contexts, all_cancelled(jobs))
            for job, answer in zip(jobs, found, strict=True):
                job.emit(with_confidence(answer))

        return self.workers.submit(Task(emit, run, (id(self), "answer"), (question, context)))

    def _answers(self, questions: list[str], contexts: list[str], cancelled: Callable[[], bool]) -> list[dict]:
        """As `Model.answer` finds them in texts `as_learnt`, with their places in the texts as they came."""
        found = self.model.answer(list(map(as_learnt, questions)), list(map(as_learnt, contexts)), cancelled=cancelled)
        return [placed(answer, context) for answer, context in zip(found, contexts, strict=True)]

    def answer_from(self, question: str, texts: list[str], emit: Callable) -> Job:
        """Finds the answer in one of several texts, the best first. Emits as `answer`, with the `number` of the text, from 1."""
        self.check_question(question)
        for text in texts:
            self._deadline.run(self._text.split, text)

        def run(jobs):
            found = self._answers([question] * len(texts), texts, all_cancelled(jobs))
            jobs[0].emit(with_confidence(best_answer(found)))

        return self.workers.submit(Task(emit, run))

    def summarize(self, text: str, max_tokens: int, emit: Callable) -> Job:
        """Emits a dict: `summary`. Texts that wait together are summarized together."""
        self._needs("summarization")
        check_summary(self.model.config, max_tokens)
        text = as_learnt(text)
        self._fits(len(self._encode(self.model.summary_prefix + text)))

        def run(jobs):
            texts = [job.item[0] for job in jobs]
            found = self.model.summarize(texts, max_new_tokens=max_tokens, cancelled=all_cancelled(jobs))
            for job, summary in zip(jobs, found, strict=True):
                job.emit({"summary": summary})

        return self.workers.submit(Task(emit, run, (id(self), "summarize", max_tokens), (text,)))

    def fill(self, text: str, top_k: int, emit: Callable) -> Job:
        """Fills one blank, written `[MASK]`, `<mask>` or `___`. Emits the likeliest words with their probability, a list.

        Texts that wait together are filled together.
        """
        self._needs("fill-mask")
        if len(MASK.findall(text)) != 1:
            raise UserError("write [MASK] in the text once, where a word is missing.")
        masked = MASK.sub(self._text.tokenizer.mask_token, as_learnt(text))
        self._fits(len(self._encode(masked)))

        def run(jobs):
            for job, words in zip(jobs, self.model.fill([job.item[0] for job in jobs], top_k), strict=True):
                job.emit(words)

        return self.workers.submit(Task(emit, run, (id(self), "fill", top_k), (masked,)))

    def classify(self, text: str, top_k: int, emit: Callable) -> Job:
        """Emits a list of `label` and `score`, the likeliest first. Texts that wait together are sorted together."""
        self._needs("text-classification")
        text = as_learnt(text)
        self._fits(len(self._encode(text)))

        def run(jobs):
            found = self.model.classify([job.item[0] for job in jobs], cancelled=all_cancelled(jobs))
            for job, labels in zip(jobs, found, strict=True):
                job.emit(labels[: job.item[1]])

        return self.workers.submit(Task(emit, run, (id(self), "classify"), (text, top_k)))

    def embed(self, texts: list[str], emit: Callable) -> Job:
        """Emits a dict: `vectors`, (texts, width) fp32, of length 1 each, and `tokens` that were read; pooled and
        begun as sentence-transformers' files say, where there are any."""
        self._needs("feature-extraction", "fill-mask")
        pooling, prompt = self._as_embedded
        texts = [prompt + as_learnt(text) for text in texts]
        lengths = [len(self._encode(text)) for text in texts]
        for tokens in lengths:
            self._fits(tokens)

        def run(jobs):
            vectors = self.model.embed(list(jobs[0].item), all_cancelled(jobs), pooling)
            jobs[0].emit({"vectors": vectors, "tokens": sum(lengths)})

        return self.workers.submit(Task(emit, run, item=tuple(texts)))

    @cached_property
    def _as_embedded(self) -> tuple[str, str]:
        """How a text's vector is made of its tokens, and what stands before the text."""
        folder = self.model.folder
        try:
            return settings_of(folder, self.model.config)["pooling"], default_prompt(folder)
        except UserError as error:  # it names the folder
            raise UserError(str(error).replace(str(folder), self.name)) from None

    def _encode(self, text: str) -> list[int]:
        return self._deadline.run(self._text.encode, text)

    def _needs(self, *tasks: str) -> None:
        if self.task not in tasks:
            raise UserError(f"{self.name} is a model for {self.task}, not for {' or '.join(tasks)}.")

    def _fits(self, tokens: int, wanted: int = 0) -> None:
        if not tokens:
            raise UserError(
                f"there are no tokens for {self.name}: a text is empty, or the chat template writes nothing of it."
            )
        if tokens + wanted > self.context:
            more = f" and {wanted:,} more are wanted" if wanted else ""
            raise TooLong(f"the text has {tokens:,} tokens{more}; {self.name} reads at most {self.context:,} in all.")

    def _submit(self, prompts: list[list[int]], sampling: Sampling, emit: Callable, continues: bool = False) -> Job:
        known = self.model.config.get_text_config().vocab_size
        for ids in prompts:
            self._fits(len(ids), sampling.max_tokens or 1)
            if max(ids) >= known:
                raise UserError(f"{self.name} knows token ids below {known:,}; this prompt has {max(ids):,}.")
        # The model's own, at which transformers stops, too
        own = getattr(self.model.generation, "stop_strings", None) or ()
        stop = (*sampling.stop, *((own,) if isinstance(own, str) else own))
        # In the letters that models write, too; as they came all the same: some tokenizers write accents apart
        stop = tuple(dict.fromkeys([*stop, *(unicodedata.normalize("NFC", text) for text in stop)]))
        sampling = replace(sampling, stop=stop)
        most = [sampling.max_tokens or min(DEFAULT_MAX_TOKENS, self.context - len(ids)) for ids in prompts]
        return self._writer.submit(TextJob(emit, prompts, most, sampling, continues))


def model_id(name: str) -> str:
    """What clients call a model: the last part of a folder's name, other names as they are."""
    return Path(name).resolve().name if Path(name).expanduser().is_dir() else name


def with_confidence(answer: dict) -> dict:
    """What `Model.answer` found, with `confidence` that there is an answer, from 0 to 1."""
    none, threshold = answer["no_answer_score"], answer["threshold"] or 0.0
    return answer | {"confidence": 1 / (1 + math.exp(min(none - threshold, 700)))}


def all_cancelled(jobs: list[Task]) -> Callable[[], bool]:
    """Tells whether nobody waits for any of them."""
    return lambda: all(job.cancelled.is_set() for job in jobs)


def stream(submit: Callable) -> Iterator:
    """What a job emits, for a caller that may wait: `Chunk`s and the result. Closing it cancels the job.

    Args:
        submit: gets `emit`, returns the job.
    """
    events = SimpleQueue()
    job = submit(events.put)
    try:
        while True:
            event = events.get()
            if isinstance(event, Exception):
                raise event
            if event is not None:
                yield event
                if not isinstance(event, Chunk):
                    return
    finally:
        job.cancel()
