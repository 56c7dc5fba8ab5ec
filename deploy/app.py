"""A page to try models on: chat, summaries, answers in a text, missing words, labels. In English and Vietnamese.

    python -m streamlit run deploy/app.py                        # or: make chat
    TASKBOOK_MODELS="pypi:smollm2-135m-instruct" python -m streamlit run deploy/app.py      # only these can be chosen

A model is loaded once for all sessions; what is typed stays in its session. What models write is shown as text with Markdown:
never as HTML, and no image is fetched.
"""

import json
import logging
import os
import re
import time
import traceback
from contextlib import ExitStack, closing
from pathlib import Path

import streamlit as st

from deploy.admission import is_loopback
from deploy.inference import DEFAULT_MODEL, Chunk, Engine, Sampling, Workers, stream
from deploy.texts import EXAMPLE, PAGES, TEXTS, TRAINED_BY
from shared import UserError
from shared.publish.redact import without_paths

log = logging.getLogger("deploy")


def t(key: str, *values) -> str:
    """A label in the language of the session."""
    return TEXTS[key][st.session_state.get("language") == "vi"].format(*values)


def as_markdown(text: str) -> str:
    """What a model or a card says, for st.markdown: no image, no formula out of two dollar signs, no icons or colours."""
    text = text.replace("![", "!\u2060[")  # an image would be fetched from wherever it says
    parts = re.split(r"(```.*?(?:```|\Z)|`[^`\n]+`)", text, flags=re.DOTALL)
    return "".join(part if i % 2 else re.sub(r"\$|:(?=[\w/-]+[:\[])", r"\\\g<0>", part) for i, part in enumerate(parts))


def literally(text: str) -> str:
    """Text whose every character is shown as it is by st.markdown."""
    return re.sub(r"([\\`*_{}\[\]()#+\-.!|<>~$:&])", r"\\\1", text).replace("\n", "  \n")


@st.cache_resource
def workers() -> Workers:
    """Threads that all sessions share."""
    return Workers(2)


@st.cache_resource(max_entries=4, show_spinner=False)
def load(name: str, changed: float) -> Engine:
    """One model for all sessions, loaded again when its folder has changed."""
    return Engine(name, workers=workers())


def refuse_foreign_folder(name: str) -> None:
    """A typed name is a run in outputs/, a model of the Hub or a packaged one: no visitor opens another folder of the server.

    Raises:
        UserError: a folder, or what may be one, that is not offered.
    """
    path = Path(os.path.abspath(os.path.expanduser(name)))
    inside = path.is_relative_to(Path("outputs").absolute())
    if (path.exists() or name.startswith((".", "/", "~"))) and not inside and name not in names_for(None):
        raise UserError("a folder outside outputs/ is opened only if the page was started with it: TASKBOOK_MODELS.")


def is_exposed() -> bool:
    """Whether other machines reach this page, so that anybody may choose what is loaded here."""
    return not os.environ.get("TASKBOOK_MODELS") and not is_loopback(st.get_option("server.address") or "")


def engine_of(name: str) -> Engine:
    """The model of that name. Raises UserError."""
    files = (*Path(name).glob("*.safetensors"), Path(name) / "export.json") if Path(name).is_dir() else ()
    weights = [path.stat().st_mtime for path in files if path.is_file()]
    with st.spinner(t("loading", f"`{name}`")):
        return load(name, max(weights, default=0.0))


def read_json(path: Path) -> dict:
    """Content of a file, or nothing."""
    return json.loads(path.read_text("utf8")) if path.is_file() else {}


def task_of(folder: Path) -> str | None:
    """What a folder in outputs/ is for, at a glance; nothing is loaded."""
    if (folder / "adapter_config.json").is_file():
        return "text-generation"
    if exported := read_json(folder / "export.json").get("task"):
        return exported
    name = (read_json(folder / "config.json").get("architectures") or [""])[0]
    ends = {
        "ForQuestionAnswering": "question-answering",
        "ForMaskedLM": "fill-mask",
        "ForSequenceClassification": "text-classification",
        "ForConditionalGeneration": "summarization",
        "LMHeadModel": "text-generation",
        "ForCausalLM": "text-generation",
    }
    return next((task for end, task in ends.items() if name.endswith(end)), None)


def names_for(task: str | None) -> list[str]:
    """Models to choose from: those of TASKBOOK_MODELS, or the runs in outputs/, the newest first, and the packaged one."""
    named = os.environ.get("TASKBOOK_MODELS", "").split()
    folders = [Path(name) for name in named if Path(name).is_dir()]
    if not named:
        folders = [path for path in Path("outputs").glob("*") if path.is_dir() and not path.name.startswith(".")]
        folders.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        folders.sort(key=lambda path: path.name != "chat_sft")  # what `make demo` leaves comes first
    found = [str(path) for path in folders if task_of(path) and task in (None, task_of(path))]
    others = [name for name in named if not Path(name).is_dir()] if named else [DEFAULT_MODEL]
    return found + [name for name in others if named or task in (None, "text-generation")]


def choose_model(page: str) -> str | None:
    """The side bar's box; remembered for each page."""
    options = names_for(PAGES[page][0])
    free = not os.environ.get("TASKBOOK_MODELS")
    return st.selectbox(
        t("which"),
        options,
        key=f"model of {page}",
        index=0 if options else None,
        accept_new_options=free,
        placeholder="org/name",
        help=t("which_help") if free else None,
        format_func=lambda name: Path(name).name if name.startswith("outputs/") else name,
    )


def chat_page(engine: Engine) -> None:
    """Conversation, newest below; the reply appears as it is written."""
    chat = st.session_state.setdefault("chat", [])
    with st.sidebar:
        base = base_of(engine) if st.session_state.get("compare") else None
        if base_name(engine):
            st.toggle(t("compare"), key="compare")
        st.text_area(t("system"), key="system", height=80)
        with st.expander(t("sampling"), icon=":material/tune:"):
            sampling = Sampling(
                temperature=st.slider(t("temperature"), 0.0, 2.0, 0.7, 0.05),
                top_p=st.slider(t("top_p"), 0.05, 1.0, 0.95, 0.05),
                repetition_penalty=st.slider(t("penalty"), 1.0, 2.0, 1.1, 0.05),
                max_tokens=st.slider(
                    t("max_tokens"), 16, min(2048, engine.context // 2), min(256, engine.context // 2)
                ),
            )
        if chat and st.button(t("clear"), icon=":material/delete:", width="stretch"):
            chat.clear()
            st.rerun()
    if not engine.chats:
        return complete_page(engine, sampling)
    said = st.chat_input(t("say"))
    if said:
        st.session_state.editing = False
        chat.append({"role": "user", "content": said})
    if not chat:
        st.subheader(t("hello"))
        st.caption(t("hello_more"))
        with st.container(horizontal=True, gap="small"):
            for text in t("starters").split("|"):
                if st.button(text):
                    chat.append({"role": "user", "content": text})
                    st.rerun()
    for message in chat:
        show_message(message)
    if not chat:
        return
    if chat[-1]["role"] == "user":
        return reply(chat, [engine, base] if base else [engine], sampling)
    last = max(i for i, message in enumerate(chat) if message["role"] == "user")
    if st.session_state.get("editing"):
        with st.form("edit", border=True):
            text = st.text_area(t("edit"), chat[last]["content"], label_visibility="collapsed")
            left, right, _ = st.columns([1, 1, 3])
            sent = left.form_submit_button(t("send"), type="primary", width="stretch")
            if right.form_submit_button(t("cancel"), width="stretch") or sent:
                st.session_state.editing = False
                if sent and text.strip():
                    chat[last:] = [{"role": "user", "content": text}]
                st.rerun()
        return
    with st.container(horizontal=True, gap="small"):
        if st.button(t("again"), icon=":material/refresh:", type="tertiary"):
            del chat[last + 1 :]
            st.rerun()
        if st.button(t("edit"), icon=":material/edit:", type="tertiary"):
            st.session_state.editing = True
            st.rerun()


def show_message(message: dict) -> None:
    """One turn; a reply that was compared stands beside that of the base model."""
    with st.chat_message(
        message["role"], avatar=":material/person:" if message["role"] == "user" else ":material/smart_toy:"
    ):
        if message["role"] == "user":
            return st.markdown(literally(message["content"]))
        columns = st.columns(len(message["replies"]))
        for column, each, title in zip(columns, message["replies"], ("tuned", "base"), strict=False):
            with column:
                if len(columns) > 1:
                    st.caption(f"**{t(title)}**")
                st.markdown(as_markdown(each["text"]) or f"*{t('nothing')}*")
                st.caption(t("speed", each["tokens"], each["rate"]) + ("" if each["whole"] else f" · {t('stopped')}"))


def reply(chat: list[dict], engines: list[Engine], sampling: Sampling) -> None:
    """Streams the next turn. Any click ends this run of the page: the generation stops and what there is stays in the chat."""
    replies = [{"text": "", "tokens": 0, "rate": 0.0, "whole": False} for _ in engines]
    histories = [history(chat, i) for i in range(len(engines))]
    with st.chat_message("assistant", avatar=":material/smart_toy:"):
        columns = st.columns(len(engines))
        for column, title in zip(columns, ("tuned", "base"), strict=False):
            if len(columns) > 1:
                column.caption(f"**{t(title)}**")
        boxes = [column.empty() for column in columns]
        speeds = [column.empty() for column in columns]
    st.button(t("stop"), icon=":material/stop_circle:", key="stop")
    with ExitStack() as opened:
        streams = {
            i: opened.enter_context(closing(stream(lambda emit, e=e, i=i: e.chat(histories[i], sampling, emit))))
            for i, e in enumerate(engines)
        }
        for box in boxes:
            box.markdown(":small[●●●]")
        chat.append({"role": "assistant", "content": "", "replies": replies})
        began = time.perf_counter()
        try:
            while streams:
                for i in list(streams):
                    event, mine = next(streams[i]), replies[i]
                    if isinstance(event, Chunk):
                        mine["text"] += event.text
                        mine["tokens"] += 1
                        mine["rate"] = mine["tokens"] / (time.perf_counter() - began)
                        boxes[i].markdown(as_markdown(mine["text"]) + " ▍")
                        speeds[i].caption(t("speed", mine["tokens"], mine["rate"]))
                    else:
                        mine |= {"tokens": event.completion_tokens, "whole": True}
                        mine["rate"] = event.completion_tokens / event.seconds
                        del streams[i]
        except UserError:  # too long, say: the message is taken back, so that the chat can go on
            del chat[-2:]
            raise
    st.rerun()


def history(chat: list[dict], which: int) -> list[dict]:
    """The conversation as model `which` had it, for the engine."""
    system = st.session_state.get("system", "").strip()
    messages = [{"role": "system", "content": system}] if system else []
    for message in chat:
        text = message["content"]
        if message["role"] == "assistant":
            text = message["replies"][min(which, len(message["replies"]) - 1)]["text"]
        messages.append({"role": message["role"], "content": text})
    return messages


def base_name(engine: Engine) -> str | None:
    """The model that an adapter was trained on."""
    return read_json(engine.folder / "adapter_config.json").get("base_model_name_or_path")


def base_of(engine: Engine) -> Engine | None:
    """The base, loaded, or nothing if this model is none's adapter."""
    return engine_of(base_name(engine)) if base_name(engine) else None


def complete_page(engine: Engine, sampling: Sampling) -> None:
    """For a model without a chat template: it goes on with a text."""
    st.text_area(t("text"), key="prompt", height=160)
    if st.button(t("send"), type="primary") and st.session_state.prompt:
        stop, box, text = st.empty(), st.empty(), ""
        stop.button(t("stop"), icon=":material/stop_circle:")
        with closing(stream(lambda emit: engine.complete(st.session_state.prompt, sampling, emit))) as pieces:
            for piece in pieces:
                if isinstance(piece, Chunk):
                    text += piece.text
                    st.session_state.continued = literally(st.session_state.prompt) + "**" + literally(text) + "**"
                    box.markdown(st.session_state.continued)
        stop.empty()
    elif st.session_state.get("continued"):
        st.markdown(st.session_state.continued)


def summarize_page(engine: Engine) -> None:
    """A text, its summary, and how near that is to a reference."""
    text = st.text_area(t("text"), EXAMPLE, height=150)
    most = st.slider(t("length"), 16, 256, 96, 8)
    reference = st.text_area(t("reference"), height=80)
    if st.button(t("summarize"), type="primary", icon=":material/short_text:") and text.strip():
        with closing(stream(lambda emit: engine.summarize(text, most, emit))) as results, st.spinner(""):
            summary = next(results)["summary"]
        with st.container(border=True):
            st.caption(t("summary"))
            st.markdown(as_markdown(summary) or f"*{t('nothing')}*")
        if reference.strip():
            from shared import metrics

            pair = {"predictions": [summary], "references": [reference]}
            scores = metrics.load("rouge").compute(**pair)
            scores |= {"bleu": metrics.load("bleu").compute(**pair)["bleu"]}
            names = {"ROUGE-1": "rouge1", "ROUGE-2": "rouge2", "ROUGE-L": "rougeL", "BLEU": "bleu"}
            for column, (title, name) in zip(st.columns(4), names.items(), strict=True):
                column.metric(title, f"{scores[name]:.1f}", border=True)


def ask_page(engine: Engine) -> None:
    """A question, and the place in the text that answers it."""
    context = st.text_area(t("text"), EXAMPLE, height=150)
    question = st.text_input(t("question"), "When is ValueError raised?")
    if st.button(t("find"), type="primary", icon=":material/search:") and context.strip() and question.strip():
        with closing(stream(lambda emit: engine.answer(question, context, emit))) as results, st.spinner(""):
            found = next(results)
        with st.container(border=True):
            st.caption(t("answer"))
            st.markdown(f"#### {literally(found['answer'])}" if found["answer"] else f"*{t('no_answer')}*")
            st.progress(found["confidence"], t("confidence", found["confidence"]))
            start, end = found["start"], found["end"]
            # the mark may not begin or end with white space, nor hold an empty line, which would end it
            middle = f":green-background[{literally(context[start:end])}]" if found["answer"] else ""
            st.markdown(literally(context[:start]) + middle + literally(context[end:]))


def fill_page(engine: Engine) -> None:
    """Words for a blank, the likeliest first."""
    text = st.text_input(t("sentence"), "Return the number of ___ in the list.")
    if st.button(t("guess"), type="primary", icon=":material/match_word:"):
        with closing(stream(lambda emit: engine.fill(text, 8, emit))) as results, st.spinner(""):
            words = next(results)
        with st.container(border=True):
            for word in words:
                st.progress(word["score"], f"**{literally(word['token_str'].strip())}**  {word['score']:.1%}")


def classify_page(engine: Engine) -> None:
    """The labels of a text, the likeliest first."""
    text = st.text_area(t("text"), EXAMPLE, height=150)
    if st.button(t("sort"), type="primary", icon=":material/category:") and text.strip():
        with closing(stream(lambda emit: engine.classify(text, 5, emit))) as results, st.spinner(""):
            labels = next(results)
        with st.container(border=True):
            for each in labels:
                share = min(max(each["score"], 0.0), 1.0)  # of a regression the score is no share
                st.progress(share, f"**{literally(str(each['label']))}**  {each['score']:.1%}")


def model_page(engine: Engine) -> None:
    """What the folder of a model tells: facts, metrics, loss, forms, card."""
    folder = engine.folder
    facts = {
        t("task"): engine.task,
        t("artifact"): engine.artifact,
        t("context"): f"{engine.context:,}",
    }
    with st.container(border=True):
        st.markdown("  \n".join(f"{title}: **{value}**" for title, value in facts.items()))
    results = read_json(folder / "all_results.json")
    rows = [
        {
            t("metric"): name.replace("_", " "),
            t("trained"): value,
            t("untrained"): results.get(f"base_{name}"),
        }
        for key, value in results.items()
        if (name := key.removeprefix("test_")) != key and isinstance(value, int | float) and f"base_{name}" in results
    ]
    if rows:
        st.subheader(t("metrics"))
        st.dataframe(rows, hide_index=True, width="stretch")
    if (folder / "loss.png").is_file():
        st.subheader(t("loss"))
        st.image(str(folder / "loss.png"))
    forms = read_json(folder / "export.json").get("artifacts", {})  # as shared/export/export.py measured them
    if forms:
        st.subheader(t("artifacts"))
        rows = [
            {t("artifact"): name, "MB": numbers["megabytes"], t("latency"): numbers["latency_ms"]["1"]["p50"]}
            | {t("per_second"): numbers["per_second"]["1"]}
            for name, numbers in forms.items()
        ]
        st.dataframe(rows, hide_index=True, width="stretch")
    card = folder / "README.md"
    if card.is_file():
        text = re.sub(r"\A---\n.*?\n---\n", "", card.read_text("utf8"), flags=re.DOTALL)
        with st.expander(t("card"), icon=":material/description:"):
            st.markdown(as_markdown(text))


def main() -> None:
    """One run of the page, which Streamlit repeats after each click."""
    st.set_page_config("LM Taskbook", "📖", layout="centered")  # an emoji: a named icon would be fetched from elsewhere
    with st.sidebar:
        st.markdown("### :material/menu_book: LM Taskbook")
        st.segmented_control(
            "Language / Ngôn ngữ",
            ["en", "vi"],
            default="en",
            required=True,
            format_func={"en": "English", "vi": "Tiếng Việt"}.get,
            key="language",
            label_visibility="collapsed",
        )
    asked = st.query_params.get("page")
    page = st.pills(
        "Page",
        list(PAGES),
        default=asked if asked in PAGES else "chat",
        required=True,
        key="page",
        format_func=lambda name: f"{PAGES[name][1]} {t(name)}",
        label_visibility="collapsed",
    )
    st.query_params["page"] = page
    with st.sidebar:
        name = choose_model(page)
    if is_exposed():
        log.error("%s", t("exposed"))
        return st.error(literally(t("exposed")), icon=":material/error:")
    if not name:
        return st.info(t("no_model", TRAINED_BY.get(PAGES[page][0], "chat_sft")), icon=":material/info:")
    pages = {"chat": chat_page, "summarize": summarize_page, "ask": ask_page, "fill": fill_page}
    pages |= {"classify": classify_page, "model": model_page}
    try:
        refuse_foreign_folder(name)
        pages[page](engine_of(name))
    except UserError as error:
        st.error(literally(without_paths(str(error))), icon=":material/error:")
    except Exception as error:  # its place is logged, not its text, which may quote what somebody typed
        log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        st.error(t("failed"), icon=":material/error:")


if __name__ == "__main__":
    main()
