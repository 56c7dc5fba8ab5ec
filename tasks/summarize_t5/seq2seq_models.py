"""Encoder-decoder and tokenizer, from a name or from scratch; fp16 that T5 survives; loss, summaries. Used by train.py."""

import string
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from articles import pieces
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING
from warm_start import bart_from_bert

from shared import UserError, metrics
from shared.inference.positions import check_settings
from shared.publish import vocabulary
from shared.training.losses import finite, log_evaluation
from shared.training.scoring import score_rows
from shared.training.sharding import refuse_sharded

T5_FAMILY = ("t5", "mt5", "umt5", "longt5")


def load_tokenizer(source: Path | None, texts: Iterator[str], vocab_size: int):
    """The model's tokenizer; without a model one of `vocab_size` tokens, learnt from `texts`, with T5's special tokens.

    Byte-pair encoding (Sennrich et al. 2016) and not T5's unigrams: tokenizers 0.23 learns other unigrams each time, so that no
    run could be repeated or resumed.
    """
    if source is not None:
        names = ["input_ids", "attention_mask"]  # a BERT's token types mean nothing to a BART
        return vocabulary.load_tokenizer(source, model_input_names=names)
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=list(
            string.ascii_letters + string.digits + string.punctuation
        ),  # T5's prefix, whatever the texts
        limit_alphabet=500,
        max_token_length=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = dict(zip(("pad_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def load_model(source: Path | None, tokenizer, script_args, args):
    """The model in fp32, ready for the precision of the run, with the run's generation settings.

    Without a source a T5 with random weights, the same ones for the same seed: `scratch_width` wide, 64 a head, a layer for
    each head on both sides. From a BERT a BART that starts from it (warm_start.py).

    Raises:
        UserError: not an encoder-decoder, documents longer than its positions, or a tokenizer of another model.
    """
    if source is None:
        width = script_args.scratch_width
        if width < 64 or width % 64:
            raise UserError(f"--scratch_width {width}: give a multiple of 64, the width of an attention head.")
        config = T5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_ff=4 * width,
            num_layers=width // 64,
            num_heads=width // 64,
            decoder_start_token_id=tokenizer.pad_token_id,
        )
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            model = T5ForConditionalGeneration(config)
    else:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.model_type != "bert" and type(config) not in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING:
            raise UserError(
                f"{source} is a {config.model_type} model; expected an encoder-decoder (T5, BART) or a BERT to start one."
            )
        # A name that older and newer configurations have in common, but LED; T5 has none, its positions are relative.
        both = getattr(config, "max_position_embeddings", None)
        for side, does, option in (
            ("encoder", "reads", "max_source_length"),
            ("decoder", "writes", "max_target_length"),
        ):
            most, asked = getattr(config, f"max_{side}_position_embeddings", both), getattr(script_args, option)
            if most and asked > most:
                raise UserError(f"{source} {does} at most {most} tokens: lower --{option} (now {asked}).")
        if config.model_type == "bert":
            model = bart_from_bert(source, tokenizer)
        else:
            model = AutoModelForSeq2SeqLM.from_pretrained(
                source, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(
            f"{source}: its tokenizer has {len(tokenizer):,} tokens, the model {model.config.vocab_size:,}: they do not "
            "belong together."
        )
    if model.config.decoder_start_token_id is None or tokenizer.pad_token_id is None:
        raise UserError(f"{source}: its config names no decoder_start_token_id, or its tokenizer no padding token.")
    if args.fp16 and model.config.model_type in T5_FAMILY:
        refuse_sharded(args, "--fp16 for a T5", "train without it, or take accelerate/multi_gpu.yaml")
        keep_feed_forward_in_fp32(model, args.device.type)
    if prefix_of(model):
        model.config.task_specific_params = {"summarization": {"prefix": prefix_of(model)}}
    model.generation_config.max_new_tokens = script_args.max_target_length
    model.generation_config.max_length = None
    model.generation_config.num_return_sequences = 1  # here already: of a single beam generate() refuses more
    model.generation_config.num_beams = args.generation_num_beams or 1
    if model.generation_config.num_beams == 1:
        model.generation_config.early_stopping = model.generation_config.length_penalty = None  # they mean beams only
    few = {"max_new_tokens": 2, "do_sample": False}
    check_settings(source, lambda: model.generate(tokenizer("a", return_tensors="pt")["input_ids"], **few))
    return model


def prefix_of(model) -> str:
    """What a document begins with: T5 was pretrained on `summarize: ` (Raffel et al. 2020, appendix D), BART on none."""
    return "summarize: " if model.config.model_type in T5_FAMILY else ""


def keep_feed_forward_in_fp32(model, device: str) -> None:
    """Runs the feed-forward layers of a T5 in fp32 inside fp16 autocast; weights and residual stream are fp32 there anyway.

    T5 was trained in bf16, and its feed-forward outputs exceed 65,504, the largest fp16: infinity, then NaN. transformers
    keeps the output projection of fp16 *weights* in fp32 (`_keep_in_fp32_modules`), but autocast rounds its inputs again. The
    whole layer, since a gated one (v1.1) multiplies two large numbers before the projection. Attention and the head, whose
    inputs are normalised, stay in fp16.
    """

    def in_fp32(forward):
        def wrapped(hidden_states):
            with torch.autocast(device, enabled=False):
                return forward(hidden_states.float())

        return wrapped

    for name, module in model.named_modules():
        if name.endswith("DenseReluDense"):
            module.forward = in_fp32(module.forward)


def token_loss(outputs, labels, num_items_in_batch=None, label_smoothing: float = 0.0):
    """Mean nll in nats over the summary tokens of the whole optimizer step (`num_items_in_batch` of them).

    T5 in transformers 5.23 takes that number and ignores it: with gradient accumulation each micro-batch would weigh the same.

    Raises:
        UserError: the loss is not finite, before the optimizer has used it.
    """
    logits = outputs["logits"].float().flatten(0, 1)
    total = F.cross_entropy(logits, labels.flatten(), reduction="sum", label_smoothing=label_smoothing)
    return finite(total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch))


class SummaryTrainer(Seq2SeqTrainer):
    """`Seq2SeqTrainer` that evaluates the validation split as the test split is, whatever the size of its batches. Upstream takes
    the mean of the batches' means, and leaves defaults of its own in the generation settings of a model that writes.

    Args:
        more_measures: finds other measures of the model by name, see `written_scores`; or None.
    """

    def __init__(self, *args, more_measures=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.more_measures = more_measures

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
        """Loss over all tokens of the validation split's summaries, and what `more_measures` finds."""
        rows = score_summaries(self.model, eval_dataset or self.eval_dataset, self.data_collator, self.args)
        more = self.more_measures(self.model) if self.more_measures else {}
        return log_evaluation(self, rows, metric_key_prefix, **more)


def score_summaries(model, rows, collator, args) -> dict[str, list[float]]:
    """`{"nll": summed nats, "tokens": summary tokens}` of each row, in the data set's order; no logits are kept."""

    def score_batch(numbers: list[int]) -> list[tuple[float, int]]:
        inputs = collator(
            [{name: rows[i][name] for name in ("input_ids", "attention_mask", "labels")} for i in numbers]
        )
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        labels = inputs.pop("labels")
        logits = model(**inputs, use_cache=False).logits
        nll = F.cross_entropy(logits.float().transpose(1, 2), labels, reduction="none").cpu().double().sum(1)
        return list(zip(nll.tolist(), labels.ne(-100).sum(1).tolist(), strict=True))

    scored = score_rows(model, rows["length"], score_batch, args, "loss")
    return dict(zip(("nll", "tokens"), map(list, zip(*scored, strict=True)), strict=True))


def written_scores(model, tokenizer, rows, script_args, args) -> dict:
    """ROUGE of the validation split, for `--predict_with_generate` and `--metric_for_best_model rougeL`."""
    written = summarize(model, tokenizer, list(rows["document"]), script_args, args, "summaries, validation")
    found = metrics.load("rouge").compute(predictions=written, references=list(rows["summaries"]))
    return {name: value for name, value in found.items() if not name.endswith("_ci95")}


def summarize(model, tokenizer, documents: list[str], script_args, args, title: str = "summaries") -> list[str]:
    """Summaries by the model's own generation settings, one a document. Only texts are kept, whatever the number of rows.

    With `--long_documents chunk` a document that is too long is summarized piece by piece (whole sentences), and the
    summaries of the pieces, joined by blanks, are its summary.
    """
    prefix, most = prefix_of(model), script_args.max_source_length
    owners, parts = list(range(len(documents))), list(documents)
    if script_args.long_documents == "chunk":
        room = most - len(tokenizer(prefix)["input_ids"])
        split = [pieces(document, tokenizer, room) for document in documents]
        owners = [i for i, found in enumerate(split) for _ in found]
        parts = [part for found in split for part in found]

    def write_batch(numbers: list[int]) -> list[str]:
        inputs = tokenizer(
            [prefix + parts[i] for i in numbers], truncation=True, max_length=most, padding=True, return_tensors="pt"
        ).to(model.device)
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        return tokenizer.batch_decode(model.generate(**inputs, do_sample=False), skip_special_tokens=True)

    texts: list[list[str]] = [[] for _ in documents]
    written = score_rows(model, [len(part) for part in parts], write_batch, args, title)
    for owner, text in zip(owners, written, strict=True):
        texts[owner] += [text.strip()]
    return [" ".join(filter(None, each)) for each in texts]


def usage(repo: str, prefix: str, max_source: int) -> str:
    """The lines of Python that load what a run has left and summarize with it; shown on the model card."""
    return "\n".join(
        [
            "from transformers import AutoModelForSeq2SeqLM, AutoTokenizer",
            "",
            f'model = AutoModelForSeq2SeqLM.from_pretrained("{repo}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{repo}")',
            'document = "..."',
            f'batch = tokenizer("{prefix}" + document, truncation=True, max_length={max_source}, return_tensors="pt")',
            "print(tokenizer.decode(model.generate(**batch)[0], skip_special_tokens=True))",
        ]
    )
