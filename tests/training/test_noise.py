"""shared/training/noise.py: as much noise as `--neftune_noise_alpha` says for each text, however texts share a batch."""

from types import SimpleNamespace

import pytest
import torch
import transformers

from shared.training import checkpoints, noise
from shared.training.packed_attention import PACKED

ALPHA, LENGTHS = 5.0, (4, 25, 64)


@pytest.mark.parametrize("packed", [True, False])
def test_each_text_gets_the_noise_of_its_own_length(packed):
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=99, **shape)).train()
    texts = [torch.arange(length) for length in LENGTHS]
    if packed:
        model.set_attn_implementation(PACKED)
        starts = torch.tensor([0, *LENGTHS]).cumsum(0)
        batch = {"input_ids": torch.cat(texts)[None], "cu_seq_lens_q": starts}
        batch["position_ids"] = torch.cat(texts)[None]
    else:
        batch = dict.fromkeys(("input_ids", "attention_mask"))
        batch["input_ids"] = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
        batch["attention_mask"] = torch.nn.utils.rnn.pad_sequence([t * 0 + 1 for t in texts], batch_first=True)
    trainer, embedded = SimpleNamespace(model=model, neftune_noise_alpha=ALPHA), []
    hooks = noise.add_noise(trainer)
    assert trainer.neftune_noise_alpha is None  # upstream would add its own
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: embedded.append(output))
    model(**batch)
    model.eval()(**batch)
    added = (embedded[0] - embedded[1]).detach().abs()
    rows = added[0].split(LENGTHS) if packed else [row[:length] for row, length in zip(added, LENGTHS, strict=True)]
    for row, length in zip(rows, LENGTHS, strict=True):
        most = ALPHA / (length * 64) ** 0.5
        assert 0.9 * most < row.max() <= 1.001 * most and row.mean() == pytest.approx(most / 2, rel=0.15)
    for hook in hooks:
        hook.remove()
    assert torch.equal(model.train().get_input_embeddings()(batch["input_ids"]), embedded[1])


def test_a_run_trains_with_it_and_takes_it_off(tmp_path):
    trained = []
    for alpha in (None, 5.0, 5.0):
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=2, use_cpu=True, save_strategy="no", report_to=[], neftune_noise_alpha=alpha
        )
        transformers.set_seed(0)
        shape = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=64, n_positions=16)
        model = transformers.GPT2LMHeadModel(shape)
        rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
        trainer = transformers.Trainer(model, args, train_dataset=rows)
        checkpoints.train(trainer, None)
        trained.append(model.transformer.wte.weight.detach().clone())
        assert torch.equal(model.train().transformer.wte(torch.arange(8)), trained[-1][:8])
    assert torch.equal(trained[1], trained[2]) and not torch.equal(trained[0], trained[1])
