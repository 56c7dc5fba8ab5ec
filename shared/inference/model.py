"""A model as it is used: `generate`, `answer`, `fill`, `summarize`, `classify`, `embed`, whatever runs beneath. Used by
deploy, and by shared/export/export.py to compare what it writes with the original.

    model = load("outputs/chat_sft")  # a run, a folder that shared/export/export.py wrote, or one format of it
    model.generate([model.tokenizer("Hello").input_ids], max_new_tokens=20)

Beneath is PyTorch (safetensors, fp16, int8), ONNX Runtime (onnx, onnx-int8, int4) or LiteRT. Nothing here loads a pickle or
runs code that came with a model.
"""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from shared import UserError
from shared.inference import golden
from shared.inference.batch import Batch, Row
from shared.inference.golden import GOLDEN
from shared.inference.litert_runner import LiteRTRunner
from shared.inference.onnx_runner import OnnxRunner
from shared.inference.positions import check_settings, check_summary, longest_input, mixes_padding
from shared.inference.sampling import check_cancelled
from shared.inference.torch_runner import TASKS, TorchRunner
from shared.publish.hub import pull, refuse_unsafe
from shared.publish.vocabulary import load_tokenizer

# On a CPU, measured: see shared/export/README.md. Files for llama.cpp come late: PyTorch reads them slowly
FASTEST = ("int4", "onnx-int8", "onnx", "int8", "fp16", "merged", "gguf", "gguf-q8_0", "litert")
# All others are PyTorch's
RUNNERS = dict.fromkeys(("int4", "onnx-int8", "onnx"), OnnxRunner) | {"litert": LiteRTRunner}
# What these multiply is rounded by a scale (bitsandbytes: by outliers) of all rows: together, each depends on the others
BY_ITSELF = ("onnx-int8", "int8")
EMBEDS = ("feature-extraction", "fill-mask")  # tasks of encoders whose hidden states stand for a text


def load(folder: Path | str, artifact: str | None = None, task: str | None = None) -> "Model":
    """The fastest artifact of a folder, or the one named.

    Args:
        folder: what shared/export wrote (`export.json`, and a folder for each format that it lists), one of these formats, a run
            of a task (adapters too), or any name that `shared.publish.hub.pull` takes.
        artifact: one of FASTEST, or "safetensors" (the folder's own weights).
        task: where the configuration does not tell it; one of TASKS.

    Raises:
        UserError: no such folder or artifact, a model of another task, or a damaged file.
    """
    folder = pull(str(folder))
    exported = golden.formats(folder)
    here = [name for name in FASTEST if name in exported]
    if not here:
        own = _read(folder / GOLDEN).get("artifact", "safetensors")
        if artifact not in (None, own):
            raise UserError(
                f"{folder} holds {own}, no {artifact}: write it with python -m shared.export {folder} --to {artifact} "
                f"--output {folder.name}-export"
            )
        return Model(folder, own, task)
    if artifact is not None and artifact not in here:
        raise UserError(f"{folder} holds {', '.join(here)}, no {artifact}.")
    artifact = artifact or here[0]
    refuse_unsafe(folder / artifact, str(folder / artifact))
    return Model(folder / artifact, artifact, task)


def task_of(folder: Path) -> str:
    """The task that a checkpoint was trained for, from its architecture by optimum's TasksManager; one of TASKS.

    Raises:
        UserError: another task, or no configuration.
    """
    if (folder / "adapter_config.json").is_file():
        kind = _read(folder / "adapter_config.json").get("task_type")
        if kind == "CAUSAL_LM":
            return "text-generation"
        raise UserError(f"{folder}: an adapter for {kind}; expected one for a causal language model (CAUSAL_LM).")
    config = _read(folder / "config.json")
    if not config:
        raise UserError(f"{folder}: no config.json, so no model; name a run, an exported model or org/name on the Hub.")
    import transformers
    from optimum.exporters.tasks import TasksManager
    from transformers.models.auto import modeling_auto

    name, found = (config.get("architectures") or [""])[0], None
    with contextlib.suppress(AttributeError, ValueError):
        found = TasksManager.infer_task_from_model(getattr(transformers, name))
    if name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values() and found not in TASKS:
        found = "text-generation"  # Gemma 3 and its like, which see pictures too
    # The manager takes a BART for a masked language model; one that sorts texts (bart-large-mnli) writes none
    writes = name in modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()
    if config.get("is_encoder_decoder") and (writes or found == "feature-extraction"):
        found = "summarization"
    if found not in TASKS:
        raise UserError(
            f"{folder}: {name or config.get('model_type')} is a model for {found or 'an unknown task'}; expected one for "
            f"{', '.join(TASKS)}. A model whose configuration names no architecture needs --task."
        )
    return found


class Model:
    """One artifact, loaded. Calls may come from several threads.

    Attributes:
        folder, task, artifact: as in `load`.
        tokenizer, config, generation: transformers' tokenizer, configuration and GenerationConfig.
        context: most tokens that the model reads, those it writes included where it has no encoder.
        stop_ids: token ids that end a text.
    """

    def __init__(self, folder: Path, artifact: str, task: str | None = None):
        self.folder, self.artifact = folder, artifact
        try:
            self.task = task or task_of(folder)
            if self.task not in TASKS:
                raise UserError(f"--task {self.task}: expected one of {', '.join(TASKS)}.")
            self.tokenizer = load_tokenizer(folder, adapter=True)
            self._runner = RUNNERS.get(artifact, TorchRunner)(folder, self.task)
        except UserError:
            raise
        except Exception as error:  # each library has classes of its own for a file that it cannot read
            reason = (str(error).strip().splitlines() or [""])[0][:160]
            raise UserError(
                f"{folder}: this model cannot be loaded; one of its files is damaged, missing, or of another model "
                f"({type(error).__name__}: {reason})."
            ) from error
        self.config, self.generation = self._runner.config, self._runner.generation
        self.device = getattr(self._runner, "device", torch.device("cpu"))
        # Of positions without an end what most were trained on: T5, and texts of BLOOM and Mamba
        self.context = longest_input(self.config, self.tokenizer) or (2048 if self.task == "text-generation" else 512)
        self.context -= getattr(self._runner, "virtual", 0)
        self.context = min(self.context, getattr(self._runner, "length", self.context))
        ends = self.generation.eos_token_id if self.generation else None
        ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
        # A fine-tuned model's turns often end at the tokenizer's, while the settings of its base still stand beside it
        self.stop_ids = tuple(i for i in dict.fromkeys([*ends, self.tokenizer.eos_token_id]) if i is not None)
        if not all(isinstance(i, int) for i in self.stop_ids):
            raise UserError(f"{folder}: eos_token_id of its configuration is {list(self.stop_ids)}, expected numbers.")
        if self.task == "summarization":
            check_settings(folder, lambda: self.summary_ids(["a"], max_new_tokens=2))

    def generate(
        self,
        ids: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        stop_ids: Iterable[int] = (),
        on_token: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        """Continues each row; all rows run as one batch.

        Args:
            ids: prompts as token ids; rows of unequal length are padded on the left.
            max_new_tokens: of each row; fewer where `context` is reached.
            temperature: 0 takes the likeliest token. Above, `top_p` is the share of the probability that is drawn from.
            repetition_penalty: divides the scores of tokens that the row already holds (Keskar et al. 2019).
            seed: the same seed gives the same tokens, whatever other rows there are; row `i` uses seed + i.
            stop_ids: end a row in addition to `self.stop_ids`.
            on_token: called with row and token id after each token, not for the one that ends a row.
            cancelled: asked before each token and between chunks of a prompt; True ends the call, which returns what there is.

        Returns:
            New token ids of each row, without the one that ended it.

        Raises:
            UserError: an empty prompt, or one that leaves no room in `context`.
        """
        if self.task != "text-generation":
            raise UserError(f"{self.folder} is a model for {self.task}: it does not continue texts.")
        longest = max(map(len, ids), default=0)
        if not ids or not all(len(row) for row in ids):
            raise UserError("an empty prompt: give at least one token.")
        room = self.context - longest
        if room < 1:
            raise UserError(f"the prompt has {longest:,} tokens; this model reads fewer than {self.context:,}.")
        ends = {*self.stop_ids, *stop_ids}
        rows = [
            Row(
                prompt,
                min(max_new_tokens, room),
                ends,
                temperature,
                top_p,
                repetition_penalty,
                torch.Generator().manual_seed(seed + i) if seed is not None else None,
                functools.partial(on_token, i) if on_token is not None else None,
                cancelled,
            )
            for i, prompt in enumerate(ids)
        ]
        if max_new_tokens > 0:
            batch = self.batch()
            batch.add(rows)
            while batch.rows or batch.reading:
                for row in batch.step():
                    if row.error is not None:
                        raise row.error
        return [row.written for row in rows]

    def batch(self) -> Batch:
        """For rows that come and go; see batch.py."""
        return Batch(self._runner, self.tokenizer.pad_token_id or 0)

    def logits(self, ids: Sequence[Sequence[int]]) -> list[np.ndarray]:
        """Scores of each next token: one (tokens, vocabulary) fp32 array a row."""
        return [self._runner.logits(row) for row in ids]

    def answer(
        self,
        question: str | list[str],
        context: str | list[str],
        cancelled: Callable[[], bool] | None = None,
        cut: bool = False,
    ) -> dict | list[dict]:
        """The best answer of each context to its question, found as tasks/qa_squad trains and evaluates it.

        Returns:
            For each: `answer` ("" where the text holds none), `start` and `end` (characters of the context), `score` (sum of
            the logits of its first and last token), `no_answer_score` (how much better "no answer" fits than the best span) and
            `threshold` of the latter, None where the model was trained on questions that all have an answer.

        Raises:
            TooLong: a question that leaves no room for its context; with `cut`, to measure, it is cut as in training.
            Cancelled: `cancelled`, asked between batches, was true.
        """
        from shared.inference.qa_windows import decode, make_windows, strip_blanks, window_of

        if self.task != "question-answering":
            raise UserError(f"{self.folder} is a model for {self.task}: it does not answer questions about a text.")
        questions = [question] if isinstance(question, str) else question
        contexts = [context] if isinstance(context, str) else context
        nothing = {"text": [], "answer_start": []}
        rows = [{"question": q, "context": c, "answers": nothing} for q, c in zip(questions, contexts, strict=True)]
        if not rows:
            return []
        windows = make_windows(rows, self.tokenizer, *window_of(self.config, self.context), cut)
        start, end = (np.empty(len(windows.ids), np.float32) for _ in range(2))
        for batch in self._batches(np.diff(windows.starts)):
            check_cancelled(cancelled)
            scores = self._encode(
                [windows[i]["input_ids"] for i in batch], [windows[i]["token_type_ids"] for i in batch]
            )
            for i, first, last in zip(batch, *scores, strict=True):
                inside = slice(windows.starts[i], windows.starts[i + 1])
                start[inside], end[inside] = (values[: inside.stop - inside.start] for values in (first, last))
        found = decode(windows, start, end, max_answer_length=getattr(self.config, "max_answer_length", 30))
        strip_blanks(found, contexts)
        threshold = getattr(self.config, "no_answer_threshold", None)
        answers = []
        for i, row in enumerate(rows):
            first, last, none = int(found["first"][i]), int(found["last"][i]), float(found["no_answer"][i])
            if threshold is not None and none > threshold:
                first = last = 0
            text, score = row["context"][first:last], float(found["score"][i])
            entry = {"answer": text, "start": first, "end": last, "score": score if np.isfinite(score) else None}
            answers.append(entry | {"no_answer_score": none, "threshold": threshold})
        return answers[0] if isinstance(question, str) else answers

    def fill(self, text: str | list[str], top_k: int = 5) -> list:
        """The likeliest words for the mask of a text, best first; of a list of texts one result each.

        Returns:
            `token`, `token_str`, `score` (probability) and `sequence` of each, as transformers' pipeline names them; for several
            masks one such list a mask.

        Raises:
            UserError: no mask in a text.
        """
        if self.task != "fill-mask":
            raise UserError(f"{self.folder} is a model for {self.task}: it does not fill in words.")
        texts = [text] if isinstance(text, str) else text
        ids = [np.array(self.tokenizer(each, truncation=True, max_length=self.context)["input_ids"]) for each in texts]
        filled = [None] * len(texts)
        for batch in self._batches(np.array([len(row) for row in ids]), 1024):  # times the vocabulary: 125 MB of BERT's
            (scores,) = self._encode([ids[i] for i in batch], [np.zeros_like(ids[i]) for i in batch])
            for i, logits in zip(batch, scores, strict=True):
                filled[i] = self._filled(ids[i], logits, top_k)
        return filled[0] if isinstance(text, str) else filled

    def _filled(self, ids: np.ndarray, logits: np.ndarray, top_k: int) -> list:
        """The guesses of one text: (tokens,) ids, and (at least as many, vocabulary) scores."""
        masks = np.flatnonzero(ids == self.tokenizer.mask_token_id)
        if not len(masks):
            raise UserError(f"the text holds no {self.tokenizer.mask_token}: write it where a word is to be filled in.")
        filled = []
        for place in masks:
            scores, tokens = torch.from_numpy(logits[place]).softmax(-1).topk(top_k)
            guesses = []
            for token, score in zip(tokens.tolist(), scores.tolist(), strict=True):
                whole = [*ids[:place], token, *ids[place + 1 :]]
                sequence = self.tokenizer.decode(whole, skip_special_tokens=True)
                guess = {"token": token, "token_str": self.tokenizer.decode([token]), "score": score}
                guesses.append(guess | {"sequence": sequence})
            filled.append(guesses)
        return filled[0] if len(filled) == 1 else filled

    def classify(self, texts: list[str], cancelled: Callable[[], bool] | None = None) -> list[list[dict]]:
        """The classes of each text, likeliest first: `label` and `score`, as transformers' pipeline gives them.

        The score is a probability among the classes; of a model for several labels at once, one for each; of a regression, the
        value.

        Raises:
            Cancelled: `cancelled`, asked between batches, was true.
        """
        if self.task != "text-classification":
            raise UserError(f"{self.folder} is a model for {self.task}: it does not sort texts.")
        found = [None] * len(texts)
        kind = self.config.problem_type
        for batch, encoded in self._encoded(texts, cancelled):
            scores = torch.from_numpy(self._runner.encode(encoded)[0])
            if kind == "multi_label_classification" or (kind != "regression" and self.config.num_labels == 1):
                scores = scores.sigmoid()
            elif kind != "regression":
                scores = scores.softmax(-1)
            for i, row in zip(batch, scores.tolist(), strict=True):
                labels = [{"label": self.config.id2label[n], "score": score} for n, score in enumerate(row)]
                found[i] = sorted(labels, key=lambda each: -each["score"])
        return found

    def embed(self, texts: list[str], cancelled: Callable[[], bool] | None = None, pooling: str = "mean") -> np.ndarray:
        """A vector of length 1 for each text, (texts, width) fp32: the mean of its tokens' last hidden states, or (`cls`) that of
        its first one.

        Raises:
            Cancelled: `cancelled`, asked between batches, was true.
        """
        if self.task not in EMBEDS or self.artifact in RUNNERS:
            raise UserError(
                f"{self.folder} is a model for {self.task} ({self.artifact}): embeddings come from an encoder in PyTorch, for "
                f"{' or '.join(EMBEDS)}."
            )
        vectors = [None] * len(texts)
        for batch, encoded in self._encoded(texts, cancelled):
            hidden, mask = self._runner.hidden_states(encoded), encoded["attention_mask"][:, :, None]
            pooled = hidden[:, 0] if pooling == "cls" else (hidden * mask).sum(1) / mask.sum(1)
            for i, vector in zip(batch, pooled / np.linalg.norm(pooled, axis=1, keepdims=True), strict=True):
                vectors[i] = vector
        return np.stack(vectors).astype(np.float32)

    def _encoded(self, texts: list[str], cancelled):
        """Batches of texts of about equal length: numbers of the texts, and inputs of an encoder."""
        ids = [np.array(self.tokenizer(each, truncation=True, max_length=self.context)["input_ids"]) for each in texts]
        for batch in self._batches(np.array([len(row) for row in ids])):
            check_cancelled(cancelled)
            yield batch, self._padded([ids[i] for i in batch], [np.zeros_like(ids[i]) for i in batch])

    def summarize(
        self,
        texts: list[str],
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[str]:
        """A summary of each text, by the model's generation settings but for those given; what does not fit is cut off.

        `cancelled` is asked before each token; True ends the call, which returns what there is.
        """
        together = [texts] if texts else []
        parts = [[text] for text in texts] if self.artifact in BY_ITSELF else together
        found = [ids for part in parts for ids in self.summary_ids(part, max_new_tokens, num_beams, cancelled)]
        return [text.strip() for text in self.tokenizer.batch_decode(found, skip_special_tokens=True)]

    @property
    def summary_prefix(self) -> str:
        """What stands before each text to summarize: T5's "summarize: ", nothing for most."""
        settings = (getattr(self.config, "task_specific_params", None) or {}).get("summarization", {})
        return settings.get("prefix", "")

    def summary_ids(
        self,
        texts: list[str],
        max_new_tokens: int | None = None,
        num_beams: int | None = None,
        cancelled: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        """`summarize` as token ids, padding removed. Raises TooLong: more new tokens than the model can write."""
        if self.task != "summarization":
            raise UserError(f"{self.folder} is a model for {self.task}: it does not summarize.")
        check_summary(self.config, max_new_tokens or 0)
        batch = self.tokenizer(
            [self.summary_prefix + text for text in texts],
            truncation=True,
            max_length=self.context,
            padding=True,
            return_tensors="pt",
        )
        changes = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
        changes = {name: value for name, value in changes.items() if value is not None}
        changes |= {"num_return_sequences": 1, "return_dict_in_generate": False}  # one, whatever the settings say
        if cancelled is not None:
            changes["stopping_criteria"] = [lambda ids, scores: torch.full((len(ids),), cancelled(), device=ids.device)]
        out = self._runner.seq2seq(batch["input_ids"], batch["attention_mask"], changes)
        return [[t for t in row if t != self.tokenizer.pad_token_id] for row in out.tolist()]

    def verify(self) -> None:
        """Replays the golden set of the folder; see golden.py. Raises UserError where the model is not what was exported."""
        golden.verify(self)

    def prompt_ids(self, prompt) -> list[int]:
        """Token ids of a golden prompt: messages are rendered by the chat template, a question is paired with its context."""
        if isinstance(prompt, list):
            return self.tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        if isinstance(prompt, dict):
            return self.tokenizer(
                prompt["question"], prompt["context"], truncation="only_second", max_length=self.context
            )["input_ids"]
        return self.tokenizer(prompt, truncation=True, max_length=self.context)["input_ids"]

    def _batches(self, lengths: np.ndarray, tokens: int = 4096) -> list[np.ndarray]:
        """Numbers of an encoder's rows of about equal length, at most `tokens` with their padding in each batch; one in each
        where rows together are computed otherwise than alone."""
        batches, batch, alone = [], [], self.artifact in BY_ITSELF or mixes_padding(self.config)
        for i in np.argsort(-lengths, kind="stable"):
            if batch and (alone or (len(batch) + 1) * lengths[batch[0]] > tokens):
                batches.append(np.array(batch))
                batch = []
            batch.append(i)
        return [*batches, np.array(batch)] if batch else batches

    def _encode(self, ids: list[np.ndarray], types: list[np.ndarray]) -> tuple[np.ndarray, ...]:
        """Outputs of an encoder for windows padded on the right: each (windows, longest window)."""
        return self._runner.encode(self._padded(ids, types))

    def _padded(self, ids: list[np.ndarray], types: list[np.ndarray]) -> dict[str, np.ndarray]:
        """Inputs of an encoder, each (rows, longest row), padded on the right."""
        longest = max(map(len, ids))
        pad = getattr(self.config.get_text_config(), "pad_token_id", None) or 0  # what a decoder's class looks for
        batch = {
            "input_ids": np.stack([np.pad(x, (0, longest - len(x)), constant_values=pad) for x in ids]),
            "token_type_ids": np.stack([np.pad(x, (0, longest - len(x))) for x in types]),
            "attention_mask": np.stack([np.arange(longest) < len(x) for x in ids]),
        }
        if "token_type_ids" not in self.tokenizer.model_input_names:
            del batch["token_type_ids"]
        return {name: values.astype(np.int64) for name, values in batch.items()}


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf8")) if path.is_file() else {}
