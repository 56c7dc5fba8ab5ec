"""T5 and BART in LiteRT behind transformers' own `generate`. Used by litert_runner.py."""

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from shared.inference.onnx_seq2seq import EncoderDecoder


class LiteRTEncoderDecoder(EncoderDecoder):
    """Reads all that is written anew for each token: its graphs have fixed shapes and no cache."""

    def __init__(self, config, generation, runner):
        super().__init__(config, generation)
        self.runner, self.most = runner, runner.shapes["write"]["decoder_input_ids"][1]

    def encode(self, input_ids, attention_mask=None, **_):
        """The encoder's states, (rows, tokens of the graph, width)."""
        rows = zip(input_ids.numpy(), attention_mask.numpy(), strict=True)
        found = [
            self.runner.run("encode", {"input_ids": ids[None], "attention_mask": mask[None]}) for ids, mask in rows
        ]
        return BaseModelOutput(last_hidden_state=torch.from_numpy(np.concatenate([each["states"] for each in found])))

    def forward(self, attention_mask=None, decoder_input_ids=None, encoder_outputs=None, **_):
        """(rows, tokens) `decoder_input_ids` -> (rows, tokens, vocabulary) logits."""
        scores, length = [], decoder_input_ids.shape[1]
        for ids, mask, states in zip(decoder_input_ids, attention_mask, encoder_outputs.last_hidden_state, strict=True):
            inputs = {"decoder_input_ids": ids[None], "attention_mask": mask[None], "states": states[None]}
            found = self.runner.run("write", {name: value.numpy() for name, value in inputs.items()})
            scores.append(found["logits"][:, :length])
        return Seq2SeqLMOutput(logits=torch.from_numpy(np.concatenate(scores)))
