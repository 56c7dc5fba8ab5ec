"""A page to try models on: chat, summaries, answers in a text, missing words, labels. In English and Vietnamese.

    python -m streamlit run deploy/app.py                        # or: make chat
    TASKBOOK_MODELS="pypi:smollm2-135m-instruct" python -m streamlit run deploy/app.py      # only these can be chosen

A model is loaded once for all sessions; what is typed stays in its session. What models write is shown as text with Markdown:
never as HTML, and no image is fetched. Each page is a file of its own, beside this one.
"""

import logging
import traceback

import streamlit as st

from deploy.chat_page import chat_page
from deploy.choices import engine_of, is_exposed, names_for, offered, refuse_foreign, shown_name
from deploy.model_page import model_page
from deploy.runs_page import runs_page
from deploy.text_pages import ask_page, classify_page, fill_page, new_language, summarize_page
from deploy.texts import PAGES, TRAINED_BY, literally, t
from shared import UserError
from shared.publish.redact import without_paths

log = logging.getLogger("deploy")
SHOW = {
    "chat": chat_page,
    "summarize": summarize_page,
    "ask": ask_page,
    "fill": fill_page,
    "classify": classify_page,
    "model": model_page,
}


def choose_model(page: str) -> str | None:
    """The side bar's box; remembered for each page. A link may name the model."""
    options = names_for(PAGES[page][0])
    linked = [shown_name(name, options) for name in options]
    asked = st.query_params.get("model")
    return st.selectbox(
        t("which"),
        options,
        key=f"model of {page}",
        index=(linked.index(asked) if asked in linked else 0) if options else None,
        accept_new_options=not offered(),
        placeholder="org/name",
        help=None if offered() else t("which_help"),
        format_func=lambda name: shown_name(name, options),
        persist_state="session",
    )


def choose_page() -> str:
    """The row of tabs; the address names the page."""
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
    return page


def show_page() -> None:
    """What is below the tabs. Raises UserError."""
    page = choose_page()
    if page == "runs":
        return runs_page()
    with st.sidebar:
        name = choose_model(page)
    if not name:
        st.info(t("no_model", TRAINED_BY.get(PAGES[page][0], "chat_sft")), icon=":material/info:")
        return
    refuse_foreign(name)
    SHOW[page](engine_of(name))


def main() -> None:
    """One run of the page, which Streamlit repeats after each click."""
    st.set_page_config("LM Taskbook", "📖", layout="centered")  # an emoji: a named icon would be fetched from elsewhere
    with st.sidebar:
        st.markdown("### :material/menu_book: LM Taskbook")
        st.segmented_control(
            "Language / Ngôn ngữ",
            ["en", "vi"],
            default="vi" if (st.context.locale or "").startswith("vi") else "en",
            required=True,
            format_func={"en": "English", "vi": "Tiếng Việt"}.get,
            key="language",
            label_visibility="collapsed",
            on_change=new_language,
        )
    if is_exposed():  # not even the names of the runs are shown
        log.error("%s", t("exposed"))
        return st.error(literally(t("exposed")), icon=":material/error:")
    try:
        show_page()
    except UserError as error:
        st.error(literally(without_paths(str(error))), icon=":material/error:")
    except Exception as error:  # its place is logged, not its text, which may quote what somebody typed
        log.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
        st.error(t("failed"), icon=":material/error:")


if __name__ == "__main__":
    main()
