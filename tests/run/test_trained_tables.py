"""A run that trains embedding and head whole, and all that is done with it afterwards. The tiny base ties both."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qlora_trainer.cli.app import main
from qlora_trainer.errors import ConfigError
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.run.adapted_base import find_adapters
from qlora_trainer.run.answer import answer
from qlora_trainer.run.continue_from import filled_in
from qlora_trainer.run.eval_config import eval_config
from qlora_trainer.run.evaluation import Evaluation, evaluate_adapters
from tests.export.made_adapters import load_base, model_logits
from tests.model.peft_oracle import load_adapter, load_oracle, logits
from tests.model.tiny_models import relative_error, tiny_documents
from tests.returned import returned
from tests.run.tiny_adapters import write_adapter
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint

pytestmark = pytest.mark.usefixtures("plans_made_once")

OPTIONS = ("lora.modules_to_save=[embed_tokens, lm_head]", "lora.dtype=float32", "memory.micro_batch_tokens=96")
TABLE = "base_model.model.model.embed_tokens.weight"
DOCUMENTS = tiny_documents(33, 21)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, base: Path, plans_made_once: None) -> Path:
    """Finished; nobody changes it."""
    folder = tmp_path_factory.mktemp("trained")
    run_to_end(tiny_config(folder, base, *OPTIONS))
    return folder / "run"


def test_it_trains_the_table_and_a_resume_changes_nothing(run: Path, base: Path, tmp_path: Path) -> None:
    """Mutation tried: a rehearsal that moves the weights, which nothing draws again."""
    config = tiny_config(tmp_path, base, *OPTIONS)
    run_until_step(config, 5)
    run_to_end(config, resume="auto")
    assert course(tmp_path / "run") == course(run)
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    original = load_file(base / "model.safetensors")["model.embed_tokens.weight"].float()
    assert torch.equal(trained[TABLE], trained["base_model.model.lm_head.weight"])
    moved_V = (trained[TABLE] - original).abs().amax(1)
    assert float(moved_V.min()) > 0.0  # the head's gradient reaches every row
    assert float(moved_V.max()) < 0.1
    evals = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    assert evals[-1]["eval_loss"] < evals[0]["eval_loss"]


def test_the_loss_before_the_first_step_is_that_of_the_base(run: Path, base: Path, tmp_path: Path) -> None:
    plain = tiny_config(tmp_path, base, "training.max_steps=1", "lora.dtype=float32", "memory.micro_batch_tokens=96")
    run_to_end(plain)
    first, expected = (
        json.loads((path / "evals.jsonl").read_text().splitlines()[0]) for path in (run, tmp_path / "run")
    )
    assert first["eval_loss"] == expected["eval_loss"]


def test_answers_and_evaluations_know_it(run: Path, base: Path, tmp_path: Path) -> None:
    """Beside an adapter without tables, and before and behind it: the base's own are put back."""
    other = write_adapter(tmp_path / "plain", base, seed=3)
    lines = [json.loads(line) for line in (run / "evals.jsonl").read_text().splitlines()]
    targets = {"run": run, "plain": other, "again": run / "adapter"}
    data = [str(run.parent / "rows.jsonl")]
    found = evaluated(targets, data)
    alone = [evaluated({"a": path}, data).judged[1].loss for path in (run, other)]
    # In other micro-batches where no run says how many.
    assert [line.loss for line in found.judged[1:]] == pytest.approx([*alone, alone[0]], rel=1e-6)
    assert found.judged[1].loss == found.judged[3].loss != found.judged[0].loss
    own = evaluated({"run": run}, [])
    assert own.judged[0].loss == lines[0]["eval_loss"]
    assert own.judged[1].loss == pytest.approx(min(line["eval_loss"] for line in lines[1:]), rel=1e-6)
    asked = {"base": None, "max_new_tokens": 5, "temperature": 0.0, "seed": 0}
    assert answer(run, "What is 3 + 3?", **asked) == answer(run / "adapter", "What is 3 + 3?", **asked)  # type: ignore[arg-type]


def evaluated(targets: dict[str, Path], data: list[str]) -> Evaluation:
    judged_on = eval_config(targets, data, overrides=["quantization.compute_dtype=float32"] if data else [])
    return returned(evaluate_adapters(judged_on, find_adapters(targets, base=None), targets))


def test_a_run_goes_on_from_it(run: Path, base: Path, tmp_path: Path) -> None:
    """What is trained is taken from the folder, and so are the weights."""
    config = tiny_config(
        tmp_path, base, f"lora.init_from={run}", "training.max_steps=1", "training.learning_rate=1e-30",
        "lora.dtype=float32",
    )  # fmt: skip
    assert set(filled_in(config).lora.modules_to_save) == {"lm_head", "model.embed_tokens"}
    run_to_end(config)
    ours, theirs = (load_file(path / "adapter" / "adapter_model.safetensors") for path in (tmp_path / "run", run))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_two_tables_of_a_base_that_ties_them_are_gone_on_from_as_two(run: Path, base: Path, tmp_path: Path) -> None:
    """Which is what PEFT makes of them unless it is told not to; the config may say otherwise, and is refused."""
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "untied"))
    fields = json.loads((folder / "adapter_config.json").read_text())
    fields |= {"ensure_weight_tying": False, "modules_to_save": ["lm_head", "embed_tokens"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    assert filled_in(tiny_config(tmp_path, base, f"lora.init_from={folder}")).lora.untie_tables
    with pytest.raises(ConfigError, match=r"lora\.untie_tables: found False; expected True, as .*untied has it"):
        run_to_end(tiny_config(tmp_path, base, f"lora.init_from={folder}", "lora.untie_tables=false"))
    with pytest.raises(ConfigError, match=r"lora\.untie_tables: found True; expected False, as .*adapter has it"):
        run_to_end(tiny_config(tmp_path, base, f"lora.init_from={run / 'adapter'}", "lora.untie_tables=true"))
    fields["modules_to_save"] = ["lm_head"]
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    options = (f"lora.init_from={folder}", "training.max_steps=1")
    with pytest.raises(ConfigError, match=r"lora\.modules_to_save: found \[\], and an adapter .* model\.embed_tokens"):
        run_to_end(tiny_config(tmp_path, base, *options))  # the file has the other, too: with that head it is read
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors[TABLE]
    save_file(tensors, folder / "adapter_model.safetensors")
    run_to_end(tiny_config(tmp_path, base, *options))
    assert TABLE not in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")


def test_it_is_exported_and_merged_and_has_no_portable_form(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(run), "--to", str(tmp_path / "exported")]) == 0
    cache = prepare_nf4_cache(resolve_base(str(base)), double_quant=True)
    with torch.no_grad():
        given_TV, found_TV = (
            logits(load_adapter(load_oracle(cache.folder, torch.float32), path), DOCUMENTS)
            for path in (run / "adapter", tmp_path / "exported")
        )
        expected = load_adapter(load_base(base), run / "adapter").merge_and_unload()
        expected_TV = logits(expected.eval(), DOCUMENTS)
    assert torch.equal(given_TV, found_TV)
    assert main(["merge", str(run), "--to", str(tmp_path / "merged"), "--dtype", "fp32", "--force"]) == 0
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"] is True
    assert relative_error(model_logits(tmp_path / "merged", DOCUMENTS), expected_TV) <= 1e-5
    capsys.readouterr()
    for how in (["--to", str(tmp_path / "no"), "--portable"], ["--gguf", str(tmp_path / "no.gguf")]):
        assert main(["export", str(run), *how]) == 2
        assert "modules that were trained whole (model.embed_tokens)" in complaint(capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "merged"]
