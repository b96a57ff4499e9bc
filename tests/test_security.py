"""What SECURITY.md claims."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import pickle
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jinja2
import numpy as np
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from safetensors.numpy import load_file, save_file
from transformers import Trainer

import fastalign
from fastalign.cli import main
from fastalign.cli.flags import UsageError, load_yaml
from fastalign.data.formats import template_kwargs_of
from fastalign.data.report import RowError
from fastalign.demo import report
from fastalign.demo.report_template import TEMPLATE
from fastalign.reference import ReferenceCache
from fastalign.reference.files import read_json, write_json
from fastalign.reference.shards import _index_sha256, write_shard
from fastalign.reference.store import Store, create_store, write_manifest
from fastalign.trainers import DPOConfig, PPOConfig, PROConfig, RewardConfig, SFTConfig, checkpoint_files
from fastalign.trainers.checkpoint_files import CheckpointError
from fastalign.trainers.sharding import check_fsdp

PACKAGE = Path(fastalign.__file__).parent
CONFIGS = [DPOConfig, PPOConfig, PROConfig, RewardConfig, SFTConfig]
DIGEST = "a" * 64
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
FORBIDDEN_CALLS = {"eval", "exec", "np.load", "numpy.load", "yaml.unsafe_load", "yaml.full_load"}
FORBIDDEN_CALLS |= {"os.system", "os.popen", "pd.read_pickle", "torch.distributed.checkpoint.load", "dcp.load"}


def trees():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path.relative_to(PACKAGE), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def test_nothing_in_the_package_loads_pickles_or_runs_text():
    for path, tree in trees():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & FORBIDDEN_MODULES, path
        for call in calls(tree):
            assert ast.unparse(call.func) not in FORBIDDEN_CALLS, f"{path}:{call.lineno}"
            keywords = {k.arg: ast.unparse(k.value) for k in call.keywords}
            default = None if ast.unparse(call.func) == "torch.load" else "True"  # said, whatever torch's default is
            assert keywords.get("weights_only", default) == "True", f"{path}:{call.lineno}"
            assert keywords.get("allow_pickle", "False") == "False", f"{path}:{call.lineno}"
            assert keywords.get("shell", "False") == "False", f"{path}:{call.lineno}"


def test_remote_code_is_off_and_only_a_setting_turns_it_on():
    for config in CONFIGS:
        (field,) = [f for f in dataclasses.fields(config) if f.name == "trust_remote_code"]
        assert field.default is False
    for path, tree in trees():
        for call in calls(tree):
            for keyword in call.keywords:
                if keyword.arg == "trust_remote_code":
                    assert ast.unparse(keyword.value) != "True", f"{path}:{call.lineno}"


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_bomb_works_where_pickles_are_loaded(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "went off")))
    assert (tmp_path / "went off").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_what_transformers_resumes_from_is_not_unpickled(tmp_path, name):
    model = torch.nn.Linear(2, 2)
    trainer = object.__new__(Trainer)
    trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = trainer.is_fsdp_xla_v1_enabled = False
    trainer.optimizer = torch.optim.SGD(model.parameters())
    trainer.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer)
    torch.save(trainer.optimizer.state_dict(), tmp_path / "optimizer.pt")
    torch.save(trainer.lr_scheduler.state_dict(), tmp_path / "scheduler.pt")
    torch.save(Bomb(tmp_path / "went off"), tmp_path / name)
    trainer.args = DPOConfig(output_dir=str(tmp_path / "out"), use_cpu=True, report_to="none")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        trainer._load_optimizer_and_scheduler(str(tmp_path))
    assert not (tmp_path / "went off").exists()


def test_every_load_of_a_trainer_is_of_weights_only():
    """Random state, optimizer, scheduler, scaler, model: also those that a change of transformers adds."""
    tree = ast.parse(Path(inspect.getfile(Trainer)).read_text(encoding="utf-8"))
    loads = [call for call in calls(tree) if ast.unparse(call.func) == "torch.load"]
    assert loads
    for call in loads:
        assert {k.arg: ast.unparse(k.value) for k in call.keywords}.get("weights_only") == "True"


SHARDED_READERS = {"load", "load_state_dict", "FileSystemReader", "StorageReader", "HuggingFaceStorageReader"}


def test_no_reader_of_sharded_checkpoints_is_imported():
    """torch.distributed.checkpoint unpickles the .metadata of what it loads; writing, and state_dict, do not."""
    for path, tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch.distributed.checkpoint"):
                assert not {alias.name for alias in node.names} & SHARDED_READERS, path
            if isinstance(node, ast.Attribute) and "checkpoint" in ast.unparse(node.value):
                assert node.attr not in SHARDED_READERS, f"{path}:{node.lineno}"


def test_sharded_metadata_which_is_a_pickle_is_never_asked_for(tmp_path):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    args = DPOConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="state_dict_type"):
        check_fsdp(plugin, args)


# ---- names in files


@pytest.fixture
def cache(tmp_path) -> Path:
    create_store(tmp_path / "cache")
    return tmp_path / "cache"


def shard(path: Path):
    return write_shard(path, DIGEST, [b"k" * 16], [np.array([-1.0], np.float32)])


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "/outside.safetensors", "a/../../outside.safetensors", "..\\x.safetensors"]
)
@pytest.mark.parametrize("where", ["shards", "retired"])
def test_a_manifest_that_names_another_folder_is_damaged(cache, name, where):
    record = shard(cache.parent / "outside.safetensors")
    write_manifest(
        cache, "w", [dataclasses.replace(record, file=name)] if where == "shards" else [],
        {name: "damaged"} if where == "retired" else {},
    )  # fmt: skip
    store = Store(cache)
    assert not store.shards
    assert [problem.file for problem in store.problems] == ["manifests/w.json"]


@pytest.mark.parametrize("reference", ["../../secret", "/etc/secret", "..", "a/b"])
def test_a_reference_that_is_a_path_is_damage(cache, reference):
    """references/<digest>.json is read by that name."""
    path = cache / "shards" / "w-0.safetensors"
    record = shard(path)
    tensors = load_file(path)
    metadata = {"format": "fastalign-reference-shard", "version": "1", "reference": reference, "logps_sha256": "x"}
    save_file(tensors, path, metadata | {"index_sha256": _index_sha256(metadata, tensors)})
    assert [problem.kind for problem in Store(cache).problems] == ["damaged"]
    write_manifest(cache, "w", [dataclasses.replace(record, reference=reference)], {})
    assert "manifests/w.json" in [problem.file for problem in Store(cache).problems]
    with pytest.raises(ValueError, match="holds 0 references"):
        ReferenceCache.open(cache)


def test_a_shard_that_leaves_its_checksum_out_is_damage(cache):
    """Made by hand: the checksum of its index is right, and there is none of its log-probs."""
    path = cache / "shards" / "w-0.safetensors"
    shard(path)
    tensors = load_file(path)
    metadata = {"format": "fastalign-reference-shard", "version": "1", "reference": DIGEST}
    save_file(tensors, path, metadata | {"index_sha256": _index_sha256(metadata, tensors)})
    assert [(problem.kind, problem.what) for problem in Store(cache).problems] == [
        ("damaged", "the checksum of its log-probs does not fit")
    ]


def test_a_sound_cache_is_none_of_that(cache):
    write_manifest(cache, "w", [shard(cache / "shards" / "w-0.safetensors")], {})
    assert not Store(cache).problems


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname"])
def test_a_checkpoint_that_names_another_folder_is_damaged(tmp_path, name):
    folder = tmp_path / "checkpoint-1"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"x")
    checkpoint_files.seal(folder)
    checkpoint_files.check(folder)
    content = read_json(folder / checkpoint_files.MANIFEST)
    content["files"][name] = content["files"]["model.safetensors"]
    write_json(folder / checkpoint_files.MANIFEST, content)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint_files.check(folder)


# ---- text from elsewhere


def test_yaml_makes_no_objects(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(f"beta: !!python/object/apply:pathlib.Path.touch [{tmp_path / 'made'}]\n", encoding="utf-8")
    with pytest.raises(UsageError, match="not valid YAML"):
        load_yaml(path)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["chat_template", "tokenize", "conversation", "tokenizer_kwargs"])
def test_a_row_does_not_choose_the_program(name):
    row = json.loads(json.dumps({"chat_template_kwargs": {name: "{{ 1 }}", "enable_thinking": True}}))
    with pytest.raises(RowError, match=f"may not set {name}"):
        template_kwargs_of(row)
    del row["chat_template_kwargs"][name]
    assert template_kwargs_of(row) == {"enable_thinking": True}


def test_what_a_model_writes_is_escaped(monkeypatch):
    """Wherever the template puts a value, the value is text: `|safe` and Markup are for the figure alone."""
    assert "|safe" not in TEMPLATE.replace(" ", "")
    assert "autoescape false" not in TEMPLATE
    source = ast.parse(inspect.getsource(report))
    marked = [call for call in calls(source) if ast.unparse(call.func) == "Markup"]
    assert [ast.unparse(call.args[0]) for call in marked] == ["svg"]
    (made,) = [call for call in calls(source) if ast.unparse(call.func) == "jinja2.Environment"]
    settings = {k.arg: ast.literal_eval(k.value) for k in made.keywords if k.arg == "autoescape"}
    answers = TEMPLATE[TEMPLATE.index("{% for example in examples %}") : TEMPLATE.index("<h2>Next</h2>")]
    evil = "<script>alert(1)</script>"
    example = report.Example(evil, [evil], [(evil, [(evil, '"><img src=x>')], 0.5, 3)])
    html = jinja2.Environment(**settings).from_string(answers).render(examples=[example])
    assert "<script" not in html
    assert "<img" not in html
    assert html.count("&lt;script&gt;") == 4


def test_what_an_error_quotes_cannot_steer_the_terminal(tmp_path, capsys):
    """A key of a file or a column of data may hold escape sequences, which would retitle, recolour or erase."""
    path = tmp_path / "run.yaml"
    path.write_text('"\\e]0;title\\abeta\\e[2J": 1\n', encoding="utf-8")
    assert main(["dpo", "--config", str(path), "--\x1b[31mred", "1"]) == 2
    err = capsys.readouterr().err
    assert "title" in err
    assert all(character.isprintable() or character == "\n" for character in err)


# ---- dependencies


@pytest.mark.parametrize(
    ("packages", "status", "says"),
    [
        ([{"name": "a", "version": "1", "vulns": []}], 0, "1 of 1 packages looked up, 0 with advisories"),
        (
            [{"name": "a", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}], 1,
            "a 1: CVE-1, fixed in 2",
        ),
        ([{"name": "a", "skip_reason": "x"}, {"name": "b", "version": "1", "vulns": []}], 2, "does not know a;"),
        ([{"name": f"p{n}", "skip_reason": "not found"} for n in range(9)], 2, "p4 and 4 more; they were not audited"),
        ([], 2, "does not know anything"),
    ],
)  # fmt: skip
def test_an_audit_that_looked_nothing_up_is_no_success(repository, tmp_path, packages, status, says):
    """pip-audit says "No known vulnerabilities found" where it could look none of the packages up."""
    report_file = tmp_path / "report.json"
    report_file.write_text(json.dumps({"dependencies": packages}))
    command = [sys.executable, str(repository / ".ci/audited.py"), str(report_file)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == status
    assert says in run.stdout + run.stderr


def test_every_dependency_is_bounded(repository):
    """From below by what was tested, from above by the next major version (of 0.x: by 1)."""
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for requirement in project["dependencies"]:
        assert re.fullmatch(r"[a-z0-9]+>=[\d.]+,<\d+", requirement), requirement
    optional = [item for group in project["optional-dependencies"].values() for item in group]
    tools = ("ruff", "mypy", "types-PyYAML")  # constraints.txt has the versions that are used
    assert all(">=" in item for item in optional if item not in tools)
