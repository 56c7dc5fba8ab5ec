"""A BART whose both sides start from a BERT encoder: an encoder-decoder where no pretrained one is at hand. Used by
seq2seq_models.py.

Rothe et al. 2020 (Leveraging Pre-trained Checkpoints for Sequence Generation Tasks) start both sides from BERT; BART's layers
are BERT's, so the result is an ordinary BART, which every tool loads. Cross-attention starts as a copy of self-attention
(Rothe et al. start it at random): the decoder then looks at once at words like the one it has written.
"""

from pathlib import Path

import torch
from transformers import AutoModel, BartConfig, BartForConditionalGeneration

# BART's names of a layer's parts, and BERT's
ATTENTION = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
}
PARTS = {f"self_attn.{name}": part for name, part in ATTENTION.items()}
PARTS |= {"self_attn_layer_norm": "attention.output.LayerNorm", "fc1": "intermediate.dense", "fc2": "output.dense"}
PARTS |= {"final_layer_norm": "output.LayerNorm"}
CROSS_PARTS = {f"encoder_attn.{name}": part for name, part in ATTENTION.items()}
CROSS_PARTS |= {"encoder_attn_layer_norm": "attention.output.LayerNorm"}


def bart_from_bert(source: Path, tokenizer, decoder_layers: int = 3):
    """A BART with all layers of a BERT as its encoder and some of them, evenly chosen, as its decoder, in fp32.

    The encoder's states are BERT's, and stay so but for the word vectors, which both sides and the output share: its layers
    are frozen and run without gradients, which is half of the work.
    """
    bert = AutoModel.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, add_pooling_layer=False, trust_remote_code=False
    )
    old = bert.config
    heads, width = old.num_attention_heads, old.intermediate_size
    chosen = (
        torch.linspace(0, old.num_hidden_layers - 1, min(decoder_layers, old.num_hidden_layers)).round().int().tolist()
    )
    config = BartConfig(
        vocab_size=old.vocab_size,
        d_model=old.hidden_size,
        encoder_layers=old.num_hidden_layers,
        decoder_layers=len(chosen),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=width,
        decoder_ffn_dim=width,
        max_position_embeddings=old.max_position_embeddings,
        activation_function=old.hidden_act,
        dropout=0.0,  # each row is seen about once
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        decoder_start_token_id=tokenizer.sep_token_id,
        forced_bos_token_id=tokenizer.cls_token_id,
        forced_eos_token_id=None,
    )
    model = BartForConditionalGeneration(config)
    weights = bert.state_dict()

    def copy(target: str, origin: str):
        module = model.get_submodule(f"model.{target}")
        module.weight.copy_(weights[f"{origin}.weight"])
        module.bias.copy_(weights[f"{origin}.bias"])

    with torch.no_grad():
        model.model.shared.weight.copy_(weights["embeddings.word_embeddings.weight"])
        positions = (
            weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
        )
        for side, layers in (("encoder", range(old.num_hidden_layers)), ("decoder", chosen)):
            stack = model.get_submodule(f"model.{side}")
            stack.embed_positions.weight[2:].copy_(positions)  # BART's positions begin at 2
            copy(f"{side}.layernorm_embedding", "embeddings.LayerNorm")
            for number, layer in enumerate(layers):
                for part, origin in (PARTS | (CROSS_PARTS if side == "decoder" else {})).items():
                    copy(f"{side}.layers.{number}.{part}", f"encoder.layer.{layer}.{origin}")
    model.generation_config.no_repeat_ngram_size = 3  # as facebook/bart-base has it
    encoder = model.model.encoder
    for part in (encoder.embed_positions, encoder.layernorm_embedding, encoder.layers):
        part.requires_grad_(False)
    encoder.forward = torch.no_grad()(encoder.forward)
    return model
