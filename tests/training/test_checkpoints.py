"""shared/training/checkpoints.py: runs that are killed at the worst moments go on and end exactly like a run that is not.

The runs live in processes of their own, forked from a server that has imported torch once; they write `log.txt`.
"""

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import datasets
import pytest
import safetensors.torch
import torch
import transformers

from shared import UserError
from shared.training import checkpoints, hub_checkpoints, processes, signals

IDENTITY = {"data": "f00d", "chat_template": None, "columns": ["prompt", "completion"]}


class Accident(transformers.TrainerCallback):
    """What happens to a run, where, and in which step (and in which process, if there are several)."""

    def __init__(self, kind: str, step: int, rank: int):
        self.kind, self.step, self.rank = kind, step, rank

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        signals = {"SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
        if self.kind in signals and state.global_step == self.step - 1 and args.process_index == self.rank:
            os.kill(os.getpid(), signals[self.kind])

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if (self.kind, self.step, self.rank) == ("out of memory", state.global_step + 1, args.process_index):
            model.register_forward_pre_hook(out_of_memory)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.kind == "disk full":
            # The kernel itself says ENOSPC for what is written there.
            folder = Path(args.output_dir) / f"checkpoint-{self.step}"
            folder.mkdir()
            (folder / "optimizer.pt").symlink_to("/dev/full")
        if self.kind == "between saves":
            die()
        if self.kind == "uploaded":
            while (Path(args.output_dir) / hub_checkpoints.OUTBOX).exists():
                time.sleep(0.01)
            die()
        if self.kind == "weights written":
            transformers.Trainer._save_optimizer_and_scheduler = die
        if self.kind == "no manifest yet":
            checkpoints.write_manifest = die
        if self.kind == "half a manifest":
            Path.replace = die
        if self.kind == "half deleted":
            checkpoints.shutil.rmtree = lambda folder: (folder / "model.safetensors").unlink() or die()


def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)


def out_of_memory(*args):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def collate(features: list[dict]) -> dict:
    ids = torch.stack([torch.as_tensor(f["input_ids"]) for f in features])
    return {"input_ids": ids, "labels": ids.masked_fill(ids % 5 == 0, -100)}


def main(output_dir: str, accident: tuple = ("", 0, 0), environment: dict | None = None, **arguments) -> None:
    """The program under test: what a task's `main` does, in small."""
    os.environ.update(environment or {})
    out = Path(output_dir)
    out.mkdir(exist_ok=True)
    handle = os.open(out / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, force=True)
    torch.set_num_threads(1)
    rows = torch.randint(0, 64, (22, 16), generator=torch.Generator().manual_seed(1)).tolist()
    settings = {"max_steps": 14, "save_steps": 3, "save_total_limit": 1, "logging_steps": 1} | arguments
    resume = settings.pop("resume", "auto")
    hub_checkpoints.PAUSES = (0.1,)
    args = transformers.TrainingArguments(
        output_dir=output_dir,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    transformers.set_seed(args.seed)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    )
    stopper = signals.StopOnSignal()
    try:
        fetch = partial(hub_checkpoints.fetch, args.hub_model_id, out) if args.hub_strategy == "checkpoint" else None
        checkpoint = checkpoints.find_checkpoint(output_dir, resume, IDENTITY, fetch)
        trainer = transformers.Trainer(
            model,
            args,
            train_dataset=[{"input_ids": row} for row in rows],
            data_collator=collate,
            callbacks=[checkpoints.CompleteCheckpoints(IDENTITY), stopper, Accident(*accident)],
        )
        checkpoints.train(trainer, checkpoint)
    except UserError as error:
        print(f"error: {error}", flush=True)
        raise SystemExit(2) from error
    stopper.exit_if_stopped()
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    losses = [(e["step"], e["loss"], e["grad_norm"]) for e in trainer.state.log_history if "loss" in e]
    mean = checkpoints.mean_train_loss(trainer.state.log_history)
    result = {"losses": losses, "weights": digest.hexdigest(), "step": trainer.state.global_step, "mean": mean}
    if args.process_index == 0:
        (out / "result.json").write_text(json.dumps(result))


@pytest.fixture(scope="module")
def start(empty_hub):
    """Starts `main` in a process of its own."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    modules = ["shared.training.checkpoints", "transformers.trainer", "transformers.models.gpt2.modeling_gpt2"]
    context.set_forkserver_preload(modules)
    started = []

    def start(output_dir, *accident, **arguments):
        process = context.Process(target=main, args=(str(output_dir), accident or ("", 0, 0)), kwargs=arguments)
        process.start()
        started.append(process)
        return process

    yield start
    for process in started:
        if process.is_alive():
            process.kill()


def finish(process) -> int:
    process.join(60)
    assert process.exitcode is not None, "does not end"
    return process.exitcode


def result(output_dir: Path) -> dict:
    return json.loads((output_dir / "result.json").read_text())


def newest_valid(output_dir: Path) -> str | None:
    found = checkpoints.find_checkpoint(output_dir, "auto", IDENTITY)
    return found and found.name


ACCIDENTS = [
    # what, in which step, exit code, the checkpoint that must then be valid although only one is kept
    ("between saves", 4, -9, "checkpoint-3"),
    ("weights written", 6, -9, "checkpoint-3"),
    ("no manifest yet", 6, -9, "checkpoint-3"),
    ("half a manifest", 6, -9, "checkpoint-3"),
    ("half deleted", 9, -9, "checkpoint-9"),
    ("SIGTERM", 10, 143, "checkpoint-10"),  # inside the second epoch
    ("SIGINT", 12, 130, "checkpoint-12"),  # at the end of the second epoch
    ("disk full", 14, 2, "checkpoint-12"),
]


def test_a_run_that_dies_everywhere_ends_like_one_that_does_not(tmp_path, start):
    undisturbed = start(tmp_path / "undisturbed")
    out = tmp_path / "disturbed"
    for what, step, code, valid in ACCIDENTS:
        assert finish(start(out, what, step, 0)) == code, f"{what}: {(out / 'log.txt').read_text()}"
        assert newest_valid(out) == valid, what
        if what == "half deleted":  # what remains of it must not look complete
            assert os.listdir(out / "checkpoint-6") and not (out / "checkpoint-6" / "manifest.json").exists()
    text = (out / "log.txt").read_text()
    assert "Passed over" in text and "no manifest.json, it is half-written" in text
    assert "stopped by SIGTERM at step 10, checkpoint saved; the same command goes on from there." in text
    assert "checkpoint-14 could not be written, the disk is full" in text and "Intact: checkpoint-12." in text
    assert not (out / "checkpoint-14").exists()

    assert finish(start(out)) == 0 and finish(undisturbed) == 0
    assert [step for step, *_ in result(out)["losses"]] == list(range(1, 15))
    assert result(out) == result(tmp_path / "undisturbed")
    assert [p.name for p in out.glob("checkpoint-*")] == ["checkpoint-14"]

    # Trainer alone would take a 15th step here.
    (out / "result.json").unlink()
    assert finish(start(out)) == 0
    assert result(out) == result(tmp_path / "undisturbed")


def test_the_log_and_the_mean_loss_do_not_depend_on_where_a_run_stopped(tmp_path, start):
    settings = {"logging_steps": 5, "save_steps": 4, "max_steps": 11, "train_sampling_strategy": "group_by_length"}
    runs = [start(tmp_path / "whole", **settings), start(tmp_path / "killed", "between saves", 9, 0, **settings)]
    assert [finish(run) for run in runs] == [0, -9]
    assert finish(start(tmp_path / "killed", **settings)) == 0
    assert [step for step, *_ in result(tmp_path / "whole")["losses"]] == [4, 5, 8, 10, 11]
    assert result(tmp_path / "killed") == result(tmp_path / "whole")


def test_a_new_machine_goes_on_from_the_hub(tmp_path, start, empty_hub):
    """Each run has a disk of its own, and dies; what it kept on the Hub is all that the next one has."""
    hub, repo = empty_hub, empty_hub.create("alice/long-run", private=True)
    settings = {"hub_strategy": "checkpoint", "hub_model_id": repo.id, "environment": {"HF_TOKEN": hub.tokens["write"]}}

    def log(name: str) -> str:
        return (tmp_path / name / "log.txt").read_text()

    def on_the_hub() -> dict[str, set[str]]:
        found = {}
        for path in hub.files(repo.id, "checkpoints"):
            folder, _, name = path.partition("/")
            found.setdefault(folder, set()).add(name)
        return {folder: names for folder, names in found.items() if folder.startswith("checkpoint-")}

    undisturbed = start(tmp_path / "undisturbed")
    # A file that is cut on its way is sent again (what arrived whole is not); the commit never comes about.
    with hub.fault("PUT /lfs/", drop_after=100) as cut, hub.fault("POST .*/commit/", status=500, times=1000) as down:
        assert finish(start(tmp_path / "down", **settings)) == 0
    assert cut.hits == 1 and down.hits >= 2 and on_the_hub() == {}, "nothing, not half of one"
    assert "checkpoint-14 was not uploaded (" in log("down") and hub.tokens["write"] not in log("down")

    assert finish(start(tmp_path / "first", "uploaded", 8, 0, **settings)) == -9
    assert on_the_hub().keys() == {"checkpoint-3", "checkpoint-6"}
    names = {"model.safetensors", "optimizer.pt", "rng_state.pth", "manifest.json"}
    assert all(names <= files and "training_args.bin" not in files for files in on_the_hub().values())

    # A commit that is refused is repeated; the oldest checkpoint leaves.
    with hub.fault("POST .*/commit/checkpoints", status=503) as refused:
        assert finish(start(tmp_path / "second", "uploaded", 11, 0, **settings)) == -9
    assert refused.hits == 1
    assert "Resumes from " in log("second") and "second/checkpoint-6" in log("second")
    assert on_the_hub().keys() == {"checkpoint-6", "checkpoint-9"}
    assert len(hub.commits(repo.id, "checkpoints")) == 1, "the storage of what has left is given back"
    assert hub.files(repo.id).keys() == {".gitattributes"}, "the branch of the model holds no checkpoint"

    harm = tmp_path / "harm" / "checkpoint-9"
    harm.mkdir(parents=True)
    content = bytearray(hub.files(repo.id, "checkpoints")["checkpoint-9/optimizer.pt"])
    content[len(content) // 2] ^= 1
    (harm / "optimizer.pt").write_bytes(content)
    hub.upload(repo.id, harm.parent, ref="refs/heads/checkpoints")
    with hub.fault("GET .*/revision/checkpoints", status=500, times=100):
        assert finish(start(tmp_path / "third", **settings)) == 2
    assert "error: --resume: the checkpoint on the Hub could not be fetched" in log("third")
    assert finish(start(tmp_path / "third", resume="hub", **settings)) == 0
    assert "Passed over checkpoint-9 on the Hub: optimizer.pt differs from its sha256." in log("third")
    assert finish(undisturbed) == 0
    assert result(tmp_path / "third") == result(tmp_path / "undisturbed") == result(tmp_path / "down")
    assert {path.name for path in (tmp_path / "third").glob("checkpoint-*")} == {"checkpoint-14"}
    assert on_the_hub().keys() == {"checkpoint-12", "checkpoint-14"}


def test_two_processes_stop_together_go_on_exactly_and_end_when_one_is_out_of_memory(tmp_path, start):
    def both(output_dir, *accident) -> list:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        common["ACCELERATE_USE_CPU"] = "true"
        ranks = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
        return [start(output_dir, *accident, environment=rank, max_steps=8, save_steps=4) for rank in ranks]

    undisturbed = both(tmp_path / "undisturbed")
    # Three steps an epoch: the fifth lies inside the second one. Only the second process gets the signal.
    stopped = both(tmp_path / "stopped", "SIGTERM", 5, 1)
    assert [finish(p) for p in stopped] == [143, 143], (tmp_path / "stopped" / "log.txt").read_text()
    assert newest_valid(tmp_path / "stopped") == "checkpoint-5"
    assert [finish(p) for p in both(tmp_path / "stopped")] == [0, 0]
    assert [finish(p) for p in undisturbed] == [0, 0]
    exhausted = both(tmp_path / "exhausted", "out of memory", 6, 1)
    assert finish(exhausted[1]) == 2 and finish(exhausted[0]) not in (0, 2)  # the other one loses its connection
    log = (tmp_path / "exhausted" / "log.txt").read_text()
    assert "Out of memory at step 6 in process 1 of 2." in log
    assert "--per_device_train_batch_size 1 --gradient_accumulation_steps 4" in log
    assert newest_valid(tmp_path / "exhausted") == "checkpoint-4"
    assert result(tmp_path / "stopped") == result(tmp_path / "undisturbed")


def test_a_checkpoint_that_only_the_first_machine_has_is_named(tmp_path, monkeypatch):
    """The first process has decided for a folder that is not on this machine's disk."""
    second = SimpleNamespace(num_processes=2, is_main_process=False)
    monkeypatch.setattr(processes, "PartialState", lambda: second)
    monkeypatch.setattr(processes, "broadcast_object_list", lambda answer: answer.__setitem__(0, tmp_path / "there"))
    with pytest.raises(
        UserError, match="there is not on machine .*: --output_dir must lie on a disk that all machines"
    ):
        checkpoints.find_checkpoint(tmp_path, "auto")


def write_checkpoint(output_dir: Path, step: int, identity: dict | None = IDENTITY) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    (folder / "shards").mkdir(parents=True)
    for name in ("model.safetensors", "optimizer.pt", "rng_state.pth", "shards/0.bin"):
        (folder / name).write_bytes(f"{name} {step}".encode() * 50)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    checkpoints.write_manifest(folder, identity)
    return folder


FILES = ["model.safetensors", "optimizer.pt", "rng_state.pth", "shards/0.bin", "trainer_state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["flip", "cut", "remove"])
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(tmp_path, caplog, name, harm):
    caplog.set_level(logging.INFO, "taskbook")
    write_checkpoint(tmp_path, 3)
    path = write_checkpoint(tmp_path, 20) / name
    content = bytearray(path.read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    elif harm == "cut":
        path.write_bytes(content[:-1])
    else:
        path.unlink()
    assert newest_valid(tmp_path) == "checkpoint-3"
    passed_over, chosen = caplog.messages
    assert "checkpoint-20" in passed_over and name in passed_over
    assert chosen == f"Resumes from {tmp_path}/checkpoint-3: the newest valid checkpoint."
    with pytest.raises(UserError, match=f"damaged .*{name}"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-20"), IDENTITY)


def test_resume_says_what_it_does(tmp_path, caplog):
    caplog.set_level(logging.INFO, "taskbook")
    assert checkpoints.find_checkpoint(tmp_path / "absent", "auto") is None
    first, second = write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 6)
    (tmp_path / "checkpoint-9").mkdir()
    assert checkpoints.find_checkpoint(tmp_path, str(first), IDENTITY) == first
    assert checkpoints.find_checkpoint(tmp_path, "never", IDENTITY) is None
    assert "there is no checkpoint yet" in caplog.messages[0]
    assert "checkpoint-6, checkpoint-9 will move to checkpoint-replaced/" in caplog.messages[1]
    assert "checkpoint-3, checkpoint-6, checkpoint-9 will move" in caplog.messages[2]
    assert checkpoints.damage(second) is None  # deciding changes nothing on disk
    with pytest.raises(UserError, match="no such folder.*holds checkpoint-3, checkpoint-6"):
        checkpoints.find_checkpoint(tmp_path, str(tmp_path / "checkpoint-4"))
    renamed = first.rename(tmp_path / "good")
    assert checkpoints.find_checkpoint(tmp_path, str(renamed), IDENTITY) == renamed


def test_weights_without_optimizer_are_not_resumed(tmp_path):
    folder = write_checkpoint(tmp_path, 3)
    (folder / "rng_state.pth").unlink()
    checkpoints.write_manifest(folder, IDENTITY)
    assert "save_only_model" in checkpoints.damage(folder)


def test_another_run_is_not_continued(tmp_path):
    folder = write_checkpoint(tmp_path, 3)
    changed = IDENTITY | {"data": "beef", "tokenizer": "new"}
    for resume in ("auto", str(folder)):
        with pytest.raises(UserError, match="data: f00d then, beef now; tokenizer: None then, new now") as error:
            checkpoints.find_checkpoint(tmp_path, resume, changed)
        assert "--resume never" in str(error.value)
    assert checkpoints.find_checkpoint(tmp_path, "auto", IDENTITY | {"columns": ("prompt", "completion")}) == folder


def begin(output_dir: Path, step: int, limit: int | None, best: str | None = None):
    args = SimpleNamespace(output_dir=str(output_dir), save_total_limit=limit, world_size=1, seed=0, hub_strategy="end")
    args.load_best_model_at_end, args.greater_is_better = best is not None, False
    args.metric_for_best_model = "loss" if best else None
    state = SimpleNamespace(global_step=step, is_world_process_zero=True, best_model_checkpoint=best, epoch=0)
    state.log_history = [] if best is None else [{"step": int(best.split("-")[-1]), "eval_loss": 1.0}]
    callback = checkpoints.CompleteCheckpoints(IDENTITY)
    callback.on_train_begin(args, state, None)
    return callback, args, state


def test_starting_anew_keeps_the_old_checkpoints_until_a_new_one_is_complete(tmp_path):
    write_checkpoint(tmp_path, 3), write_checkpoint(tmp_path, 6)
    callback, args, state = begin(tmp_path, 0, None)
    assert newest_valid(tmp_path) is None
    assert checkpoints.damage(tmp_path / "checkpoint-replaced" / "checkpoint-6") is None
    state.global_step = 3
    write_checkpoint(tmp_path, 3)
    callback.on_save(args, state, None)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-3"]


def test_the_newest_and_the_best_checkpoints_are_kept(tmp_path):
    for step in (3, 6, 9, 12, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-12" / "manifest.json").unlink()
    callback, args, state = begin(tmp_path, 100, 2)
    assert args.save_total_limit is None  # upstream must not delete before the manifest is written
    args.metric_for_best_model, args.greater_is_better = "loss", False
    state.log_history = [{"step": 3, "eval_loss": 1.0}, {"step": 9, "eval_loss": 2.0}, {"step": 8, "eval_loss": 0.5}]
    callback.on_save(args, state, None)
    assert {p.name for p in tmp_path.iterdir()} == {"checkpoint-3", "checkpoint-9", "checkpoint-100"}
    callback.on_train_end(args, state, None)
    assert args.save_total_limit == 2


def test_the_best_checkpoint_is_found_where_its_folder_was_moved_to(tmp_path, caplog):
    for step in (3, 6):
        write_checkpoint(tmp_path, step)
    _, _, state = begin(tmp_path, 6, None, best="/machine/that/is/gone/checkpoint-3")
    assert state.best_model_checkpoint == str(tmp_path / "checkpoint-3") and not caplog.text
    _, _, state = begin(tmp_path, 6, None, best="/machine/that/is/gone/checkpoint-2")
    assert state.best_model_checkpoint is None and "checkpoint-2, the best so far, is not there" in caplog.text


class Judged(transformers.Trainer):
    """Its evaluations find what is written here, by step."""

    LOSS = {0: 9, 2: 1, 4: 3, 6: 2, 8: 4}
    SCORE = {0: 0, 2: 5, 4: 6, 6: 8, 8: 7}

    def evaluate(self, *args, **kwargs):
        step = self.state.global_step
        found = {"eval_loss": float(self.LOSS[step]), "eval_score": float(self.SCORE[step])}
        self.log(dict(found))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, found)
        return found


def judged(folder: Path, resume: str, **options) -> Judged:
    """A run that evaluates every two steps and saves every four."""
    settings = {"max_steps": 8, "save_steps": 4, "eval_steps": 2, "eval_strategy": "steps", "report_to": []} | options
    args = transformers.TrainingArguments(str(folder), load_best_model_at_end=True, use_cpu=True, **settings)
    shape = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=64, n_positions=16)
    rows = [{"input_ids": row} for row in torch.randint(0, 64, (22, 4)).tolist()]
    callbacks = [checkpoints.CompleteCheckpoints(IDENTITY)]
    model = transformers.GPT2LMHeadModel(shape)
    trainer = Judged(model, args, train_dataset=rows, eval_dataset=rows, data_collator=collate, callbacks=callbacks)
    checkpoints.train(trainer, checkpoints.find_checkpoint(folder, resume, IDENTITY))
    return trainer


def test_the_best_of_those_that_were_saved_is_loaded_by_the_metric_that_is_asked_for_now(tmp_path):
    """Step 2 has the lowest loss of all and no checkpoint; a metric may change when a run goes on, and its folder may move."""
    first = judged(tmp_path / "run", "never")
    assert Path(first.state.best_model_checkpoint).name == "checkpoint-4"
    weights = {
        step: safetensors.torch.load_file(tmp_path / "run" / f"checkpoint-{step}" / "model.safetensors")
        for step in (4, 8)
    }
    (tmp_path / "run").rename(tmp_path / "moved")
    for metric, higher, step in (("loss", False, 4), ("eval_score", True, 8), ("score", False, 4), ("loss", True, 8)):
        options = {"metric_for_best_model": metric, "greater_is_better": higher}
        again = judged(tmp_path / "moved", "auto", **options)
        assert Path(again.state.best_model_checkpoint) == tmp_path / "moved" / f"checkpoint-{step}", (metric, higher)
        assert torch.equal(again.model.transformer.wte.weight, weights[step]["transformer.wte.weight"])
    on = judged(tmp_path / "moved", str(tmp_path / "moved" / "checkpoint-4"), metric_for_best_model="score")
    assert on.state.best_metric == 8 and Path(on.state.best_model_checkpoint).name == "checkpoint-8"


def test_a_metric_that_a_resumed_run_does_not_measure_is_one_line(tmp_path):
    judged(tmp_path, "never")
    with pytest.raises(UserError, match="--metric_for_best_model f1: an evaluation here measures loss, score"):
        judged(tmp_path, str(tmp_path / "checkpoint-4"), metric_for_best_model="f1")


def test_a_checkpoint_is_not_written_twice(tmp_path):
    write_checkpoint(tmp_path, 6)
    callback, args, state = begin(tmp_path, 6, 1)
    control = transformers.TrainerControl(should_save=True)
    callback.on_epoch_end(args, state, control)
    assert not control.should_save


def test_a_disk_that_is_too_small_is_refused(tmp_path):
    checkpoints.check_disk(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match="one more checkpoint takes"):
        checkpoints.check_disk(tmp_path, shutil.disk_usage(tmp_path).total + 1)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"), UserError),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), UserError),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0"), UserError),
        (RuntimeError("no kernel image is available"), RuntimeError),
    ],
)
def test_only_a_full_disk_is_reported_as_one(tmp_path, error, expected):
    def fail(resume_from_checkpoint):
        raise error

    args = SimpleNamespace(output_dir=str(tmp_path), max_steps=-1, auto_find_batch_size=False, world_size=1)
    args.eval_strategy, args.eval_on_start = "no", False
    state = SimpleNamespace(global_step=6)
    write_checkpoint(tmp_path, 3)
    (tmp_path / "checkpoint-6").mkdir()
    stopper, before = signals.StopOnSignal(), signal.getsignal(signal.SIGTERM)
    stopper.on_train_begin(args, state, None)
    assert signal.getsignal(signal.SIGTERM) != before
    handler = SimpleNamespace(callbacks=[stopper])
    trainer = SimpleNamespace(
        args=args,
        state=state,
        train=fail,
        training_step=None,
        evaluate=None,
        is_fsdp_enabled=False,
        neftune_noise_alpha=None,
    )
    trainer.is_world_process_zero, trainer.callback_handler = lambda: True, handler
    with pytest.raises(expected) as caught:
        checkpoints.train(trainer, None)
    assert signal.getsignal(signal.SIGTERM) == before, "the handlers stay when training raises"
    assert (tmp_path / "checkpoint-6").exists() == (caught.type is not UserError)


def test_a_second_interrupt_is_immediate_but_the_launchers_copy_is_not():
    stopper = signals.StopOnSignal()
    stopper.exit_if_stopped()
    stopper._receive(signal.SIGINT, None)
    stopper._receive(signal.SIGINT, None)
    stopper.received_at -= 2
    with pytest.raises(KeyboardInterrupt):
        stopper._receive(signal.SIGINT, None)
    with pytest.raises(SystemExit) as end:
        stopper.exit_if_stopped()
    assert end.value.code == 130


def test_a_stop_that_saved_nothing_does_not_say_so(capsys):
    """--save_strategy best saves no step that is worse than the best."""
    stopper, state = signals.StopOnSignal(), SimpleNamespace(global_step=4)
    stopper.on_save(None, state, None)
    stopper.received, stopper.step = signal.SIGTERM, 4
    with pytest.raises(SystemExit):
        stopper.exit_if_stopped()
    stopper.step = 6
    with pytest.raises(SystemExit):
        stopper.exit_if_stopped()
    saved, not_saved = capsys.readouterr().out.splitlines()
    assert "step 4, checkpoint saved" in saved and "step 6, not saved" in not_saved


def test_the_end_of_the_launcher_counts_as_sigterm(monkeypatch):
    args, state = SimpleNamespace(world_size=1), SimpleNamespace(global_step=4)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    stopper, control = signals.StopOnSignal(), transformers.TrainerControl()
    stopper.on_step_end(args, state, control)
    assert not control.should_training_stop
    monkeypatch.setattr(os, "getppid", lambda: stopper.launcher + 1)
    stopper.on_step_end(args, state, control)
    assert control.should_save and control.should_training_stop and stopper.received == signal.SIGTERM


@pytest.mark.parametrize("strategy", ["random", "group_by_length", "batch_rebalance"])
def test_the_order_of_the_rows_is_that_of_the_seed(tmp_path, strategy):
    """`--data_seed` decides where it is given, else `--seed`; each epoch has another order."""
    lengths = [1 + i % 5 for i in range(12)]
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * n for i, n in enumerate(lengths)], "length": lengths})

    def order(**seeds) -> list[int]:
        seen, model = [], torch.nn.Linear(1, 1)
        model.forward = lambda first: seen.extend(first.tolist()) or {"loss": model.weight.sum() + model.bias.sum()}
        args = transformers.TrainingArguments(
            tmp_path,
            max_steps=6,
            per_device_train_batch_size=4,
            train_sampling_strategy=strategy,
            report_to=[],
            **seeds,
        )
        args.save_strategy, args.remove_unused_columns = "no", False
        trainer = transformers.Trainer(
            model,
            args,
            train_dataset=rows,
            data_collator=lambda some: {"first": torch.tensor([row["input_ids"][0] for row in some])},
            callbacks=[checkpoints.CompleteCheckpoints()],
        )
        trainer.train()
        return seen

    first, other, of_data = order(seed=1), order(seed=7), order(seed=1, data_seed=7)
    assert sorted(first[:12]) == sorted(first[12:]) == list(range(12)) and first[:12] != first[12:]
    assert first == order(seed=1) != other
    assert of_data == other


@pytest.mark.parametrize("rows", range(1, 30))
@pytest.mark.parametrize(("batch", "count"), [(1, 3), (4, 2), (4, 3), (5, 4)])
def test_several_processes_share_an_epoch_out_without_repeating_rows(rows, batch, count):
    batches = torch.utils.data.BatchSampler(range(rows), batch, drop_last=False)
    shares = [processes.Shares(batches, count, rank) for rank in range(count)]
    taken = [list(share) for share in shares]
    assert [len(each) for each in taken] == [len(share) for share in shares] and len({len(each) for each in taken}) == 1
    for step, parts in enumerate(zip(*taken, strict=True)):
        whole = sorted(row for part in parts for row in part)
        expected = list(range(rows))[step * batch * count :][: batch * count]
        assert all(parts) and set(whole) == set(expected), "the rows of the step in one process"
        assert len(whole) == max(len(expected), count) and max(map(len, parts)) <= batch


def test_mean_train_loss_weighs_by_steps():
    history = [{"step": 5, "loss": 4.0}, {"step": 5, "eval_loss": 9.0}, {"step": 6, "loss": 1.0}, {"train_loss": 0.1}]
    assert checkpoints.mean_train_loss(history) == pytest.approx((5 * 4.0 + 1.0) / 6)
    assert checkpoints.mean_train_loss([]) != checkpoints.mean_train_loss([])
