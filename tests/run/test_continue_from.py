"""`lora.init_from`: a run that begins with an adapter of ours or of PEFT's, and refuses what it cannot begin with."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.errors import ConfigError
from qlora_trainer.run import continue_from
from qlora_trainer.run.continue_from import filled_in, initial_folder
from qlora_trainer.run.records import Preparing
from tests.run.peft_runs import begun_with, peft_folder, peft_logits, refusal
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config

pytestmark = pytest.mark.usefixtures("plans_made_once")


# What PEFT makes, and we must take from its folder: each changes the result.
FIELDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 2}, "use_rslora": True},
    "dora": {"use_dora": True},
    "layers": {"layers_to_transform": 0},  # a number, which is false
}


@pytest.mark.parametrize("variant", FIELDS)
def test_a_run_begins_with_what_peft_has_trained(variant: str, tmp_path: Path, base: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", base, **FIELDS[variant])
    config = begun_with(tmp_path, base, folder, "lora.dtype=float32", "training.max_steps=1")
    records = run_to_end(config)
    assert any(isinstance(one, Preparing) and f"beginning with the adapter {folder}" in one.what for one in records)
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run" / "adapter", folder))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    found, expected = (peft_logits(base, path) for path in (tmp_path / "run" / "adapter", folder))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("excluded", [["layers.0.self_attn.q_proj"], ["v_proj"], r".*layers\.1\..*"], ids=str)
@pytest.mark.parametrize("beside", [{}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_what_peft_was_to_leave_out_stays_out(
    beside: dict[str, Any], excluded: str | list[str], tmp_path: Path, bases: dict[bool, Path]
) -> None:
    """The config has no such key: the linears that were left are named."""
    base = bases[False]
    folder = peft_folder(
        tmp_path / "theirs", base, target_modules=["q_proj", "v_proj"], exclude_modules=excluded, **beside
    )
    assert run_to_end(begun_with(tmp_path, base, folder, "lora.dtype=float32", "training.max_steps=1"))
    ours, theirs = (load_file(path / "adapter_model.safetensors") for path in (tmp_path / "run" / "adapter", folder))
    assert {name for name in ours if ".lora_" in name} == {name for name in theirs if ".lora_" in name}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_names_of_other_bases_among_the_targets_are_passed_over(tmp_path: Path, base: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", base, "W_pack")
    assert run_to_end(begun_with(tmp_path, base, folder, "training.max_steps=1"))


def test_a_run_goes_on_from_a_run_and_a_resume_of_it_is_the_same(tmp_path: Path, base: Path) -> None:
    run_to_end(tiny_config(tmp_path, base, "lora.use_rslora=true", f"output.dir={tmp_path / 'first'}"))
    options = (f"lora.init_from={tmp_path / 'first'}", "lora.dropout=0.1")
    whole = tiny_config(tmp_path, base, *options, f"output.dir={tmp_path / 'whole'}")
    run_to_end(whole)
    first = [json.loads(line) for line in (tmp_path / "first" / "metrics.jsonl").read_text().splitlines()]
    second = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert second[0]["loss"] < first[0]["loss"]  # same documents: it begins where the other one ended
    cut = tiny_config(tmp_path, base, *options)
    run_until_step(cut, 3)
    run_to_end(cut, resume="auto")
    assert course(tmp_path / "run") == course(tmp_path / "whole")
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "last" / "manifest.json").read_text())
    assert len(manifest["fingerprints"]["initial adapter"]) == 64


def test_a_resume_refuses_another_adapter_under_the_same_name(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "theirs", base)
    config = begun_with(tmp_path, base, folder)
    run_until_step(config, 3)
    tensors = load_file(folder / "adapter_model.safetensors")
    changed = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(changed, folder / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match="another initial adapter than this run began with"):
        run_to_end(config, resume="auto")
    other = shutil.copytree(folder, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"lora\.init_from at --resume"):
        run_to_end(begun_with(tmp_path, base, other), resume="auto")


def test_what_the_config_leaves_open_is_taken_from_the_adapter(tmp_path: Path, base: Path) -> None:
    folder = peft_folder(tmp_path / "theirs", base, **FIELDS["patterns"], **FIELDS["layers"], lora_dropout=0.3)
    lora = filled_in(begun_with(tmp_path, base, folder)).lora
    assert (lora.rank, lora.alpha, lora.use_rslora, lora.use_dora) == (3, 5, True, False)
    assert set(lora.target_modules) == {"q_proj", "v_proj", "down_proj"}
    assert (lora.layers_to_transform, lora.rank_pattern, lora.alpha_pattern) == (
        (0,),
        (("q_proj", 5),),
        (("v_proj", 2),),
    )
    assert lora.dropout == 0.0  # how it is trained is not taken
    agreeing = (
        "lora.rank=3",
        "lora.alpha=5",
        "lora.use_rslora=true",
        "lora.target_modules=[v_proj, q_proj, down_proj]",
    )
    config = tiny_config(tmp_path, base, f"lora.init_from={folder}", *agreeing)
    assert filled_in(config).lora.rank == 3
    assert run_to_end(tiny_config(tmp_path, base, f"lora.init_from={folder}", *agreeing, "training.max_steps=1"))


@pytest.mark.parametrize(
    "option,where",
    [
        ("lora.rank=4", "lora.rank: found 4; expected 3, as "),
        ("lora.rank=max", "lora.rank: found 'max'; expected 3, as "),
        ("lora.alpha=6", "lora.alpha: found 6.0; expected 5, as "),
        ("lora.use_dora=true", "lora.use_dora: found True; expected False, as "),
        ("lora.target_modules=all-linear", "lora.target_modules: found 14 linears, 8 of them"),
        ("lora.layers_to_transform=[0]", "lora.target_modules: found 3 linears, 3 of them"),
        ("lora.rank_pattern={q_proj: 4}", "lora.rank_pattern: found rank 4 of model.layers.0.self_attn.q_proj"),
        ("lora.alpha_pattern={q_proj: 4}", "lora.alpha_pattern: found alpha 4.0 of model.layers.0.self_attn.q_proj"),
    ],
)
def test_what_the_config_asks_otherwise_is_refused(
    option: str, where: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_folder(tmp_path / "theirs", base)
    options = [option] if option.startswith("lora.rank=") else ["lora.rank=3", option]
    assert where in refusal(tiny_config(tmp_path, base, f"lora.init_from={folder}", *options), capsys)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    "changes, options, told",
    [
        ({"lora_alpha": 0}, ("lora.rank=3",), "found lora_alpha = 0;"),
        ({"lora_alpha": -0.0}, ("lora.rank=3",), "found lora_alpha = -0.0;"),
        (
            {"init_lora_weights": "pissa"},
            ("lora.rank=3",),
            "lora.rank: found 3; expected 6, as .* has it \\(read as plain LoRA: PiSSA, of twice the rank\\)",
        ),
        ({"modules_to_save": ["score"]}, (), "modules_to_save with 'score', which names no embedding, head or norm"),
    ],
    ids=str,
)
def test_what_is_wrong_is_told_as_the_file_has_it(
    changes: dict[str, Any], options: tuple[str, ...], told: str, tmp_path: Path, base: Path
) -> None:
    folder = peft_folder(tmp_path / "theirs", base)
    path, weights = folder / "adapter_config.json", load_file(folder / "adapter_model.safetensors")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    saved = {f"base_model.model.model.{name}.weight": torch.ones(8) for name in changes.get("modules_to_save", [])}
    save_file(weights | saved, folder / "adapter_model.safetensors")
    with pytest.raises(ConfigError, match=told):
        filled_in(tiny_config(tmp_path, base, f"lora.init_from={folder}", *options))


def damaged(folder: Path, how: str, canary: Path) -> None:
    weights = folder / "adapter_model.safetensors"
    tensors = load_file(weights)
    first = next(iter(tensors))
    if how == "missing":
        del tensors[first]
    elif how == "shape":
        tensors = {name: tensor[:, :5].contiguous() for name, tensor in tensors.items()}
    elif how == "infinite":
        tensors[first][0, 0] = float("inf")
    save_file(tensors, weights, {"format": "pt"})
    if how == "pickle":
        weights.unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(_Canary(canary)))
    elif how == "renamed":
        weights.write_bytes(pickle.dumps(_Canary(canary)))
    elif how in ("saved", "negative"):
        config = folder / "adapter_config.json"
        change = {"init_lora_weights": "corda"} if how == "saved" else {"lora_alpha": -4}
        config.write_text(json.dumps(json.loads(config.read_text()) | change))


class _Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._path,)


@pytest.mark.parametrize(
    "how,found",
    [
        ("missing", "1 weights that do not fit the base (model.layers.0.mlp.down_proj.lora_A: adapter has none"),
        ("shape", "6 weights that do not fit the base"),
        ("infinite", "that is not finite"),
        ("pickle", "only adapter_model.bin, a pickle, which is never read"),
        ("renamed", "no safetensors file"),
        ("saved", "init_lora_weights = 'corda'"),
        ("negative", "lora_alpha = -4"),
    ],
)
def test_an_adapter_that_cannot_be_begun_with_is_refused_before_weights(
    how: str,
    found: str,
    tmp_path: Path,
    base: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = peft_folder(tmp_path / "theirs", base)
    damaged(folder, how, tmp_path / "canary")
    monkeypatch.setattr("qlora_trainer.run.prepare.load_quantized", None)
    message = refusal(begun_with(tmp_path, base, folder), capsys)
    assert found in message
    assert message.count("adapter (") <= 5
    assert not (tmp_path / "canary").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("name", ["nowhere", "../../etc", "/" + "x" * 300, "a" * 300, "/dev/null", "./a/b"])
def test_a_name_of_nothing_is_refused(name: str, tmp_path: Path, base: Path) -> None:
    with pytest.raises(ConfigError, match="a PEFT adapter folder"):
        filled_in(tiny_config(tmp_path, base, f"lora.init_from={name}"))


def snapshot(tmp_path: Path, base: Path, commit: str) -> Path:
    """As the hub's cache names what it has fetched."""
    return peft_folder(tmp_path / "snapshots" / commit, base)


class Hub:
    """In the place of `snapshot_download`: what was asked for, and the folder of a branch or a commit."""

    def __init__(self, folders: dict[str | None, Path]) -> None:
        self.folders = folders
        self.asked: list[tuple[str, str | None, list[str]]] = []

    def __call__(self, name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((name, revision, allow_patterns))
        if revision not in self.folders:
            raise OSError("no network")
        return str(self.folders[revision])


def test_of_a_hub_repository_only_the_adapter_is_fetched(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub({None: peft_folder(tmp_path / "theirs", base)})
    monkeypatch.setattr(continue_from, "snapshot_download", hub)
    assert initial_folder("owner/name") == tmp_path / "theirs"
    assert hub.asked == [("owner/name", None, ["adapter_config.json", "adapter_model.safetensors"])]
    with pytest.raises(ConfigError, match=r"lora\.init_from: found 'owner/name@v2', no folder, .*no network"):
        initial_folder("owner/name@v2")


def test_a_hub_id_is_pinned_to_its_commit(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that moves on is another adapter: a resume refuses it, and takes the commit by its name."""
    old, new = "a" * 40, "b" * 40
    folder = snapshot(tmp_path, base, old)
    hub = Hub({None: folder, "main": folder, old: folder})
    monkeypatch.setattr(continue_from, "snapshot_download", hub)
    for name in ("owner/name", "owner/name@main", f"owner/name@{old}"):
        assert filled_in(begun_with(tmp_path, base, Path(name))).lora.init_from == f"owner/name@{old}"
    assert [revision for _, revision, _ in hub.asked] == [None, "main", old]
    config = begun_with(tmp_path, base, Path("owner/name"))
    run_until_step(config, 3)
    state = json.loads((tmp_path / "run" / "checkpoints" / "last" / "state.json").read_text())
    assert state["config"]["lora"]["init_from"] == f"owner/name@{old}"
    hub.folders[None] = hub.folders[new] = snapshot(tmp_path, base, new)
    found = rf"lora\.init_from at --resume: found 'owner/name@{new}'; expected 'owner/name@{old}'"
    with pytest.raises(ConfigError, match=found):
        run_to_end(config, resume="auto")
    run_to_end(begun_with(tmp_path, base, Path(f"owner/name@{old}")), resume="auto")


@pytest.mark.parametrize("revision", ["", "../x", "a..b", "-x", "a b", "x/", "a//b", "x" * 300, "a@b"])
def test_what_can_be_no_revision_is_refused(
    revision: str, tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(continue_from, "snapshot_download", None)
    with pytest.raises(ConfigError, match=r"lora\.init_from: found .* expected owner/name@revision"):
        filled_in(tiny_config(tmp_path, base, f"lora.init_from='owner/name@{revision}'"))
