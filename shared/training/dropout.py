"""How much a model drops while training, whatever its architecture calls it. Called by mlm_bert, qa_squad and rag_docs."""

from torch import nn

HIDDEN = ("hidden_dropout_prob", "hidden_dropout", "dropout", "dropout_rate", "resid_pdrop", "embd_pdrop")
HIDDEN += ("embedding_dropout", "qa_dropout")
INSIDE = ("attention_probs_dropout_prob", "attention_dropout", "attn_pdrop", "activation_dropout", "mlp_dropout")


def dropout_settings(config, hidden: float) -> dict[str, float]:
    """What `from_pretrained` needs for this dropout on hidden states and none inside a layer: torch's fused attention on a CPU
    takes none."""
    found = dict.fromkeys(HIDDEN, hidden) | dict.fromkeys(INSIDE, 0.0)
    return {name: value for name, value in found.items() if hasattr(config, name)}


def set_dropout(model, share: float) -> None:
    """Drops this share wherever the model drops activations while training; whole layers as before. The configuration keeps the
    model's own."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
        for name, value in list(vars(module).items()):  # BART and XLM keep it as a number
            if isinstance(value, float) and "drop" in name and "layer" not in name:
                setattr(module, name, share)
