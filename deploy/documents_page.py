"""Documents on the page: which to answer from, own files, sources that unfold. Called by chat_page.py and text_pages.py."""

import os
from collections.abc import Iterator
from pathlib import Path

import streamlit as st

from deploy.choices import offered
from deploy.documents import Collection, SharedEncoder, collection_name, open_collections
from deploy.pdf_text import LONGEST
from deploy.texts import literally, t, with_mark
from deploy.uploads import KINDS, LARGEST_MB, read_upload
from shared import UserError
from shared.publish.hub import pull
from shared.retrieval.answers import ENCODER, is_there, place
from shared.retrieval.hub import on_hub
from shared.retrieval.index import Index

OWN = ":files"  # no name of a file ends so: ".sqlite" does


@st.cache_resource(max_entries=8, show_spinner=False)
def load(path: str, made: int) -> Collection:
    """One index for all sessions, opened again when another file has its name. Raises UserError."""
    return open_collections([path])[collection_name(path)]


@st.cache_resource(show_spinner=False)
def encoder() -> SharedEncoder:
    """For the files that visitors open. Raises UserError."""
    return SharedEncoder(pull(ENCODER))


def indexes() -> list[str]:
    """Those in TASKBOOK_DOCUMENTS; else, where the models are not fixed either, those in outputs/."""
    named = os.environ.get("TASKBOOK_DOCUMENTS", "").split()
    return named if named or offered() else sorted(map(str, Path("outputs").glob("*.sqlite")))


def choose_documents() -> Collection | None:
    """The side bar's box for what is answered from; None: the model alone, or documents that are not there yet."""
    paths = indexes()
    chosen = st.selectbox(
        t("documents"),
        [*paths, OWN],
        key="documents",
        index=0 if os.environ.get("TASKBOOK_DOCUMENTS") else None,
        placeholder=t("no_documents"),
        format_func=lambda path: t("own_files") if path == OWN else collection_name(path),
        persist_state="session",
    )
    if chosen is None:
        return None
    if chosen == OWN:
        return own_files()
    if chosen not in paths:  # the box is no guard: what a browser sends need not be one of its options
        raise UserError(t("not_offered"))
    if not on_hub(chosen) and not is_there(chosen):
        st.info(t("not_indexed"), icon=":material/hourglass_top:")
        return None
    collection = load(chosen, Path(chosen).stat().st_ino if Path(chosen).is_file() else 0)
    count, whole = collection.state()
    st.caption(t("passages" if whole else "passages_so_far", count))
    return collection


def own_files() -> Collection | None:
    """Files that a visitor opens, indexed in memory for this session."""
    files = st.file_uploader(
        t("file_types", LARGEST_MB), KINDS, accept_multiple_files=True, key="files", max_upload_size=LARGEST_MB
    )
    if not files:
        st.session_state.pop("own", None)
        return None
    if "own" not in st.session_state:
        st.session_state.own = {
            "files": None,
            "problems": [],
            "collection": Collection(OWN, Index(":memory:", encoder())),
        }
    own, wanted = st.session_state.own, [file.file_id for file in files]
    if own["files"] != wanted:
        own["problems"] = []
        bar = st.progress(0.0, t("indexing"))
        try:
            own["collection"].index.update(read_all(files, own["problems"], bar))
            own["files"] = wanted
        except UserError:
            if not own["problems"]:
                raise
        finally:
            bar.empty()
    for problem in own["problems"]:
        st.error(literally(problem), icon=":material/error:")
    if own["files"] != wanted:  # none of them can be read
        return None
    st.caption(t("passages", own["collection"].state()[0]))
    return own["collection"]


def read_all(files: list, problems: list[str], bar) -> Iterator[dict]:
    """The documents of files, as an index takes them; what cannot be read goes to `problems`."""
    room = LONGEST
    for number, file in enumerate(files):
        try:
            text = read_upload(file.name, file.getvalue(), problems)
            if len(text) > room:
                raise UserError(t("files_long", file.name, LONGEST))
            room -= len(text)
            line = 0 if file.name.lower().endswith(".pdf") else 1  # a PDF has no lines
            yield {"source": file.name, "title": Path(file.name).stem, "text": text, "line": line}
        except UserError as error:
            problems.append(str(error))
        bar.progress((number + 1) / len(files), t("indexing"))


def source_line(cited: dict) -> str:
    """The source of a passage, with its line where it has one."""
    return t("source_line", cited["source"], cited["line"]) if cited["line"] else cited["source"]


def show_sources(sources: list[dict], answer: dict | None = None) -> None:
    """Passages that a reply had before it, each with its place; an address on the web opens there.

    Args:
        answer: `number` of the passage that is shown unfolded, and `start` and `end` of the answer in it.
    """
    for each in sources:
        where = place(each["title"], each["heading"], each["source"])
        marked = bool(answer) and answer["number"] == each["number"]
        with st.expander(literally(f"[{each['number']}] {where}"), expanded=marked):
            st.caption(literally(source_line(each)))
            span = (answer["start"], answer["end"]) if marked else (0, 0)
            st.markdown(with_mark(each["text"], *span))
            if each["source"].startswith(("https://", "http://")):
                st.link_button(t("open_source"), each["source"], icon=":material/open_in_new:")
