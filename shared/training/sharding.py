"""FSDP: each process holds a shard of a model, trained or only measured. Used by checkpoints.train and the tasks.

accelerate/fsdp.yaml says what works; tests/training/test_fsdp.py and tests/tasks/test_contract.py hold it, with two processes.
"""

import os

from accelerate.utils import fsdp2_prepare_model

from shared import UserError


def is_sharded(args) -> bool:
    """Whether FSDP was asked for, by `accelerate launch` or by `--fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP") == "true" or bool(args.fsdp)


def refuse_sharded(args, what: str, remedy: str) -> None:
    """Raises UserError where FSDP was asked for, with what does not go with it."""
    if is_sharded(args):
        raise UserError(f"{what} does not go with FSDP, which shards each matrix: {remedy}.")


def shard(trainer, model):
    """`model` in shards, as `trainer` trains: each layer is gathered when it computes; embeddings, head and the rest stay
    gathered from a forward pass to the end of its backward pass.

    accelerate 1.15 would shard embeddings and head by themselves, which fails where a layer's class holds the embeddings
    (BERT), and where more modules than these two share one table (T5, BART). A model that comes sharded it takes as it is.
    """
    plugin, table = trainer.accelerator.state.fsdp_plugin, model.get_input_embeddings()
    if plugin.fsdp_version != 2:
        raise UserError("FSDP of version 1 is not supported: write `fsdp_version: 2`, as accelerate/fsdp.yaml does.")
    if plugin.transformer_cls_names_to_wrap is None:
        found = {type(module).__name__: any(part is table for part in module.modules()) for module in model.modules()}
        layers = getattr(model, "_no_split_modules", None) or ()
        plugin.transformer_cls_names_to_wrap = [name for name in layers if found.get(name) is False]
    model.get_input_embeddings = model.get_output_embeddings = lambda: None
    try:
        fsdp2_prepare_model(trainer.accelerator, model)
    finally:
        del model.get_input_embeddings, model.get_output_embeddings
    # A gathered table comes once for each of its names: the saved model holds it once, as always
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    model._keys_to_ignore_on_save = [*(getattr(model, "_keys_to_ignore_on_save", None) or ()), *tied]
    for part in (model, getattr(model, "get_base_model", lambda: model)()):
        part._is_fsdp_managed_module = True  # its `generate` waits for the processes that write more
    return model


def beside(trainer, model):
    """A model to compare with, where the trained one is: on the device of this process, or in shards."""
    return shard(trainer, model) if trainer.is_fsdp_enabled else model.to(trainer.args.device)
