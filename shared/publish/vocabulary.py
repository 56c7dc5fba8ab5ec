"""The tokenizer that lies beside a model, and whether the two belong together. Used by tasks, inference and retrieval."""

from fnmatch import fnmatch
from pathlib import Path

from shared import UserError

# What a tokenizer keeps its vocabulary in
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.vocab", "*.model", "*.spm", "*.tiktoken", "tekken.json")


def load_tokenizer(source: str | Path, adapter: bool = False, **options):
    """The tokenizer in the folder of a model.

    Args:
        adapter: the folder may hold an adapter alone: its base is loaded elsewhere.
        options: of `from_pretrained`.

    Raises:
        UserError: an adapter, or no model; no tokenizer, or one whose tokens are all special.
    """
    from transformers import AutoTokenizer

    source = Path(source)
    if not adapter:
        check_folder(source)
    missing = (
        f"{source}: no tokenizer beside the model. Save there the one that the model was trained with: "
        "`tokenizer.save_pretrained(folder)`."
    )
    kept = any(fnmatch(path.name, kind) for path in source.iterdir() for kind in VOCABULARIES)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"{source}: its tokenizer cannot be read ({reason})." if kept else missing) from error
    # transformers makes an empty one where there is no file: every word would be [UNK]. ByT5's bytes need none.
    if not kept and tokenizer.vocab_files_names or len(tokenizer) <= len(set(tokenizer.all_special_ids)):
        raise UserError(missing)
    return tokenizer


def check_folder(source: str | Path) -> None:
    """Raises UserError for a folder that holds an adapter alone, or a tokenizer."""
    if (Path(source) / "config.json").is_file():
        return
    if (Path(source) / "adapter_config.json").is_file():
        raise UserError(
            f"{source} is an adapter, expected a whole model. Merge it into its base, and take the result: "
            f"`python -m shared.export {source} --to merged`. tasks/dpo_chat takes LoRA adapters as they are."
        )
    raise UserError(
        f"{source} holds no model: config.json and model.safetensors are missing, as `save_pretrained` writes them."
    )


def check_vocabulary(config, tokenizer, source: str | Path, needs: int | None = None) -> None:
    """More embeddings than tokens are fine: many models are padded.

    Args:
        config: of the model.
        needs: embeddings that the rows and their padding read; without, one for each token of the tokenizer.

    Raises:
        UserError: fewer embeddings than that.
    """
    size = getattr(config.get_text_config(), "vocab_size", None)  # none where characters are hashed (CANINE)
    if size and size < (needs or len(tokenizer)):
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer):,} tokens, the model {size:,} embeddings: tokens were added to the "
            "tokenizer and not to the model. Take the model's own tokenizer, or first "
            "`model.resize_token_embeddings(len(tokenizer))`, and save."
        )
