"""Which models can be chosen on the page, and loading the one that was. Called by app.py and its pages."""

import json
import os
from pathlib import Path

import streamlit as st

from deploy.admission import is_loopback
from deploy.inference import DEFAULT_MODEL, Engine
from deploy.texts import t
from deploy.workers import Workers
from shared import UserError
from shared.publish.hub import pull


@st.cache_resource
def workers() -> Workers:
    """Threads that all sessions share."""
    return Workers()


@st.cache_resource(max_entries=4, show_spinner=False)
def load(name: str, changed: float) -> Engine:
    """One model for all sessions, loaded again when its folder has changed. Raises UserError."""
    base = None if Path(name).is_dir() else base_name(pull(name))
    if base:  # somebody else's adapter names no folder of this server
        refuse_folder(base)
    return Engine(name, workers=workers())


def engine_of(name: str) -> Engine:
    """The model of that name. Raises UserError."""
    files = (*Path(name).glob("*.safetensors"), Path(name) / "export.json") if Path(name).is_dir() else ()
    weights = [path.stat().st_mtime for path in files if path.is_file()]
    with st.spinner(t("loading", f"`{shown_name(name)}`")):
        return load(name, max(weights, default=0.0))


def offered() -> list[str]:
    """The names in TASKBOOK_MODELS; none means that any may be typed."""
    return os.environ.get("TASKBOOK_MODELS", "").split()


def is_exposed() -> bool:
    """Whether other machines reach this page, so that anybody may choose what is loaded here."""
    return not offered() and not is_loopback(st.get_option("server.address") or "")


def refuse_foreign(name: str) -> None:
    """Where models are offered, only these; else a run in outputs/, a model of the Hub or a packaged one.

    The box on the page is no guard: what a browser sends need not be one of its options.

    Raises:
        UserError: another model, a folder outside outputs/, or what may be one.
    """
    if offered():
        if name not in names_for(None):
            raise UserError(t("not_offered"))
    else:
        refuse_folder(name)


def refuse_folder(name: str) -> None:
    """Raises UserError for a folder outside outputs/, or what may be one: no visitor opens it by typing its name."""
    path = Path(name)
    inside = Path(os.path.abspath(path)).is_relative_to(Path("outputs").absolute())
    # With `..`, what the path means depends on links: it is not looked at
    if ".." in path.parts or name.startswith(("/", "~", ".")) and not inside or path.exists() and not inside:
        raise UserError("a folder outside outputs/ is opened only if the page was started with it: TASKBOOK_MODELS.")


def names_for(task: str | None) -> list[str]:
    """Models to choose from: those of TASKBOOK_MODELS, or the runs in outputs/, the newest first, and the packaged one."""
    named = offered()
    folders = [Path(name) for name in named if Path(name).is_dir()]
    if not named:
        folders = [path for path in Path("outputs").glob("*") if path.is_dir() and not path.name.startswith(".")]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        folders.sort(key=lambda path: path.name != "chat_sft")  # what `make demo` leaves comes first
    found = [str(path) for path in folders if task_of(path) and task in (None, task_of(path))]
    others = [name for name in named if not Path(name).is_dir()] if named else [DEFAULT_MODEL]
    return found + [name for name in others if named or task in (None, "text-generation")]


def shown_name(name: str, among: list[str] = ()) -> str:
    """Of a folder its last part, or as much as tells it from the others: where it lies on the server is nobody's business."""
    if not Path(name).is_dir() and not name.startswith(("/", "~", ".")):
        return name
    parts = Path(name).parts
    others = [Path(each).parts for each in among if each != name]
    length = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), 1)
    return "/".join(parts[-length:])


def task_of(folder: Path) -> str | None:
    """What a folder in outputs/ is for, at a glance; nothing is loaded."""
    if (folder / "adapter_config.json").is_file():
        return "text-generation"
    if exported := read_json(folder / "export.json").get("task"):
        return exported
    config = read_json(folder / "config.json")
    name = str((config.get("architectures") or [""])[0])
    ends = {
        "ForQuestionAnswering": "question-answering",
        "ForMaskedLM": "fill-mask",
        "ForSequenceClassification": "text-classification",
        # One without an encoder sees pictures too, as Gemma 3, and chats
        "ForConditionalGeneration": "summarization" if config.get("is_encoder_decoder") else "text-generation",
        "MTModel": "summarization",  # Marian's
        "LMHeadModel": "text-generation",
        "ForCausalLM": "text-generation",
    }
    return next((task for end, task in ends.items() if name.endswith(end)), None)


def base_name(folder: Path) -> str | None:
    """The model that an adapter was trained on."""
    return read_json(folder / "adapter_config.json").get("base_model_name_or_path")


def read_json(path: Path) -> dict:
    """Content of a file; nothing where there is none, or a damaged one."""
    try:
        content = json.loads(path.read_text("utf8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
