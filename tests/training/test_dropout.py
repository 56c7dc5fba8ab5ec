"""Dropout reaches whatever a model drops with."""

import pytest
import torch
import transformers

from shared.training.dropout import dropout_settings, set_dropout

SMALL = {"vocab_size": 50, "num_labels": 3, "pad_token_id": 0, "max_position_embeddings": 32}
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
BART = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
}
BART |= {"encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "eos_token_id": 2, "activation_dropout": 0.1}
DEBERTA = BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
KINDS = {"Bert": BERT, "DebertaV2": DEBERTA, "Bart": BART, "GPT2": {"n_embd": 32, "n_layer": 1, "n_head": 2}}
KINDS |= {"DistilBert": {"dim": 32, "n_layers": 1, "n_heads": 2, "hidden_dim": 32}}
KINDS |= {"XLM": {"emb_dim": 32, "n_layers": 1, "n_heads": 2}}


@pytest.mark.parametrize("kind", KINDS)
def test_without_dropout_training_says_what_evaluation_says(kind):
    """Some keep it as a layer, some as a number; 0.5 again leaves its marks."""
    of_kind = getattr(transformers, f"{kind}ForSequenceClassification")
    torch.manual_seed(0)
    model = of_kind(of_kind.config_class(**(SMALL | KINDS[kind])))
    ids = torch.tensor([[5, 6, 7, 8, 2]])
    expected, dropped = model.eval()(ids).logits, model.train()(ids).logits
    assert not torch.allclose(dropped, expected, atol=1e-5), "this kind drops nothing"
    set_dropout(model, 0.0)
    assert torch.allclose(model.train()(ids).logits, expected, atol=1e-5)
    before = model.config.to_dict()
    vectors = model.base_model.eval()(ids)[0]
    for p in (0.0, 0.5):
        other = of_kind(of_kind.config_class(**(SMALL | KINDS[kind] | dropout_settings(model.config, p))))
        other.load_state_dict(model.state_dict())
        assert torch.allclose(other.base_model.train()(ids)[0], vectors, atol=1e-5) == (p == 0)
    set_dropout(model, 0.5)
    assert not torch.allclose(model.train()(ids).logits, expected, atol=1e-5)
    assert model.config.to_dict() == before and torch.allclose(model.eval()(ids).logits, expected, atol=1e-5)
