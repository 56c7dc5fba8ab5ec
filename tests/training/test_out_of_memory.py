"""shared/training/out_of_memory.py: out of memory at step k, a run ends like one with small micro-batches from the start."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from shared import UserError
from shared.training import checkpoints, out_of_memory

ERRORS = {
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "plain": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory: 8 bytes."),
}


class Limit(transformers.TrainerCallback):
    """From a step on, a forward pass of more than `most` rows raises: in the second of the step's micro-batches first."""

    def __init__(self, step: int, most: int, error: Exception = ERRORS["torch"]):
        self.step, self.most, self.error = step, most, error
        self.training, self.seen, self.rows = [], 0, []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if not self.training:
            model.register_forward_pre_hook(self.check, with_kwargs=True)
        self.training.append(args.per_device_train_batch_size)

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen, self.now = 0, state.global_step + 1

    def check(self, model, args, kwargs):
        rows = len(kwargs["input_ids"])
        self.seen += 1
        if model.training and self.now >= self.step and self.seen >= 2 and rows > self.most:
            raise self.error
        if not model.training and rows > self.most:
            raise self.error
        self.rows.append((model.training, rows))


def trained(folder, limit=None, micro=4, accumulation=2, checkpoint=None, **settings):
    """A tiny GPT-2 without dropout, 30 rows in steps of 8: the last step of each epoch is not full."""
    rows = torch.randint(0, 64, (30, 16), generator=torch.Generator().manual_seed(1))
    settings = {"max_steps": 10, "save_strategy": "no", "logging_steps": 1} | settings
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    transformers.set_seed(args.seed)
    config = transformers.GPT2Config(
        n_layer=1, n_embd=32, n_head=2, vocab_size=64, n_positions=16, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    callbacks = [checkpoints.CompleteCheckpoints({"data": "f00d"}), *([limit] if limit else [])]
    model = transformers.GPT2LMHeadModel(config)
    trainer = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks)
    checkpoints.train(trainer, checkpoint)
    return trainer


def losses(trainer) -> dict[int, float]:
    found = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    assert len(dict(found)) == len(found), "a step was logged twice"
    return dict(found)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The run that has one row at a time from its beginning."""
    return trained(tmp_path_factory.mktemp("small"), micro=1, accumulation=8)


@pytest.mark.parametrize(
    ("step", "error", "logging_steps", "logged"),
    [(1, "torch", 1, [*range(1, 11)]), (6, "plain", 4, [4, 5, 8, 10])],
)
def test_ends_like_a_run_with_the_small_micro_batch(small, tmp_path, caplog, step, error, logging_steps, logged):
    limit = Limit(step, 1, ERRORS[error])
    trainer = trained(tmp_path, limit, logging_steps=logging_steps)
    by_step = losses(small)  # logged are means over the steps since the log before
    means = [sum(by_step[s] for s in range(a + 1, b + 1)) / (b - a) for a, b in zip([0, *logged], logged, strict=False)]
    assert losses(trainer) == pytest.approx(dict(zip(logged, means, strict=True)), abs=1e-5) and len(by_step) == 10
    for name, value in trainer.model.state_dict().items():
        assert torch.allclose(value, small.model.state_dict()[name], atol=1e-4), name
    assert limit.training == [4, 2, 1]
    told = [record.getMessage() for record in caplog.records if "Out of memory" in record.getMessage()]
    ending = "the effective batch stays."
    assert told == [
        f"Out of memory at step {step}: 2 rows at a time instead of 4, accumulated over 4; {ending}",
        f"Out of memory at step {step}: 1 rows at a time instead of 2, accumulated over 8; {ending}",
    ]
    failed = 4 + 2  # rows of the micro-batches that came first in the step that failed twice
    assert sum(rows for _, rows in limit.rows) == 30 + 30 + 16 + failed


def test_goes_on_from_a_checkpoint_that_is_there_and_after_an_end_with_the_first_settings(small, tmp_path):
    limit = Limit(6, 2)
    trained(tmp_path, limit, save_strategy="steps", save_steps=5, max_steps=7, lr_scheduler_type="constant")
    written = (tmp_path / "checkpoint-5").stat().st_mtime_ns
    manifest = (tmp_path / "checkpoint-5" / "manifest.json").stat().st_mtime_ns
    assert limit.training == [4, 2] and manifest <= written  # once only
    straight = trained(tmp_path / "2", micro=2, accumulation=4, max_steps=9, lr_scheduler_type="constant")
    checkpoint = checkpoints.find_checkpoint(tmp_path, "auto", {"data": "f00d"})
    assert checkpoint.name == "checkpoint-7"
    again = trained(tmp_path, Limit(9, 2), checkpoint=checkpoint, max_steps=9, lr_scheduler_type="constant")
    assert losses(again) == pytest.approx(losses(straight), abs=1e-5) and len(losses(again)) == 9


def test_an_evaluation_never_shrinks_the_training_batch(tmp_path, caplog):
    limit = Limit(99, 2)
    evaluated = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 4, "per_device_eval_batch_size": 8}
    trainer = trained(tmp_path, limit, **evaluated)
    assert trainer.args.per_device_train_batch_size == 4 and trainer.args.per_device_eval_batch_size == 2
    assert limit.training == [4] and [rows for training, rows in limit.rows if not training] == [2] * 12
    assert "2 rows at a time instead of 4" in caplog.text
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 2, 4]


@pytest.mark.parametrize(
    ("most", "settings", "expected"),
    [
        (0, {"micro": 2}, "at step 1 with one row at a time"),
        (0, {"micro": 8, "eval_strategy": "steps", "eval_steps": 1, "step": 99}, "evaluation with one row at a time"),
        (1, {"auto_find_batch_size": True}, "changes the effective batch"),
    ],
)
def test_what_cannot_be_mended_is_one_clear_error(tmp_path, most, settings, expected):
    limit = Limit(settings.pop("step", 1), most)
    with pytest.raises(UserError, match=expected):
        trained(tmp_path, limit, **settings)


def test_the_optimizers_own_memory_is_told_apart(tmp_path):
    class Full(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            raise ERRORS["torch"]

    with pytest.raises(UserError, match="outside of forward and backward.*adafactor"):
        trained(tmp_path, Full())


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert triggered"), ValueError("memory")])
def test_other_errors_are_not_swallowed(tmp_path, error):
    with pytest.raises(type(error), match=str(error)):
        trained(tmp_path, Limit(1, 1, error))


def test_what_counts_as_out_of_memory():
    assert all(map(out_of_memory.is_out_of_memory, ERRORS.values()))
    assert not out_of_memory.is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


@pytest.mark.parametrize(
    ("now", "then"), [((8, 1), (4, 2)), ((4, 3), (2, 6)), ((3, 2), (1, 6)), ((5, 2), (2, 5)), ((6, 1), (3, 2))]
)
def test_the_product_stays(now, then):
    assert out_of_memory.smaller(*now) == then


def test_a_scoring_function_is_repeated_with_smaller_batches():
    sizes = []

    @out_of_memory.within_memory
    def score(model, args, title="x"):
        sizes.append(args.per_device_eval_batch_size)
        if sizes[-1] > 3:
            raise ERRORS["plain"]
        return model, title

    args = SimpleNamespace(per_device_eval_batch_size=12, world_size=1, process_index=0)
    assert score("m", args, title="t") == ("m", "t") and sizes == [12, 6, 3]
    args.per_device_eval_batch_size, args.world_size = 12, 2
    with pytest.raises(UserError, match="process 0 of 2.*--per_device_eval_batch_size 6;"):
        score("m", args)


def test_after_training_only_the_weights_are_left(tmp_path):
    """Of what training takes, 16 bytes a parameter: a second model of 4 to compare with has room, then."""
    trainer = trained(tmp_path, max_steps=2)
    assert not trainer.optimizer.state and all(p.grad is None for p in trainer.model.parameters())
    assert trainer.evaluate()["eval_loss"] > 0
