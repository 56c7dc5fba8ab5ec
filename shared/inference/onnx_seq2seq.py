"""T5 and BART in ONNX Runtime behind transformers' own `generate`: beams, forced tokens, no repeated n-grams. Used by
shared/inference/model.py.
"""

import numpy as np
import torch
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput


class _Callable:
    """`generate` calls an encoder, and looks at the parameters of its `forward`."""

    def __init__(self, forward):
        self.forward = forward

    def __call__(self, *arguments, **named):
        return self.forward(*arguments, **named)


class EncoderDecoder(PreTrainedModel, GenerationMixin):
    """What `generate` asks of a model that is not PyTorch's: a subclass encodes and decodes."""

    main_input_name = "input_ids"
    base_model_prefix = "model"
    _supports_sdpa = True  # not asked for; what the configuration names would be refused otherwise

    def __init__(self, config, generation):
        super().__init__(config)
        self.generation_config = generation

    @property
    def device(self):
        """Where the tensors are that `generate` makes."""
        return torch.device("cpu")

    @property
    def dtype(self):
        """Of the scores."""
        return torch.float32

    def can_generate(self) -> bool:
        """Asked by `generate`."""
        return True

    def get_encoder(self, *_, **__):
        """Asked by `generate`, which calls it once with all rows."""
        return _Callable(self.encode)


class OnnxEncoderDecoder(EncoderDecoder):
    """On two sessions; one object a call, since it keeps what the encoder has said.

    Args:
        encoder, decoder: sessions of the graphs that shared/export/graphs.py writes.
    """

    def __init__(self, config, generation, encoder, decoder):
        super().__init__(config, generation)
        self.encoder_session, self.decoder_session = encoder, decoder
        self.names = [each.name for each in decoder.get_inputs()]
        self.outputs = [each.name for each in decoder.get_outputs()]
        shape = next(each.shape for each in decoder.get_inputs() if each.name.startswith("past_"))
        self.heads, self.width = shape[1], shape[3]

    def encode(self, input_ids, attention_mask=None, **_):
        """The keys and values of each decoder layer's cross-attention, in the place of the encoder's states."""
        feed = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        states = self.encoder_session.run(None, feed)
        # `generate` repeats rows for beams along the first axis of last_hidden_state: it holds row numbers
        self.cross = dict(zip([each.name for each in self.encoder_session.get_outputs()], states, strict=True))
        self.crossed = None
        return BaseModelOutput(last_hidden_state=torch.arange(len(input_ids)).view(-1, 1, 1))

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        decoder_input_ids=None,
        encoder_outputs=None,
        cache=None,
        **_,
    ):
        """One token a row: (rows, 1) `decoder_input_ids` -> (rows, 1, vocabulary) logits, and the cache with this token."""
        own = cache.self_attention_cache
        tokens = decoder_input_ids[:, -1:].numpy()
        rows = encoder_outputs.last_hidden_state.flatten().numpy()
        if self.crossed is None:
            same = len(rows) == len(next(iter(self.cross.values())))
            self.crossed = self.cross if same else {name: values[rows] for name, values in self.cross.items()}
        feed = {"input_ids": tokens, "encoder_attention_mask": attention_mask.numpy(), **self.crossed}
        layers = sum(name.startswith("past_") for name in self.names) // 2
        for i in range(layers):
            filled = len(own.layers) > i and own.layers[i].is_initialized
            for part in ("key", "value"):
                empty = np.zeros((len(tokens), self.heads, 0, self.width), np.float32)
                feed[f"past_key_values.{i}.{part}"] = getattr(own.layers[i], f"{part}s").numpy() if filled else empty
        found = self.decoder_session.run(self.outputs, {name: feed[name] for name in self.names})
        found = {name: torch.from_numpy(values) for name, values in zip(self.outputs, found, strict=True)}
        for i in range(layers):
            key, value = found[f"present.{i}.key"], found[f"present.{i}.value"]
            if len(own.layers) > i and own.layers[i].is_initialized:
                own.layers[i].keys, own.layers[i].values = key, value
            else:
                own.update(key, value, i)
        return Seq2SeqLMOutput(logits=found["logits"], cache=cache)
