"""The page for conversations: replies as they are written, any own message changed, base and trained model side by side; and
texts that a model without a chat template continues; replies from documents. Called by app.py.
"""

import json
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import streamlit as st

from deploy.choices import base_name, engine_of
from deploy.documents import Collection, Evidence, reply_from
from deploy.documents_page import choose_documents, show_sources, source_line
from deploy.generation import Chunk, Sampling
from deploy.inference import Engine, stream
from deploy.text_pages import text_box
from deploy.texts import as_markdown, literally, t
from deploy.workers import Job
from shared import UserError
from shared.retrieval.answers import citations, place


def chat_page(engine: Engine) -> None:
    """Conversation, newest below; the reply appears as it is written."""
    chat = st.session_state.setdefault("chat", [])
    with st.sidebar:
        base = base_of(engine) if st.session_state.get("compare") else None
        if base_name(engine.folder):
            st.toggle(t("compare"), key="compare")
        collection = choose_documents() if engine.chats else None
        st.text_area(t("system"), key="system", height=80, persist_state="session")
        with st.expander(t("sampling"), icon=":material/tune:"):
            sampling = Sampling(
                temperature=st.slider(t("temperature"), 0.0, 2.0, 0.7, 0.05),
                top_p=st.slider(t("top_p"), 0.05, 1.0, 0.95, 0.05),
                repetition_penalty=st.slider(t("penalty"), 1.0, 2.0, 1.1, 0.05),
                max_tokens=st.slider(
                    t("max_tokens"), 16, min(2048, engine.context // 2), min(256, engine.context // 2)
                ),
            )
        if chat:
            st.button(t("clear"), icon=":material/delete:", width="stretch", on_click=clear)
    if not engine.chats:
        return complete_page(engine, sampling)
    said = st.chat_input(t("say"))
    if said and said.strip():
        edit(None)
        chat.append({"role": "user", "content": said})
    if not chat and collection:
        st.subheader(t("hello_documents"))
        return st.caption(t("hello_documents_more"))
    if not chat:
        st.subheader(t("hello"))
        st.caption(t("hello_more"))
        with st.container(horizontal=True, gap="small"):
            for text in t("starters").split("|"):
                if st.button(text):
                    chat.append({"role": "user", "content": text})
                    st.rerun()
        return
    edited = st.session_state.get("edited")
    for number, message in enumerate(chat):
        if number == edited:
            edit_form(chat, number)
        else:
            show_message(message, number)
    if edited is not None:
        return
    if chat[-1]["role"] == "user":
        return reply(chat, [engine, base] if base else [engine], sampling, collection)
    with st.container(horizontal=True, gap="small"):
        last = max(i for i, message in enumerate(chat) if message["role"] == "user")
        st.button(t("again"), icon=":material/refresh:", type="tertiary", on_click=cut, args=(chat, last + 1))
        messages = history(chat, 0)
        for kind, content in (
            ("messages", as_messages(messages)),
            ("markdown", as_document(chat, messages, engine.name)),
        ):
            st.download_button(
                t(f"save_{kind}"),
                content.encode(),
                "chat.jsonl" if kind == "messages" else "chat.md",
                icon=":material/download:",
                type="tertiary",
                help=t("save_messages_help") if kind == "messages" else None,
                on_click="ignore",
            )


def clear() -> None:
    """Begins anew."""
    st.session_state.chat.clear()
    edit(None)


def edit(number: int | None) -> None:
    """Opens message `number` for changes, or none."""
    st.session_state.edited = number


def cut(chat: list[dict], length: int) -> None:
    """Leaves the first messages, so that the next reply is written anew."""
    del chat[length:]


def edit_form(chat: list[dict], number: int) -> None:
    """An own message to change: what follows it is replaced by the reply to the new one."""
    with st.form("edit", border=True):
        text = st.text_area(t("edit"), chat[number]["content"], label_visibility="collapsed")
        if number + 2 < len(chat):
            st.caption(t("edit_more"))
        with st.container(horizontal=True, gap="small"):
            sent = st.form_submit_button(t("send"), type="primary")
            left = st.form_submit_button(t("cancel"))
    if sent and text.strip():
        chat[number:] = [{"role": "user", "content": text}]
    if sent or left:
        edit(None)
        st.rerun()


def as_messages(messages: list[dict]) -> str:
    """A conversation as a line of JSON, as tasks/chat_sft reads it."""
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def as_document(chat: list[dict], messages: list[dict], name: str) -> str:
    """A conversation to read, in Markdown; below a reply from documents the passages that it had, by their numbers."""
    turns = [f"**{t(message['role'])}**\n\n{message['content']}" for message in messages]
    for number, message in enumerate(reversed(chat), 1):  # before the first of `chat` there may be a system prompt
        first = message["replies"][0] if "replies" in message else {}
        for each in first.get("sources", []) if first.get("enough") else []:
            where = place(each["title"], each["heading"], each["source"])
            turns[-number] += f"\n\n{each['number']}. {where}: {source_line(each)}"
    return "\n\n".join([f"# {t('chat_with', name)}", *turns]) + "\n"


def show_message(message: dict, number: int) -> None:
    """One turn; a reply that was compared stands beside that of the base model."""
    with st.chat_message(
        message["role"], avatar=":material/person:" if message["role"] == "user" else ":material/smart_toy:"
    ):
        if message["role"] == "user":
            with st.container(horizontal=True, vertical_alignment="center", gap="small"):
                st.markdown(literally(message["content"]), width="stretch")
                st.button(
                    t("edit"),
                    icon=":material/edit:",
                    type="tertiary",
                    key=f"edit {number}",
                    on_click=edit,
                    args=(number,),
                )
            return
        columns = st.columns(len(message["replies"]))
        for column, each, title in zip(columns, message["replies"], ("tuned", "base"), strict=False):
            with column:
                if len(columns) > 1:
                    st.caption(f"**{t(title)}**")
                st.markdown(as_markdown(each["text"]) or f"*{t('nothing')}*")
                if each["enough"]:
                    st.caption(
                        t("speed", each["tokens"], each["rate"]) + ("" if each["whole"] else f" · {t('stopped')}")
                    )
                if each["sources"]:
                    st.caption(t("sources" if each["enough"] else "nearest"))
                    show_sources(each["sources"])


def reply(chat: list[dict], engines: list[Engine], sampling: Sampling, collection: Collection | None = None) -> None:
    """Streams the next turn. Any click ends this run of the page: the generation stops and what there is stays in the chat."""
    found = None
    if collection:
        try:
            found = collection.find(chat[-1]["content"])
        except UserError:
            del chat[-1:]
            raise
    evidence = [replace(found, passages=list(found.passages)) if found else None for _ in engines]
    replies = [
        {"text": "", "tokens": 0, "rate": 0.0, "whole": False, "sources": [], "enough": not found or found.enough}
        for _ in engines
    ]
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
            i: opened.enter_context(closing(stream(partial(begin, e, histories[i], sampling, evidence[i]))))
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
                    if evidence[i] and not mine["sources"]:
                        mine["sources"] = citations(evidence[i].passages)
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


def begin(engine: Engine, messages: list[dict], sampling: Sampling, evidence: Evidence | None, emit: Callable) -> Job:
    """One reply, from documents where there is evidence of them."""
    if evidence is None:
        return engine.chat(messages, sampling, emit)
    return reply_from(evidence, engine, messages, sampling, emit, t("documents_silent"))


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


def base_of(engine: Engine) -> Engine | None:
    """The base, loaded, or nothing if this model is none's adapter."""
    name = base_name(engine.folder)
    return engine_of(name) if name else None


def complete_page(engine: Engine, sampling: Sampling) -> None:
    """For a model without a chat template: it goes on with a text."""
    prompt = text_box("continue")
    if st.button(t("send"), type="primary") and prompt:
        stop, box, text = st.empty(), st.empty(), ""
        stop.button(t("stop"), icon=":material/stop_circle:")
        with closing(stream(lambda emit: engine.complete(prompt, sampling, emit))) as pieces:
            for piece in pieces:
                if isinstance(piece, Chunk):
                    text += piece.text
                    st.session_state.continued = literally(prompt) + "**" + literally(text) + "**"
                    box.markdown(st.session_state.continued)
        stop.empty()
    elif st.session_state.get("continued"):
        st.markdown(st.session_state.continued)
