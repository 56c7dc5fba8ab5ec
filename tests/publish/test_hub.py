"""shared/publish/hub.py against a Hub of ours over HTTP: what may be pulled, what is pushed, every refusal in one line."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import task_runs
import torch
from checkout import ROOT
from safetensors.torch import save_file

from shared import UserError
from shared.publish import hub as our_hub

WEIGHTS = b"\x08\0\0\0\0\0\0\0{}      "  # an empty safetensors file


def cli(hub, *argv, role="write", **environment):
    """`python -m shared.publish.hub` as a user with that role would run it."""
    return subprocess.run(
        [sys.executable, "-m", "shared.publish.hub", *map(str, argv)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **hub.env_for(role), **environment},
    )


def message(process):
    """The one line of a refused command."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert process.stderr.startswith("error: ") and process.stderr.count("\n") == 1, process.stderr
    return process.stderr


@pytest.fixture
def run(tmp_path):
    """A finished run as a task leaves it, with all that must not be pushed."""
    folder = tmp_path / "my_run"
    (folder / "checkpoint-3").mkdir(parents=True)
    files = {
        "README.md": "---\nlicense: apache-2.0\nlibrary_name: peft\n---\n\n# my_run\n",
        "adapter_config.json": json.dumps({"base_model_name_or_path": str(tmp_path / "base"), "r": 8}),
        "all_results.json": "{}",
        "run.yaml": "method: lora\n",
        "checkpoint-3/optimizer.pt": "x",
        "checkpoint-3/model.safetensors": "x",
        "training_args.bin": "x",
        ".results": "x",
    }
    for name, text in files.items():
        (folder / name).write_text(text)
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "SOURCE.json").write_text('{"hub_id": "HuggingFaceTB/SmolLM2-135M-Instruct"}')
    return folder


PUSHED = {"README.md", "adapter_config.json", "adapter_model.safetensors", "all_results.json", "run.yaml"}


def test_a_run_is_one_commit_and_pushing_twice_changes_nothing(hub, run):
    name = "alice/once"
    first = cli(hub, "push", run, "--repo_id", name, "--private")
    assert first.returncode == 0, first.stderr
    assert hub.repo(name).private and len(hub.commits(name)) == 2, "the Hub's first commit, and ours"
    assert set(hub.files(name)) - {".gitattributes"} == PUSHED
    again = cli(hub, "push", run, "--repo_id", name)
    assert again.returncode == 0 and len(hub.commits(name)) == 2
    (run / "all_results.json").write_text('{"test_loss": 1.0}')
    assert cli(hub, "push", run, "--repo_id", name).returncode == 0
    assert len(hub.commits(name)) == 3 and hub.files(name)["all_results.json"] == b'{"test_loss": 1.0}'


def test_a_model_takes_the_place_of_the_adapter_that_was_there(hub, run, tmp_path):
    """Whoever loads a repository that holds both gets the adapter."""
    assert cli(hub, "push", run, "--repo_id", "alice/both").returncode == 0
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (run / name).unlink()
    (run / "model.safetensors").write_bytes(WEIGHTS)
    assert cli(hub, "push", run, "--repo_id", "alice/both").returncode == 0
    assert len(hub.commits("alice/both")) == 3
    found = set(hub.files("alice/both")) - {".gitattributes"}
    assert found == {"README.md", "model.safetensors", "all_results.json", "run.yaml"}


def test_the_pushed_adapter_names_its_base_on_the_hub_and_the_local_one_stays(hub, run):
    assert cli(hub, "push", run, "--repo_id", "adapter", "--revision", "trial").returncode == 0
    pushed = json.loads(hub.files("alice/adapter", "trial")["adapter_config.json"])
    assert pushed == {"base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct", "r": 8}
    assert json.loads((run / "adapter_config.json").read_text())["base_model_name_or_path"].startswith("/")
    assert str(run.parent).encode() not in b"".join(hub.files("alice/adapter", "trial").values())


def test_an_adapter_of_a_hub_model_names_it_with_its_revision_and_not_the_cache(tmp_path, run, caplog, monkeypatch):
    sha = "0" * 40
    base = f"/home/me/.cache/hub/models--tiiuae--falcon-7b/snapshots/{sha}"
    (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    pushed = json.loads(our_hub.pushed_files(run)[run / "adapter_config.json"])
    assert pushed == {"base_model_name_or_path": "tiiuae/falcon-7b", "revision": sha}
    (tmp_path / "mine" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for base in (str(tmp_path / "mine" / "gpt2"), "mine/gpt2"):
        (run / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        pushed = json.loads(our_hub.portable_adapter(run / "adapter_config.json"))
        assert pushed == {"base_model_name_or_path": "./gpt2"}, "gpt2 and mine/gpt2 are others' models on the Hub"
    assert "base lies on this machine alone" in caplog.text


@pytest.mark.parametrize(
    ("role", "repo_id", "words"),
    [
        (None, "alice/no", "does not accept the token"),
        ("wrong", "alice/no", "does not accept the token"),
        ("read", "alice/no", "may not write"),
        ("other", "acme/no", "may not write"),
    ],
)
def test_a_push_that_is_refused_says_why_and_how_to_push_again(hub, run, role, repo_id, words):
    refused = message(cli(hub, "push", run, "--repo_id", repo_id, role=role))
    assert words in refused and f"python -m shared.publish.hub push {run} --repo_id {repo_id}" in refused
    assert "hf_" not in refused and repo_id not in hub.repos
    assert (run / "adapter_model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize(
    "fault",
    [
        {"pattern": "PUT .*", "status": 403},
        {"pattern": "POST .*/commit/", "status": 412},
        {"pattern": "POST .*/commit/", "drop_after": 10},
        {"pattern": "POST .*/commit/", "status": 409},
    ],
)
def test_a_push_that_breaks_off_leaves_the_old_state_and_can_be_repeated(hub, run, fault):
    name = f"alice/broken-{abs(hash(str(fault)))}"
    with hub.fault(**fault, times=100):
        refused = message(cli(hub, "push", run, "--repo_id", name))
    assert "Nothing is lost" in refused and len(hub.commits(name)) == 1
    assert cli(hub, "push", run, "--repo_id", name).returncode == 0 and len(hub.commits(name)) == 2


def test_a_file_with_a_token_is_not_pushed(hub, run):
    (run / "samples.jsonl").write_text('{"prompt": "my token is hf_abcdefghijklmnopqrstuvwxyz"}')
    refused = message(cli(hub, "push", run, "--repo_id", "alice/leak"))
    assert "samples.jsonl" in refused and "abcdefgh" not in refused and "alice/leak" not in hub.repos


@pytest.mark.parametrize("name", ["train.log", "nohup.out", "notes", "old/run.sh", "tried.ipynb"])
def test_a_token_in_a_file_of_ones_own_is_not_pushed(run, name):
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text("HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz")
    with pytest.raises(UserError, match=f"{name} holds what looks like a Hub token"):
        our_hub.pushed_files(run)


def test_pickles_by_any_name_are_not_pushed(run):
    for name in ("a.pickle", "b.ckpt", "c.joblib", "d.pkl"):
        (run / name).write_bytes(b"x")
    assert {path.name for path in our_hub.pushed_files(run)} == PUSHED


def test_a_private_push_does_not_go_to_a_repository_that_all_can_see(hub, run, tiny, data, tmp_path):
    name = "alice/seen"
    assert cli(hub, "push", run, "--repo_id", name).returncode == 0
    (run / "all_results.json").write_text('{"test_loss": 1.0}')
    refused = message(cli(hub, "push", run, "--repo_id", name, "--private"))
    assert f"{name} is a public repository, and a private one is wanted" in refused and len(hub.commits(name)) == 2
    flags = chat_flags(tiny, data, tmp_path / "run", name, "--hub_private_repo=true")
    assert "a private one is wanted" in message(task_runs.command(CHAT, *flags, **hub.env_for("write")))
    assert not (tmp_path / "run").exists()


def test_a_model_does_not_get_the_template_of_the_one_that_was_there(hub, run):
    """Nor its added tokens: whoever loads the repository would take them."""
    for name in ("chat_template.jinja", "added_tokens.json", "notes.txt"):
        (run / name).write_text("{}")
    assert cli(hub, "push", run, "--repo_id", "alice/template").returncode == 0
    for name in ("chat_template.jinja", "added_tokens.json", "notes.txt"):
        (run / name).unlink()
    assert cli(hub, "push", run, "--repo_id", "alice/template").returncode == 0
    assert set(hub.files("alice/template")) - {".gitattributes"} == PUSHED | {"notes.txt"}


def test_what_is_pushed_is_pulled_byte_for_byte(hub, run, tmp_path):
    """Of an encoder also how its vectors are made of its tokens; of an export the file of each format."""
    (run / "adapter_config.json").unlink()
    (run / "1_Pooling").mkdir()
    (run / "1_Pooling" / "config.json").write_text('{"pooling_mode": "cls"}')
    (run / "sub").mkdir()
    (run / "sub" / "config.json").write_text("{}")
    assert cli(hub, "push", run, "--repo_id", "alice/encoder").returncode == 0
    pulled = cli(hub, "pull", "alice/encoder", **hub.env_for("read", home=tmp_path / "home"))
    assert (Path(pulled.stdout.strip()) / "1_Pooling" / "config.json").read_text() == '{"pooling_mode": "cls"}'
    assert not (Path(pulled.stdout.strip()) / "sub").exists()
    (run / "export.json").write_text("{}")
    for name in (
        "litert/model.tflite",
        "gguf/model.gguf",
        "onnx/model.onnx",
        "onnx/model.onnx.data",
        "merged/model.safetensors",
    ):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(WEIGHTS)
    assert cli(hub, "push", run, "--repo_id", "alice/formats").returncode == 0
    pulled = cli(hub, "pull", "alice/formats", **hub.env_for("read", home=tmp_path / "home"))
    there = Path(pulled.stdout.strip())
    for path in run.glob("*/model*"):
        if "checkpoint" not in path.parent.name:
            assert (there / path.relative_to(run)).read_bytes() == path.read_bytes()


def test_what_is_no_run_is_not_pushed(hub, tmp_path):
    assert "expected a finished run" in message(cli(hub, "push", tmp_path))


def test_a_model_is_pulled_by_name_and_revision_and_then_works_offline(hub, tmp_path):
    home = hub.env_for("write", home=tmp_path / "home")
    revision = hub.commits("openai-community/gpt2")[0].sha
    for name in ("openai-community/gpt2", f"openai-community/gpt2@{revision}"):
        pulled = cli(hub, "pull", name, **home)
        assert pulled.returncode == 0, pulled.stderr
        files = {p.name for p in (tmp_path / "home").rglob("snapshots/*/*")}
        assert {"model.safetensors", "config.json", "tokenizer.json", "README.md"} <= files
        assert not any(f.endswith((".bin", ".py")) for f in files), "neither pickles nor code are downloaded"
    nowhere = home | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    again = cli(hub, "pull", "openai-community/gpt2", **nowhere)
    assert again.returncode == 0 and again.stdout == pulled.stdout
    refused = message(cli(hub, "pull", "google-bert/bert-base-uncased", **nowhere))
    assert "cannot be reached" in refused and "python -m shared.data.assets" in refused


def test_code_beside_a_known_architecture_is_neither_downloaded_nor_run(hub, tmp_path):
    pulled = cli(hub, "pull", "tiiuae/falcon-7b", **hub.env_for("write", home=tmp_path))
    assert pulled.returncode == 0, pulled.stderr
    assert not list(tmp_path.rglob("*.py"))
    load = "import sys; from transformers import AutoModelForCausalLM as M; M.from_pretrained(sys.argv[1])"
    loaded = subprocess.run([sys.executable, "-c", load, pulled.stdout.strip()], capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr


@pytest.mark.parametrize(
    ("name", "role", "words"),
    [
        ("nobody/nothing", "write", "no such model"),
        ("openai-community/gpt2@nowhere", "write", "no revision 'nowhere'"),
        ("meta-llama/Llama-2-7b-hf", "other", "is gated: accept its terms"),
        ("./nothing", "write", "no such folder. A Hub model is written org/name"),
        ("outputs/nothing", "write", "outputs/nothing: no such folder."),
        (
            "https://hub.example/openai-community/gpt2",
            "write",
            "no such folder. Write its name, openai-community/gpt2.",
        ),
        (__file__, "write", "is a file. A model is a folder"),
        ("pypi:chitchat", "write", "is a data set"),
        ("pypi:nothing", "write", "unknown"),
    ],
)
def test_a_model_that_cannot_be_had_says_why(hub, tmp_path, name, role, words):
    # A cache of its own: in that of other tests lies what somebody else was given
    assert words in message(cli(hub, "pull", name, **hub.env_for(role, home=tmp_path / "home")))


def test_a_repository_of_pickles_is_refused_before_they_are_downloaded(hub, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "gpt2"}')
    hub.create("alice/pickles")
    hub.upload("alice/pickles", tmp_path / "model")
    refused = message(cli(hub, "pull", "alice/pickles", **hub.env_for("write", home=tmp_path / "home")))
    assert "pytorch_model.bin, a pickle" in refused
    assert not list((tmp_path / "home").rglob("*.bin"))
    with pytest.raises(UserError, match="a pickle"):
        our_hub.pull(str(tmp_path / "model"))


def test_weights_that_were_copied_in_part_are_one_line(tmp_path):
    """What `git clone` leaves without Git LFS; a download that broke off; a part that was forgotten."""
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    weights = tmp_path / "model-1.safetensors"
    save_file({"a": torch.zeros(100)}, weights)
    whole = weights.read_bytes()
    our_hub.pull(str(tmp_path))
    for content, words in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 400\n", "a pointer of Git LFS.*git lfs pull"),
        (whole[:-10], "model-1.safetensors cannot be read .*Copy or download it again"),
    ):
        weights.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            our_hub.pull(str(tmp_path))
        assert "\n" not in str(caught.value)
    weights.write_bytes(whole)
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="model-2.safetensors, a part of the weights, is missing"):
        our_hub.pull(str(tmp_path))


@pytest.mark.parametrize("part", ["../elsewhere.safetensors", "/tmp/a.safetensors", "sub/a.safetensors", "..", 7])
def test_a_weight_map_that_leaves_the_folder_is_refused(tmp_path, part):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    index = {"weight_map": {"a": "model-1.safetensors", "b": part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="outside the model's folder"):
        our_hub.pull(str(tmp_path))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "mine", "auto_map": {"AutoModel": "m.M"}}, "needs code of its own"),
        ({"auto_map": {"AutoModel": "m.M"}}, "needs code of its own"),
        ({"hidden_size": 8}, "config.json names no `model_type`"),
        ({"model_type": "gpt2", "_attn_implementation": "someone/kernel"}, "attention kernel"),
        ({"model_type": "gpt2", "text_config": {"attn_implementation": "a/b@main:f"}}, "attention kernel"),
    ],
)
def test_a_configuration_that_needs_code_or_names_nothing_is_refused(tmp_path, config, words):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=words):
        our_hub.pull(str(tmp_path))


def test_custom_generate_of_a_model_folder_does_not_run(tmp_path, tiny):
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny / "gpt2", tmp_path / "model")
    (tmp_path / "model" / "custom_generate").mkdir()
    (tmp_path / "model" / "custom_generate" / "generate.py").write_text("raise RuntimeError('was run')\n")
    model = AutoModelForCausalLM.from_pretrained(our_hub.pull(str(tmp_path / "model")))
    assert model.generate(max_new_tokens=2, bos_token_id=0).shape == (1, 3)


def test_the_licence_is_the_base_models_and_never_a_guess(tmp_path):
    assert our_hub.licence("pypi:smollm2-135m-instruct") == "apache-2.0"
    assert our_hub.licence(str(tmp_path)) is None and our_hub.licence(None) is None
    (tmp_path / "README.md").write_text("---\nlicense: llama2\n---\n")
    assert our_hub.licence(str(tmp_path)) == "llama2"
    (tmp_path / "README.md").write_text("# no metadata\n")
    assert our_hub.licence(str(tmp_path)) is None
    assert our_hub.licence("nobody/never-pulled") is None


def chat_flags(tiny, data, output, repository, *more):
    flags = {"model_name_or_path": tiny / "llama", "dataset": data, "output_dir": output, "max_steps": 1}
    return [
        *(f"--{name}={value}" for name, value in flags.items()),
        f"--hub_model_id={repository}",
        "--push_to_hub",
        *more,
    ]


CHAT = ROOT / "tasks" / "chat_sft" / "train.py"


@pytest.mark.parametrize(
    ("role", "words"), [(None, "no token"), ("wrong", "does not accept"), ("read", "may not write")]
)
def test_a_run_that_could_not_be_pushed_does_not_start(hub, tiny, data, tmp_path, role, words):
    refused = task_runs.command(CHAT, *chat_flags(tiny, data, tmp_path / "run", "alice/refused"), **hub.env_for(role))
    assert words in message(refused) and not (tmp_path / "run").exists() and "alice/refused" not in hub.repos


def test_a_run_is_pushed_at_its_end_and_its_token_is_written_nowhere(hub, tiny, data, tmp_path):
    flags = chat_flags(
        tiny, data, tmp_path / "run", "alice/pushed", f"--hub_token={hub.tokens['write']}", "--hub_private_repo=true"
    )
    ran = task_runs.command(CHAT, *flags, **hub.env_for(None, home=tmp_path / "home"))
    assert ran.returncode == 0, ran.stderr
    assert hub.repo("alice/pushed").private and len(hub.commits("alice/pushed")) == 2
    pushed = hub.files("alice/pushed")
    expected = {
        "README.md",
        "adapter_model.safetensors",
        "all_results.json",
        "samples.jsonl",
        "run.yaml",
        "tokenizer.json",
    }
    assert expected <= set(pushed) and not [name for name in pushed if "checkpoint" in name or name.endswith(".bin")]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    everything = b"".join([*written, *pushed.values(), ran.stdout.encode(), ran.stderr.encode()])
    assert hub.tokens["write"].encode() not in everything
    assert str(tmp_path).encode() not in b"".join(pushed.values())


def test_an_old_torchao_is_named_before_an_adapter_is_made_or_loaded(run, tmp_path, monkeypatch):
    """As on Colab, whose image carries 0.10: peft raises an ImportError in the middle of `get_peft_model`."""
    import methods
    from peft.import_utils import is_torchao_available
    from trl import SFTConfig

    (tmp_path / "site" / "torchao-0.10.0.dist-info").mkdir(parents=True)
    (tmp_path / "site" / "torchao-0.10.0.dist-info" / "METADATA").write_text("Name: torchao\nVersion: 0.10.0\n")
    (tmp_path / "site" / "torchao").mkdir()
    (tmp_path / "site" / "torchao" / "__init__.py").write_text("")
    assert our_hub.pull(str(run)) == run
    is_torchao_available.cache_clear()
    monkeypatch.syspath_prepend(tmp_path / "site")
    said = r"beside this torchao \(.*0\.10\.0.*\)\. Nothing here needs it: `pip uninstall torchao`"
    try:
        with pytest.raises(UserError, match=said):
            our_hub.pull(str(run))
        with pytest.raises(UserError, match=said):
            methods.check_method(SimpleNamespace(method="lora", load_in_4bit=False, save_merged=False), None, {})
        full = SimpleNamespace(method="full", load_in_4bit=False, save_merged=False)
        methods.check_method(full, SFTConfig(output_dir=str(tmp_path), bf16=False), {})
    finally:
        is_torchao_available.cache_clear()
