"""Complete checkpoints on the Hub, for a machine that may vanish: sent while training goes on, fetched on another one.

Called by checkpoints.py (`Uploads`) and launch.py (`fetch`), with `--push_to_hub true --hub_strategy checkpoint`.

They lie on a branch of their own, CHECKPOINTS, so that the model's repository stays what `publish` makes it. Each is one commit:
all of its files or none. Two are kept, and the branch's history is squashed, or the storage would grow by a checkpoint a time.
The optimizer's state is a pickle; Trainer reads it with `weights_only`, and only from a repository that the user may write to.
"""

import contextlib
import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path

from shared import UserError
from shared.publish.hub import portable_adapter
from shared.publish.redact import TOKEN

log = logging.getLogger("taskbook")

CHECKPOINTS = "checkpoints"
KEPT = 2
# Begin like a checkpoint, so that a push of the run leaves them out
OUTBOX, INBOX = "checkpoint-uploading", "checkpoint-fetching"
PAUSES = (5, 20, 60, 180)  # seconds before an upload that failed is tried again


class Uploads:
    """Sends checkpoints one after the other from a thread; while one is on its way only the newest of the others waits.

    What fails is logged and never disturbs training.

    Args:
        repo: `owner/name` on the Hub.
        output_dir: of the run.
    """

    def __init__(self, repo: str, output_dir: Path):
        self.repo, self.outbox = repo, output_dir / OUTBOX
        self.next, self.thread, self.lock = None, None, threading.Lock()
        shutil.rmtree(self.outbox, ignore_errors=True)  # of a run that was killed

    def add(self, checkpoint: Path) -> None:
        """Takes a complete checkpoint; its folder may be deleted afterwards."""
        copy = self.outbox / checkpoint.name
        try:
            shutil.copytree(checkpoint, copy, copy_function=_link)
        except OSError as error:
            log.warning("%s was not uploaded (%s).", checkpoint.name, _reason(error))
            return
        with self.lock:
            if self.next:
                shutil.rmtree(self.next, ignore_errors=True)
            self.next = copy
            if self.thread is None:
                self.thread = threading.Thread(target=self._send_all, daemon=True)
                self.thread.start()

    def wait(self) -> None:
        """Until all is sent or given up."""
        if (thread := self.thread) is not None:
            log.info("Waits until the last checkpoint is on the Hub.")
            thread.join()

    def _send_all(self) -> None:
        while True:
            with self.lock:
                checkpoint, self.next = self.next, None
                if checkpoint is None:
                    self.thread = None
                    return
            self._send_patiently(checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
            with contextlib.suppress(OSError):  # the next one may lie in it already
                self.outbox.rmdir()

    def _send_patiently(self, checkpoint: Path) -> None:
        for pause in (*PAUSES, None):
            try:
                send(checkpoint, self.repo)
                log.info("%s is on the Hub: %s, branch %s.", checkpoint.name, self.repo, CHECKPOINTS)
                return
            except Exception as error:  # whatever it is: the run itself is not in danger
                if pause is None or self.next:
                    log.warning("%s was not uploaded (%s).", checkpoint.name, _reason(error))
                    return
                time.sleep(pause)


def send(checkpoint: Path, repo: str) -> None:
    """One commit: this checkpoint in, all others but the newest out. Raises what huggingface_hub raises."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # the one of the training stands in the same line
    api = HfApi()
    api.create_branch(repo, branch=CHECKPOINTS, exist_ok=True)
    others = [name for name in _checkpoints(api.list_repo_files(repo, revision=CHECKPOINTS)) if name != checkpoint.name]
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    operations = [CommitOperationDelete(f"{name}/") for name in others[: 1 - KEPT]]
    operations += [CommitOperationAdd(f"{checkpoint.name}/{p.relative_to(checkpoint).as_posix()}", p) for p in files]
    api.create_commit(repo, operations, commit_message=checkpoint.name, revision=CHECKPOINTS)
    api.super_squash_history(repo, branch=CHECKPOINTS, commit_message=checkpoint.name)


def fetch(repo: str, output_dir: Path, newer_than: int) -> Path | None:
    """Downloads the newest checkpoint on the Hub whose files are what its manifest says; damaged ones are named and passed over.

    Args:
        repo: `owner/name`.
        newer_than: a step; checkpoints up to it are left where they are.

    Returns:
        Its folder in `output_dir`, or None where there is none.

    Raises:
        UserError: the Hub cannot be reached, or the download broke off.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    from shared.training.checkpoints import damage

    inbox, found = output_dir / INBOX, None
    try:
        try:
            commit = HfApi().model_info(repo, revision=CHECKPOINTS)
        except RevisionNotFoundError:
            return None
        names = _checkpoints(file.rfilename for file in commit.siblings)
        for name in (name for name in reversed(names) if _step(name) > newer_than):
            log.info("Fetches %s from the Hub: %s.", name, repo)
            snapshot_download(repo, revision=commit.sha, local_dir=inbox, allow_patterns=[f"{name}/*"])
            if reason := damage(inbox / name):
                log.warning("Passed over %s on the Hub: %s.", name, reason)
                continue
            found = output_dir / name
            shutil.rmtree(found, ignore_errors=True)  # a valid one of that step would not be older than itself
            (inbox / name).rename(found)
            break
        shutil.rmtree(inbox, ignore_errors=True)
        return found
    except (OSError, ValueError) as error:  # huggingface_hub's own are OSError
        raise UserError(
            f"--resume: the checkpoint on the Hub could not be fetched from {repo} ({_reason(error)}). Repeat the command; "
            "it goes on with what is there already. `--resume never` starts anew."
        ) from error


def make_portable(checkpoint: Path) -> None:
    """Before the manifest is written: out with what no resume reads and the Hub must not see, such as paths of this machine."""
    for name in ("training_args.bin", "README.md"):  # a pickle of all arguments; peft's card
        (checkpoint / name).unlink(missing_ok=True)
    config = checkpoint / "adapter_config.json"
    if config.is_file():
        config.write_bytes(portable_adapter(config))


def _checkpoints(paths: Iterable[str]) -> list[str]:
    """Names of the checkpoints in a list of files, by step."""
    names = {path.partition("/")[0] for path in paths if "/" in path}
    return sorted((name for name in names if re.fullmatch(r"checkpoint-\d+", name)), key=_step)


def _step(name: str) -> int:
    return int(name.split("-")[1])


def _link(source: str, target: str) -> None:
    """A second name for the same file: it takes no space, and stays when training deletes the first."""
    try:
        os.link(source, target)
    except OSError:  # a file system without
        shutil.copy2(source, target)


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return TOKEN.sub("hf_***", lines[0])[:200]
