"""`python -m shared.corpora` in tasks, on datatrove: on this machine's cores, on Slurm or on Ray. Called from the command line.

    python -m shared.corpora.cluster dumps/ --output corpus --workers 2
    python -m shared.corpora.cluster dumps/ --output corpus --executor slurm --partition cpu --time 24:00:00
    python -m shared.corpora.cluster dumps/ --output corpus --executor ray

Documents, their order and the report are those of the stream. The corpus is a folder with a file for each task; beside it
lies NAME.work with logs and, until the end, the cleaned documents. A task reads some of the files and reads them whole: a large
file is cut before it comes here. The same command again goes on where a run was stopped; tasks that ended are not repeated.
"""

import argparse
import gzip
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupFilter, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WhitespaceTokenizer
from filelock import FileLock, Timeout
from tqdm import tqdm

from shared import UserError
from shared.corpora.build import (
    clean_document,
    compressed,
    histogram_path,
    json_line,
    length_step,
    plot_lengths,
    source_options,
    summary,
    table_columns,
)
from shared.corpora.readers import documents, is_saved, local_files, read_file
from shared.data.cleaning import CleaningReport, clean_rows
from shared.data.near_duplicates import NearDuplicates, signature

log = logging.getLogger("taskbook")

TRIES = 3
TASKS = 100  # unless told: enough for a hundred cores, and the small files of a task are few

# A band of the stream's signature, five bytes, is the one 64-bit hash of a bucket here.
BANDS = MinhashConfig(num_buckets=NearDuplicates.BANDS, hashes_per_bucket=1, hash_config=HashConfig(64, "sha1"))


class Clean(PipelineStep):
    """The documents of a task's files, cleaned as the stream cleans them; what is dropped is counted by reason."""

    type, name = "📖 - READER", "shared.corpora"

    def __init__(self, plan: Path):
        super().__init__()
        self.plan = plan

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields what is left of the files of task `rank`."""
        plan, report = json.loads(self.plan.read_text("utf8")), CleaningReport()

        def rows(source: str, name: str | None, *_) -> Iterator[dict | str]:
            if name is not None:
                alone = "/" not in name  # in a folder it has two parts
                return read_file(Path(source), name, plan["columns"], alone)
            hub = {"dataset_config": plan["dataset_config"], "split": plan["split"]}
            return documents(source, columns=plan["columns"], **hub)

        def convert(row):
            with self.track_time():
                return clean_document(row, plan["min_words"], tuple(plan["languages"]))

        found = itertools.chain.from_iterable(rows(*file) for file in plan["files"][rank])
        yield from map(_document, clean_rows(found, convert, report))
        for label in ("read", "kept", "bad"):
            self.stat_update(label, value=getattr(report, label))
        for reason, count in report.dropped.items():
            self.stat_update(f"dropped_{reason}", value=count)


class Write(PipelineStep):
    """A task's documents as a file that is there whole or not at all; counts them by length.

    Not datatrove's JsonlWriter: that makes no file for a task without documents, so that the next file would be taken for its;
    it packs at gzip's slowest level and stops at half a character ("\\ud83d").
    """

    type, name = "💽 - WRITER", "jsonl.gz"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents that it writes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{rank:05d}.jsonl.gz"
        partial = path.with_name(f".{path.name}.partial")
        with open(partial, "wb") as file:
            with compressed(file) as lines:
                for document in data:
                    row = {"text": document.text, **document.metadata}
                    with self.track_time():
                        lines.write(json_line(row))
                    self.stat_update(f"length_{length_step(row)}")
                    yield document
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


class Read(PipelineStep):
    """What `Write` wrote in an earlier stage."""

    type, name = "📖 - READER", "jsonl.gz"

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Yields the documents of task `rank`."""
        with gzip.open(self.folder / f"{rank:05d}.jsonl.gz") as lines:
            yield from map(_document, map(json.loads, lines))


def _document(row: dict) -> Document:
    return Document(row.pop("text"), row["sha256"], metadata=row)


class Signatures(MinhashDedupSignature):
    """datatrove's first MinHash stage, with the stream's signatures and bands. Keeps the whole signatures too, 120 bytes each."""

    name = "🎯 MinHash stage 1, signatures of shared.data"

    def __init__(self, folder: Path):
        super().__init__(str(folder), BANDS, WhitespaceTokenizer())  # of a text it gets no words: spaCy is not needed
        self.folder = folder

    def run(self, data, rank: int = 0, world_size: int = 1) -> None:
        """Writes the signatures of task `rank`, one for each document, and its bands, sorted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with open(self.folder / f"{rank:05d}.whole", "wb") as self.whole:
            super().run(data, rank, world_size)

    def get_shingles(self, text: str) -> np.ndarray:
        """The signature: datatrove asks for shingles first, rensa hashes while it takes them."""
        return signature(text)

    def get_signature(self, shingles: np.ndarray) -> list[list[int]]:
        """The bands of a signature, each as one number in a list of its own."""
        self.whole.write(shingles.tobytes())
        bands = shingles[: NearDuplicates.BANDS * NearDuplicates.ROWS].reshape(-1, NearDuplicates.ROWS)
        return (bands.astype(np.uint64) @ 256 ** np.arange(NearDuplicates.ROWS, dtype=np.uint64))[:, None].tolist()


class Compare(PipelineStep):
    """In place of datatrove's third MinHash stage: which documents go, decided in order by the index of the stream.

    datatrove's own drops all but one of whatever hangs together by equal bands: with bands as short as these, one in three pairs
    of similarity 0.5 (1 - (1 - 0.5^5)^12), and then what is similar to either. Here a document goes if an earlier one that stays
    has 74 % of its signature. Only documents that share a band with another one are looked at, 216 bytes of memory each.
    """

    type, name = "🫂 - DEDUP", "🎯 MinHash stage 3, index of shared.data"

    def __init__(self, pairs: Path, signatures: Path, removed: Path):
        super().__init__()
        self.pairs, self.signatures, self.removed = pairs, signatures, removed

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        """Writes for each task the numbers of the documents that go, as `MinhashDedupFilter` reads them."""
        self.removed.mkdir(parents=True, exist_ok=True)

        def places(path: Path) -> np.ndarray:  # a document is one number, so that sorted is the order of the stream
            pairs = np.fromfile(path, "<u4").reshape(-1, 2).astype(np.uint64)
            return np.unique(pairs[:, 0] << np.uint64(32) | pairs[:, 1])

        shared_bands = np.unique(np.concatenate([places(path) for path in self.pairs.glob("*.dups")]))
        tasks, numbers = (part.astype(int) for part in np.divmod(shared_bands, np.uint64(2**32)))
        index = NearDuplicates()
        for task in np.unique(tasks).tolist():
            whole = np.memmap(self.signatures / f"{task:05d}.whole", np.uint8, "r").reshape(-1, NearDuplicates.HASHES)
            gone = [n for n in numbers[tasks == task].tolist() if index.add_signature(whole[n], only_new=True)]
            self.stat_update("to_remove", value=len(gone))
            (self.removed / f"{task:06d}.remove").write_bytes(np.array(gone, "<u4").tobytes())


class Finish(PipelineStep):
    """The report and the histogram of all tasks; the corpus gets its name."""

    type, name = "📊 - REPORT", "shared.corpora"

    def __init__(self, work: Path, output: Path):
        super().__init__()
        self.work, self.output = work, output

    def run(self, data=None, rank: int = 0, world_size: int = 1) -> None:
        """Raises UserError where no document is left."""
        logs = self.work / "logs"
        cleaned, written = _counts(logs / "clean", Clean), _counts(logs / "write", Write)
        lengths = Counter({int(label.removeprefix("length_")): count for label, count in written.items()})
        report = CleaningReport(cleaned["read"], lengths.total(), cleaned["bad"])
        for label, count in cleaned.items():
            if label.startswith("dropped_"):
                report.dropped[label.removeprefix("dropped_")] = count
        if near := cleaned["kept"] - report.kept:
            report.dropped["near-duplicate"] = near
        if not report.kept:
            raise UserError(f"No document is left for {self.output}: {report}.")
        plot_lengths(lengths, histogram_path(self.output))
        if (self.work / "written").exists():  # or it has its name already, and this task died after that
            os.replace(self.work / "written", self.output)
        for name in ("cleaned", "signatures", "pairs", "removed"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        (self.work / "report.txt").write_text(f"{summary(self.output, report)}\n", "utf8")


def _counts(logs: Path, step: type[PipelineStep]) -> Counter:
    """What a step of a stage counted, by label: the sum over its tasks of what datatrove keeps of each."""
    total = Counter()
    for path in sorted((logs / "stats").glob("*.json")):
        for stats in json.loads(path.read_text("utf8")):
            if stats["name"] == f"{step.type}: {step.name}":
                for label, value in stats["stats"].items():
                    total[label] += value["total"] if isinstance(value, dict) else value
    return total


def pipelines(work: Path, output: Path, tasks: int) -> list[tuple[str, int, list[PipelineStep]]]:
    """The stages: name, number of tasks, what each task does."""
    cleaned, signatures, pairs, removed = (work / name for name in ("cleaned", "signatures", "pairs", "removed"))
    buckets = MinhashDedupBuckets(str(signatures), str(pairs), config=BANDS, lines_to_buffer=1000)
    return [
        ("clean", tasks, [Clean(work / "plan.json"), Write(cleaned), Signatures(signatures)]),
        ("buckets", NearDuplicates.BANDS, [buckets]),
        ("compare", 1, [Compare(pairs, signatures, removed)]),
        ("write", tasks, [Read(cleaned), MinhashDedupFilter(str(removed)), Write(work / "written")]),
        ("finish", 1, [Finish(work, output)]),
    ]


def plan_files(sources: list[str], tasks: int) -> list[list[tuple]]:
    """The files of the sources, in the order of the stream, in at most `tasks` groups of about equal size.

    A file is (path, name of its documents, bytes, time of its last change); a source that is no file (name, None, 0, 0).
    """
    files = []
    for source in sources:
        if source.startswith(("http://", "https://")):
            raise UserError(
                f"{source}: a site is asked slowly, by one machine: python -m shared.corpora. Then give its file."
            )
        path = Path(source).expanduser()
        if path.exists() and not is_saved(path):
            for file, name in local_files(path):
                files.append((str(file.absolute()), name, file.stat().st_size, file.stat().st_mtime_ns))
        else:
            documents(source)  # names one that is not there
            files.append((str(path.absolute()) if path.exists() else source, None, 0, 0))
    if not files:
        raise UserError(f"{' '.join(sources)}: no file lies there.")
    groups, total, before = {}, sum(size + 1 for _, _, size, _ in files), 0
    for file in files:
        middle = before + (file[2] + 1) / 2
        groups.setdefault(int(middle * min(tasks, len(files)) / total), []).append(file)
        before += file[2] + 1
    return list(groups.values())


def _start_process() -> None:
    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)  # or what is left of a run that was killed would write into the files of the next one

    threading.Thread(target=end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115  What datatrove says is in the task's log; here tasks would mix


def run_here(stages: list[tuple], logs: Path, workers: int) -> None:
    """Runs the tasks in processes of this machine. One that dies is run again.

    Not datatrove's `LocalPipelineExecutor.run`: its pool waits forever for a process that was killed, such as for its memory.
    """
    for attempt in range(1, TRIES + 1):
        try:
            with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start_process) as pool:
                for name, tasks, pipeline in stages:
                    stage = LocalPipelineExecutor(pipeline, tasks, logging_dir=str(logs / name))
                    ranks = stage.get_incomplete_ranks()
                    for _ in tqdm(pool.map(stage._run_for_rank, ranks), name, len(ranks), unit=" tasks", disable=None):
                        pass
            return
        except BrokenProcessPool:
            log.warning("A process was killed, perhaps for its memory (fewer --workers): try %d of %d", attempt, TRIES)


def run_on_ray(stages: list[tuple], logs: Path, workers: int, memory: int) -> None:
    """Runs the tasks on the Ray cluster that this machine belongs to, or else on Ray on this machine alone.

    As tasks of Ray, which runs one whose process died again. Not datatrove's `RayPipelineExecutor`: inside an actor it has a pool
    as above, which waits forever, and each task starts a process of its own.
    """
    try:
        import ray
    except ImportError as error:
        raise UserError("--executor ray: Ray is not installed here: pip install ray.") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
    ray.init(log_to_driver=False, ignore_reinit_error=True)
    run = ray.remote(num_cpus=1, memory=memory * 2**30, max_retries=TRIES - 1)(LocalPipelineExecutor._run_for_rank)
    try:
        for name, tasks, pipeline in stages:
            stage, running = LocalPipelineExecutor(pipeline, tasks, logging_dir=str(logs / name)), []
            for rank in stage.get_incomplete_ranks():
                if len(running) == workers:
                    ended, running = ray.wait(running)
                    ray.get(ended)
                running.append(run.remote(stage, rank))
            ray.get(running)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.RayError as error:
        log.warning("%s", error)


def submit_to_slurm(stages: list[tuple], logs: Path, workers: int, memory: int, partition: str, time: str) -> None:
    """Submits the tasks that are not done, each stage as an array of jobs that waits for the one before it."""
    job = f"corpus-{hashlib.sha256(str(logs).encode()).hexdigest()[:8]}"
    try:
        queued = subprocess.run(["squeue", "--noheader", "--name", job], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError(f"--executor slurm: squeue does not answer here: {error}. Log in to the cluster.") from error
    if queued.stdout.strip():
        raise UserError(f"Jobs of this corpus wait or run: squeue --name {job}. To stop them: scancel --name {job}.")
    stage = None
    for name, tasks, pipeline in stages:
        stage = SlurmPipelineExecutor(
            pipeline,
            tasks,
            time,
            partition,
            workers=workers,
            mem_per_cpu_gb=memory,
            job_name=job,
            qos="",
            env_command=f'export PATH="{Path(sys.executable).parent}:$PATH"',
            sbatch_args={"kill-on-invalid-dep": "yes"},
            logging_dir=str(logs / name),
            depends=stage,
        )
    stage.run()
    log.info("Submitted: squeue --name %s. The same command prints the report, or submits again what failed.", job)


def build_in_tasks(args: argparse.Namespace) -> str:
    """Runs what is left to do of the command. Returns the report; on Slurm "" until the jobs have written it.

    Raises:
        UserError: a source that is not there, an output that is there, a work folder of other options, a task that failed.
    """
    output = args.output.absolute()
    if output.name.endswith((".jsonl", ".gz")):
        raise UserError(f"--output {args.output}: expected the name of a folder, which gets a .jsonl.gz for each task.")
    if args.executor == "slurm" and not (args.partition and args.time):
        raise UserError("--executor slurm: needs --partition and --time, the longest that one task may take: 24:00:00.")
    if inside := [source for source in args.sources if output.is_relative_to(Path(source).expanduser().absolute())]:
        raise UserError(f"--output {args.output}: lies in {inside[0]}, whose files are read. Choose another place.")
    work = output.with_name(f"{output.name}.work")
    options = {name: getattr(args, name) for name in ("dataset_config", "split", "min_words", "languages")}
    options |= {"columns": table_columns(args.columns), "files": plan_files(args.sources, args.tasks)}
    plan, report, logs = work / "plan.json", work / "report.txt", work / "logs"
    stages = pipelines(work, output, len(options["files"]))
    if output.exists() and not plan.exists():
        raise UserError(f"--output {args.output}: is there already. Delete it, or choose another name.")
    try:
        work.mkdir(parents=True, exist_ok=True)
        with FileLock(work / "lock", timeout=0):
            if plan.exists():
                old = json.loads(plan.read_text("utf8"))
                if changed := [name for name, value in json.loads(json.dumps(options)).items() if old[name] != value]:
                    raise UserError(f"{work} was begun with other {', '.join(changed)}: delete it to begin anew.")
            else:
                begun = work / "plan.partial"
                begun.write_text(json.dumps(options), "utf8")
                os.replace(begun, plan)
            if report.exists() and not output.exists():
                raise UserError(f"{args.output} was made and is gone. To make it anew delete {work}.")
            if report.exists():
                return report.read_text("utf8")
            log.info("%d files in %d tasks; logs in %s", sum(map(len, options["files"])), len(options["files"]), logs)
            if args.executor == "slurm":
                submit_to_slurm(stages, logs, args.workers or -1, args.memory, args.partition, args.time)
                return ""
            if args.executor == "ray":
                run_on_ray(stages, logs, args.workers, args.memory)
            else:
                run_here(stages, logs, args.workers or os.cpu_count() or 1)
            if not report.exists():
                raise UserError(f"Tasks failed, see {logs}. The same command goes on from there.")
            return report.read_text("utf8")
    except Timeout as error:
        raise UserError(f"{work}: the same command is at work there. Wait for its end.") from error
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise UserError(f"--output {args.output}: cannot be written: {error}. Choose another folder.") from error


def main(argv: list[str] | None = None) -> None:
    """The command. Exits with code 2 on a UserError."""
    parser = source_options("python -m shared.corpora.cluster", __doc__)
    add = parser.add_argument
    add("--output", required=True, type=Path, help="folder to write")
    add("--executor", choices=["local", "slurm", "ray"], default="local", help="where (default: on this machine)")
    add("--workers", type=int, default=0, help="tasks at once (default: one a core; on a cluster as many as it takes)")
    add("--tasks", type=int, default=TASKS, help="tasks at most, each of whole files (default: %(default)s)")
    add("--memory", type=int, default=2, metavar="GB", help="of a task on a cluster (default: %(default)s)")
    add("--partition", help="of Slurm")
    add("--time", help="of Slurm: the longest that a task may take, such as 24:00:00")
    args = parser.parse_args(argv)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)  # not of the client, which would list each request to the Hub
    try:
        print(build_in_tasks(args), end="")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    # Not the functions of this `__main__`: other processes would look for the steps there
    from shared.corpora.cluster import main

    main()
