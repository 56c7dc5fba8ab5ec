"""shared/retrieval/encoder.py next to sentence-transformers: folders that it has saved give the vectors that it gives."""

import json
import shutil

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules

from shared import UserError
from shared.retrieval.encoder import Encoder

TEXTS = ["the old mill", "a sack of flour costs nine crowns at the mill", "red"]
PROMPTS = {"query": "query: ", "document": "passage: "}


def saved(tiny_bert, folder, pooling, prompts=None, more=()):
    """A folder of sentence-transformers, and the model."""
    words = modules.Transformer(str(tiny_bert))
    parts = [words, modules.Pooling(words.get_embedding_dimension(), pooling_mode=pooling), *more, modules.Normalize()]
    model = SentenceTransformer(modules=parts, prompts=prompts, device="cpu")
    model.save(str(folder))
    return model


@pytest.mark.parametrize("form", ["new", "before version 6"])
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_vectors_are_those_of_sentence_transformers(tiny_bert, tmp_path, pooling, form):
    model = saved(tiny_bert, tmp_path, pooling, PROMPTS)
    if form != "new":
        old = {"word_embedding_dimension": 32, "pooling_mode_cls_token": pooling == "cls"}
        old |= {"pooling_mode_mean_tokens": pooling == "mean", "pooling_mode_max_tokens": False}
        (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(old))
    encoder = Encoder(tmp_path)
    for kind, expected in (("question", model.encode_query(TEXTS)), ("passage", model.encode_document(TEXTS))):
        np.testing.assert_allclose(encoder.encode(TEXTS, kind), expected, atol=1e-5)


def test_vectors_that_are_made_in_another_way_are_refused(tiny_bert, tmp_path):
    saved(tiny_bert, tmp_path / "max", "max")
    with pytest.raises(
        UserError, match=r"made of the tokens by max; here they are the mean of the tokens or the first"
    ):
        Encoder(tmp_path / "max")
    saved(tiny_bert, tmp_path / "both", ["cls", "mean"])
    with pytest.raises(UserError, match="made of the tokens by cls, mean;"):
        Encoder(tmp_path / "both")
    saved(tiny_bert, tmp_path / "dense", "mean", more=[modules.Dense(32, 16)])
    with pytest.raises(UserError, match="come through a layer Dense"):
        Encoder(tmp_path / "dense")
    shutil.copytree(tiny_bert, tmp_path / "plain")
    assert Encoder(tmp_path / "plain").settings["pooling"] == "mean"
