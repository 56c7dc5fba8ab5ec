"""Texts as vectors whose product is their likeness. Called by index.py; tasks that train an encoder use `pool` and `save`."""

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from shared import UserError
from shared.publish.results import file_digest
from shared.publish.vocabulary import load_tokenizer

MAX_LENGTH = 256  # tokens; what sentence-transformers' MiniLM reads
SETTINGS = {"pooling": "mean", "question_prompt": "", "passage_prompt": "", "max_length": MAX_LENGTH}


def pool(hidden: torch.Tensor, lengths: torch.Tensor, pooling: str) -> torch.Tensor:
    """One vector of length 1 for each text, in fp32.

    Args:
        hidden: (tokens, width), the tokens of all texts one after the other, without padding.
        lengths: (texts,) tokens of each.
        pooling: `mean` of a text's tokens, or its first one (`cls`).
    """
    hidden = hidden.float()
    if pooling == "cls":
        return F.normalize(hidden[F.pad(lengths.cumsum(0), (1, 0))[:-1]], dim=-1)
    text = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
    sums = hidden.new_zeros(len(lengths), hidden.shape[-1]).index_add(0, text, hidden)
    return F.normalize(sums, dim=-1)  # of a sum and of a mean it is the same


class Encoder:
    """An encoder in a folder: one that tasks/rag_docs left, one of sentence-transformers, or any with a mean of its tokens."""

    def __init__(self, folder: Path, device: str = "cpu"):
        """Raises UserError for a folder without an encoder or its tokenizer."""
        from transformers import AutoModel

        try:
            self.model = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
            self.tokenizer = load_tokenizer(folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{folder}: holds no encoder ({str(error).splitlines()[0][:150]}).") from error
        self.folder, self.model = Path(folder), self.model.to(device).eval()
        self.settings = settings_of(self.folder, self.model.config)
        self.width = self.model.config.hidden_size

    @cached_property
    def digest(self) -> str:
        """Of the weights and of all that changes a vector: an index made with another one is refused."""
        weights = [file_digest(path) for path in sorted(self.folder.glob("*.safetensors"))]
        return hashlib.sha256(json.dumps([weights, self.settings], sort_keys=True).encode()).hexdigest()

    @torch.no_grad()
    def encode(self, texts: Sequence[str], kind: str, batch_size: int = 16) -> np.ndarray:
        """(texts, width) vectors of length 1, float32.

        Args:
            kind: `question` or `passage`; some encoders were trained with other words before each.
        """
        ids = tokenize(self.tokenizer, texts, self.settings[f"{kind}_prompt"], self.settings["max_length"])
        vectors = np.zeros((len(ids), self.width), dtype=np.float32)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))  # of like lengths together, little is padded
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in numbers]}, return_tensors="pt").to(
                self.model.device
            )
            mask = batch["attention_mask"].bool()
            vectors[numbers] = pool(
                self.model(**batch).last_hidden_state[mask], mask.sum(1), self.settings["pooling"]
            ).cpu()
        return vectors


def tokenize(tokenizer, texts: Sequence[str], prompt: str, max_length: int) -> list[list[int]]:
    """Token ids of each text with the prompt before it, cut to `max_length`; no text is empty for the model."""
    longest = 20 * max_length  # characters; a tokenizer reads all of a text before it cuts
    return tokenizer([prompt + text[:longest] for text in texts], truncation=True, max_length=max_length)["input_ids"]


def settings_of(folder: Path, config) -> dict:
    """SETTINGS of an encoder: from its config.json, else from sentence-transformers' files, else by default.

    Raises:
        UserError: sentence-transformers would make its vectors in another way.
    """
    found = dict(SETTINGS)
    if (given := _read(folder / "sentence_bert_config.json").get("max_seq_length")) and int(given) > 1:
        found["max_length"] = int(given)
    found["pooling"] = _pooling(folder)
    prompts = _read(folder / "config_sentence_transformers.json").get("prompts") or {}
    for kind, names in (("question", ("query",)), ("passage", ("document", "passage"))):
        found[f"{kind}_prompt"] = next((prompts[name] for name in names if prompts.get(name)), "")
    found |= getattr(config, "retrieval", None) or {}
    longest = getattr(config, "max_position_embeddings", None)
    return found | ({"max_length": min(found["max_length"], longest)} if longest else {})


def default_prompt(folder: Path) -> str:
    """What sentence-transformers' `encode` puts before each text where nobody says whether it is a question or a passage."""
    about = _read(folder / "config_sentence_transformers.json")
    return (about.get("prompts") or {}).get(about.get("default_prompt_name")) or ""


# sentence-transformers' names, before its version 6 a yes or no for each, since then one or several
BEFORE = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max"}
BEFORE |= {"pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens", "pooling_mode_lasttoken": "lasttoken"}
BEFORE |= {"pooling_mode_weightedmean_tokens": "weightedmean"}


def _pooling(folder: Path) -> str:
    """`mean` or `cls`, as sentence-transformers' files say it."""
    given, modules = _read(folder / "1_Pooling" / "config.json"), _read(folder / "modules.json", list)
    ways = given.get("pooling_mode") or [way for name, way in BEFORE.items() if given.get(name)] or "mean"
    ways = [ways] if isinstance(ways, str) else ways
    kinds = [str(each.get("type")).rpartition(".")[2] for each in modules if isinstance(each, dict)]
    more = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if more or ways not in (["mean"], ["cls"]):
        what = f"come through a layer {more[0]}" if more else f"are made of the tokens by {', '.join(ways)}"
        raise UserError(f"{folder}: its vectors {what}; here they are the mean of the tokens or the first one (cls).")
    return ways[0]


def _read(path: Path, kind: type = dict):
    try:
        found = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError):
        return kind()
    return found if isinstance(found, kind) else kind()


def save_settings(folder: Path, settings: dict, width: int) -> None:
    """The files beside a saved encoder by which `SentenceTransformer(folder)` gives the vectors of `Encoder`."""
    mean = settings["pooling"] == "mean"
    modules = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    files = {
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
            for i, (name, path) in enumerate(modules)
        ],
        "sentence_bert_config.json": {"max_seq_length": settings["max_length"], "do_lower_case": False},
        "config_sentence_transformers.json": {
            "prompts": {"query": settings["question_prompt"], "document": settings["passage_prompt"]},
            "similarity_fn_name": "cosine",
        },
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_cls_token": not mean,
            "pooling_mode_mean_tokens": mean,
        },
        "2_Normalize/config.json": {},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content, indent=2), encoding="utf8")
