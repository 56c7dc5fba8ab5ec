"""The pages for texts: summaries, answers, missing words, labels; a text is typed, an example, or comes out of a file;
questions also to documents. Called by app.py.
"""

from contextlib import closing

import streamlit as st

from deploy.documents import Collection, answer_from
from deploy.documents_page import choose_documents, show_sources
from deploy.example_texts import EXAMPLES, Example
from deploy.inference import Engine, stream
from deploy.texts import TEXTS, as_markdown, literally, t, with_mark
from deploy.uploads import KINDS, LARGEST_MB, read_upload
from shared import UserError
from shared.retrieval.answers import citations


def text_of(example: Example, page: str) -> str:
    """What a page takes of an example: the whole text; to continue it, its first sentence without the full stop."""
    return example.text.partition(".")[0] if page == "continue" else example.text


def example_of(text: str | None, page: str) -> Example | None:
    """The example whose text stands unchanged in the box of a page."""
    return next((example for example in EXAMPLES if text == text_of(example, page)), None)


def new_language() -> None:
    """Examples that nobody changed are shown in the language that was chosen now."""
    for page in ("continue", "summarize", "ask", "classify"):
        if example_of(st.session_state.get(f"{page}: text"), page):
            del st.session_state[f"{page}: text"]
            st.session_state.pop(f"{page}: question", None)
    if any(st.session_state.get("fill: text") in sentences.split("|") for sentences in TEXTS["sentences"]):
        del st.session_state["fill: text"]


def take(page: str, example: Example) -> None:
    """Puts an example into the box of a page."""
    st.session_state[f"{page}: text"] = text_of(example, page)
    st.session_state[f"{page}: question"] = example.questions[0]


def text_box(page: str) -> str:
    """A box for a text with ways to fill it: an example of the session's language at first, other examples, a file."""
    key, language = f"{page}: text", st.session_state.language
    if key not in st.session_state:
        take(page, next(example for example in EXAMPLES if example.language == language))
    with st.container(horizontal=True, gap="small", vertical_alignment="center"):
        with st.popover(t("open_file"), icon=":material/upload_file:"):
            types = t("file_types", LARGEST_MB)
            file = st.file_uploader(types, KINDS, key=f"{page}: file", max_upload_size=LARGEST_MB)
        for example in sorted(EXAMPLES, key=lambda each: each.language != language):
            st.button(example.title, icon=":material/article:", type="tertiary", on_click=take, args=(page, example))
    seen, problem = st.session_state.get(f"{page}: file read", (None, None))
    if file and file.file_id != seen:
        problems = []
        try:
            with st.spinner(""):
                st.session_state[key] = read_upload(file.name, file.getvalue(), problems)
        except UserError as error:
            problems.append(str(error))
        problem = "\n".join(problems)
        st.session_state[f"{page}: file read"] = (file.file_id, problem)
    if file and problem:
        st.error(literally(problem), icon=":material/error:")
    return st.text_area(t("text"), key=key, height=220, persist_state="session")


def summarize_page(engine: Engine) -> None:
    """A text, its summary, and how near that is to a reference."""
    text = text_box("summarize")
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


def ask(question: str) -> None:
    """Puts a question into its box."""
    st.session_state["ask: question"] = question


def ask_page(engine: Engine) -> None:
    """A question, and the place in the text or in documents that answers it."""
    with st.sidebar:
        collection = choose_documents()
    if collection:
        return ask_documents(engine, collection)
    context = text_box("ask")
    question = st.text_input(t("question"), key="ask: question", persist_state="session")
    if example := example_of(context, "ask"):
        with st.container(horizontal=True, gap="small"):
            for each in example.questions:
                st.button(each, icon=":material/help:", type="tertiary", on_click=ask, args=(each,))
    if st.button(t("find"), type="primary", icon=":material/search:") and context.strip() and question.strip():
        with closing(stream(lambda emit: engine.answer(question, context, emit))) as results, st.spinner(""):
            found = next(results)
        with st.container(border=True):
            st.caption(t("answer"))
            st.markdown(f"#### {literally(found['answer'])}" if found["answer"] else f"*{t('no_answer')}*")
            st.progress(found["confidence"], t("confidence", found["confidence"]))
            st.markdown(with_mark(context, found["start"], found["end"]))


def ask_documents(engine: Engine, collection: Collection) -> None:
    """A question, and the place in the nearest passages that answers it."""
    question = st.text_input(t("question"), key="ask: question", persist_state="session")
    if st.button(t("find"), type="primary", icon=":material/search:") and question.strip():
        evidence = collection.find(question)
        with (
            closing(stream(lambda emit: answer_from(evidence, engine, question, emit))) as results,
            st.spinner(""),
        ):
            found = next(results)
        with st.container(border=True):
            st.caption(t("answer"))
            st.markdown(f"#### {literally(found['answer'])}" if found["answer"] else f"*{t('documents_silent')}*")
            if evidence.enough:
                st.progress(found["confidence"], t("confidence", found["confidence"]))
        show_sources(citations(evidence.passages), found if found["answer"] else None)


def fill_in(sentence: str) -> None:
    """Puts a sentence with a blank into its box."""
    st.session_state["fill: text"] = sentence


def fill_page(engine: Engine) -> None:
    """Words for a blank, the likeliest first."""
    sentences = t("sentences").split("|")
    st.session_state.setdefault("fill: text", sentences[0])
    text = st.text_input(t("sentence"), key="fill: text", persist_state="session")
    with st.container(horizontal=True, gap="small"):
        for sentence in sentences:
            st.button(
                literally(sentence), icon=":material/article:", type="tertiary", on_click=fill_in, args=(sentence,)
            )
    if st.button(t("guess"), type="primary", icon=":material/match_word:"):
        with closing(stream(lambda emit: engine.fill(text, 8, emit))) as results, st.spinner(""):
            words = next(results)
        with st.container(border=True):
            for word in words:
                st.progress(word["score"], f"**{literally(word['token_str'].strip())}**  {word['score']:.1%}")


def classify_page(engine: Engine) -> None:
    """The labels of a text, the likeliest first."""
    text = text_box("classify")
    if st.button(t("sort"), type="primary", icon=":material/category:") and text.strip():
        with closing(stream(lambda emit: engine.classify(text, 5, emit))) as results, st.spinner(""):
            labels = next(results)
        with st.container(border=True):
            for each in labels:
                label, score = f"**{literally(str(each['label']))}**", each["score"]
                if engine.model.config.problem_type == "regression":  # a value, no share
                    st.markdown(f"{label}  " + literally(f"{score:.4g}"))
                else:
                    st.progress(min(score, 1.0), f"{label}  {score:.1%}")
