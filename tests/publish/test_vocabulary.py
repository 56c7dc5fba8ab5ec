"""shared/publish/vocabulary.py: a tokenizer that is missing, and an adapter, are one line before anything is learnt."""

import ast
import json
import shutil

import pytest
from checkout import ROOT
from transformers import AutoTokenizer, BertConfig, ByT5Tokenizer, T5Config

from shared import UserError
from shared.inference.model import Model
from shared.inference.positions import check_length
from shared.publish.vocabulary import check_vocabulary, load_tokenizer
from shared.retrieval.encoder import Encoder

NO_TOKENIZER = r"no tokenizer beside the model. Save there .* `tokenizer.save_pretrained\(folder\)`"


def without_tokenizer(source, folder):
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(source / name, folder)
    return folder


def test_the_tokenizer_is_that_of_the_folder(tiny, tiny_bert):
    for folder in (tiny_bert, tiny / "llama", tiny / "gpt2"):
        assert load_tokenizer(folder).get_vocab() == AutoTokenizer.from_pretrained(folder).get_vocab()
    assert load_tokenizer(tiny_bert, model_input_names=["input_ids"]).model_input_names == ["input_ids"]


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_a_folder_without_a_tokenizer_is_refused(kind, tiny, tiny_bert, tmp_path):
    """transformers makes an empty one for BERT and GPT-2, and has no word of sense for Llama."""
    folder = without_tokenizer(tiny_bert if kind == "bert" else tiny / kind, tmp_path / kind)
    with pytest.raises(UserError, match=NO_TOKENIZER):
        load_tokenizer(folder)
    with pytest.raises(UserError, match=NO_TOKENIZER):
        Model(folder, "torch", "feature-extraction")
    if kind == "bert":
        with pytest.raises(UserError, match=NO_TOKENIZER):
            Encoder(folder)


def test_a_tokenizer_of_special_tokens_alone_is_refused(tiny_bert, tmp_path):
    """As `save_pretrained` leaves the empty one of transformers: there are files then. T5's has one token more."""
    folder = without_tokenizer(tiny_bert, tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(UserError, match=NO_TOKENIZER):
        load_tokenizer(folder)
    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match=NO_TOKENIZER):
        load_tokenizer(tmp_path / "t5")


def test_bytes_need_no_vocabulary(tmp_path):
    T5Config(vocab_size=384).save_pretrained(tmp_path)
    ByT5Tokenizer().save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path)("ab").input_ids == [100, 101, 1]


def test_a_damaged_tokenizer_is_one_line(tiny_bert, tmp_path):
    shutil.copytree(tiny_bert, tmp_path / "bert")
    (tmp_path / "bert" / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="its tokenizer cannot be read") as caught:
        load_tokenizer(tmp_path / "bert")
    assert "\n" not in str(caught.value)


def test_an_adapter_is_no_whole_model(tiny, tmp_path):
    AutoTokenizer.from_pretrained(tiny / "llama").save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "base", "peft_type": "LORA"}))
    with pytest.raises(UserError, match=r"is an adapter, .*python -m shared.export .* --to merged"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path, adapter=True).chat_template


def test_more_tokens_than_embeddings_are_one_line(tiny_bert):
    """Encoders by check_length; a model with more embeddings than tokens is fine."""
    tokenizer, config = load_tokenizer(tiny_bert), BertConfig.from_pretrained(tiny_bert)
    check_length(64, tiny_bert, tokenizer)
    config.vocab_size += 64
    check_vocabulary(config, tokenizer, tiny_bert)
    tokenizer.add_tokens(["<new>"])
    with pytest.raises(UserError, match="its tokenizer has 30,523 tokens, the model 30,522 embeddings"):
        check_length(64, tiny_bert, tokenizer)
    check_vocabulary(BertConfig.from_pretrained(tiny_bert), tokenizer, tiny_bert, needs=30522)


def test_tasks_load_no_tokenizer_past_it():
    loaded = "AutoTokenizer.from_pretrained"
    for path in [*ROOT.glob("tasks/*/*.py"), *ROOT.glob("shared/inference/*.py"), *ROOT.glob("shared/retrieval/*.py")]:
        calls = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.Call)]
        assert loaded not in {ast.unparse(call.func) for call in calls}, path
