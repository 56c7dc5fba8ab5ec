"""The page of all finished runs: one table to sort by any number, loss curves laid over each other, two runs in detail.
Called by app.py.
"""

from collections import Counter
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import streamlit as st

from deploy.choices import offered, read_json, shown_name, task_of
from deploy.texts import as_markdown, literally, of_run, t
from shared import UserError
from shared.compare.table import COLUMNS, best_of, differences, markdown, read_run, table
from shared.publish.redact import without_paths


def runs_page() -> None:
    """What `python -m shared.compare outputs/*` prints, to be sorted and looked at."""
    folders = map(Path, offered()) if offered() else sorted(Path("outputs").glob("*"))
    names = [str(folder) for folder in folders if read_json(folder / "all_results.json")]
    runs = []
    for name in names:
        try:
            runs.append(read_run(name) | {"name": shown_name(name, names)})
        except UserError as error:  # the others are shown all the same
            st.warning(literally(without_paths(str(error))), icon=":material/error:")
    if not runs:
        st.info(t("no_runs"), icon=":material/info:")
        return
    st.caption(t("runs_more"))
    show_table(runs)
    with st.expander(t("with_intervals"), icon=":material/table_rows:"):
        st.markdown(as_markdown(markdown(table(runs))))
    st.subheader(t("loss"))
    tasks = Counter(task_name(run) for run in runs)
    most = [run["name"] for run in runs if task_name(run) == tasks.most_common(1)[0][0]]
    chosen = st.multiselect(t("curves_of"), [run["name"] for run in runs], default=most[:6])
    shown = [run for run in runs if run["name"] in chosen]
    curves = {run["name"]: pd.Series(losses(run["folder"]), dtype=float) for run in shown}
    if any(len(curve) for curve in curves.values()):
        st.line_chart(pd.DataFrame(curves).interpolate(limit_area="inside"), x_label=t("step"), y_label=t("loss"))
    if len(shown) == 2:
        st.subheader(t("two_runs"))
        st.markdown(as_markdown(without_paths("\n".join(differences(*shown)))))
    elif len(runs) > 1:
        st.caption(t("choose_two"))


def show_table(runs: list[dict]) -> None:
    """Numbers of the test split, without their intervals so that a column can be sorted; the best of the same test rows green."""
    rows, best = [], best_of(runs)
    for run in sorted(runs, key=lambda run: (task_name(run), run["name"])):
        results, about = run["results"], run["results"].get("run") or {}
        has_page = task_of(run["folder"])  # an encoder that finds passages has none
        opens = f"?page=model&model={quote(run['name'])}" if has_page else None
        rows.append(
            {t("which"): run["name"], t("task"): task_name(run), t("data"): about.get("data")}
            | {of_run(title): results.get(f"test_{metric}") for metric, (title, _) in COLUMNS.items()}
            | {t("training_time"): results.get("train_minutes"), t("memory"): results.get("peak_memory_gb")}
            | {t("hardware"): about.get("hardware"), t("date"): about.get("date"), t("opens_model"): opens}
            | {"folder": run["folder"]}
        )
    frame = pd.DataFrame(rows)
    folders = frame.pop("folder")
    frame = frame.dropna(axis="columns", how="all")
    title_of = {of_run(title): metric for metric, (title, _) in COLUMNS.items()}

    def mark(column):
        green = [(folder, title_of.get(column.name)) in best for folder in folders]
        return ["background-color: #2e7d3255" if each else "" for each in green]

    numbers = {title: st.column_config.NumberColumn(format="%.4g") for title in title_of}
    numbers[t("training_time")] = st.column_config.NumberColumn(format=t("minutes_format"))
    numbers[t("memory")] = st.column_config.NumberColumn(format="%.1f GB")
    link = st.column_config.LinkColumn(display_text=t("opens_model"))
    st.dataframe(frame.style.apply(mark), hide_index=True, column_config={t("opens_model"): link} | numbers)


def task_name(run: dict) -> str:
    """The folder in tasks/ that a run was made with."""
    return str((run["results"].get("run") or {}).get("task", ""))


def losses(folder: Path) -> dict[int, float]:
    """Training loss by step, as it was logged; nothing for a run that came without its log."""
    history = read_json(folder / "trainer_state.json").get("log_history") or []
    return {entry["step"]: entry["loss"] for entry in history if isinstance(entry, dict) and "loss" in entry}
