"""What the config asks of optimizer and schedule reaches the steps; what a run leaves is used as it was trained."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from qlora_trainer.config.paths import require_on_disk
from qlora_trainer.errors import StorageError
from qlora_trainer.model import adapter_set
from qlora_trainer.model.adapter_folder import read_adapter_folder
from qlora_trainer.model.adapters import attach_adapters
from qlora_trainer.model.base import resolve_base
from qlora_trainer.model.nf4_cache import prepare_nf4_cache
from qlora_trainer.run import adapted_base
from qlora_trainer.run.answer import answer
from tests.model.peft_oracle import load_adapter, load_oracle, logits
from tests.model.tiny_models import load_for_training, packed_logits, relative_error, tiny_documents
from tests.run.tiny_run import course, run_to_end, run_until_step, tiny_config
from tests.run.told import complaint, train_command

SHARED_MEMORY = Path("/dev/shm")  # a tmpfs is what is asked for


def adapter_of(run: Path) -> dict[str, Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def test_gradients_are_clipped_and_weights_decay(tmp_path: Path, base: Path) -> None:
    """AdamW moves a weight by the rate whatever its gradient's size, unless that is far below epsilon (1e-8)."""
    rate, decay, steps = 0.1, 0.5, 3
    common = (
        f"training.learning_rate={rate}",
        "training.schedule=constant",
        "training.warmup_ratio=0",
        f"training.max_steps={steps}",
        "training.max_grad_norm=1e-12",
        "lora.dtype=float32",
    )
    runs = {}
    for name, weight_decay in (("plain", 0.0), ("decayed", decay)):
        options = (*common, f"training.weight_decay={weight_decay}", f"output.dir={tmp_path / name}")
        run_to_end(tiny_config(tmp_path, base, *options))
        runs[name] = adapter_of(tmp_path / name)
    for name, plain in runs["plain"].items():
        if "lora_B" in name:
            assert plain.abs().max() < 1e-3 * rate, name  # it began at zero
        else:
            torch.testing.assert_close(runs["decayed"][name], plain * (1 - rate * decay) ** steps, rtol=0, atol=1e-3)
            assert not torch.allclose(runs["decayed"][name], plain, rtol=0, atol=5e-3)


def test_the_rate_warms_up_and_falls_as_asked(tmp_path: Path, base: Path) -> None:
    options = (
        "training.warmup_ratio=0.5",
        "training.schedule=cosine",
        "training.save_every=1",
        "training.eval_every=6",
    )
    run_to_end(tiny_config(tmp_path, base, *options))
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=5e-3)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=3, num_training_steps=6)
    expected = []
    for _ in rates:
        expected += schedule.get_last_lr()
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(expected)
    assert rates[0] == 0.0


def test_b_matrices_have_their_own_rate_and_a_resume_is_exact(tmp_path: Path, base: Path) -> None:
    options = (
        "training.loraplus_lr_ratio=8",
        "lora.use_dora=true",
        "training.warmup_ratio=0.5",
        "training.optimizer=paged_adamw_8bit",  # the one with the most state to lose
    )
    run_to_end(tiny_config(tmp_path, base, *options, f"output.dir={tmp_path / 'whole'}"))
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [line["lr_b"] for line in lines] == [8 * line["lr"] for line in lines]
    cut = tiny_config(tmp_path, base, *options)
    run_until_step(cut, 3)
    run_to_end(cut, resume="auto")
    assert course(tmp_path / "run") == course(tmp_path / "whole")
    run_to_end(tiny_config(tmp_path, base, *options[1:], f"output.dir={tmp_path / 'plain'}"))
    assert "lr_b" not in (tmp_path / "plain" / "metrics.jsonl").read_text()
    plain, own = adapter_of(tmp_path / "plain"), adapter_of(tmp_path / "whole")
    assert not any(torch.equal(plain[name], own[name]) for name in plain if "lora_A" not in name)


def test_an_answer_takes_base_and_adapter_as_they_were_trained(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("quantization.double_quant=false", "lora.dtype=float32", "training.max_steps=2")
    run_to_end(tiny_config(tmp_path, base, *options))
    used: dict[str, Any] = {}

    def spy(module: ModuleType, name: str, num_kept: int) -> None:
        real = getattr(module, name)

        def seen(*arguments: Any, **options: Any) -> Any:
            used[name] = (*arguments[:num_kept], options)
            return real(*arguments, **options)

        monkeypatch.setattr(module, name, seen)

    spy(adapted_base, "prepare_nf4_cache", 0)
    spy(adapter_set, "build_adapters", 0)
    spy(adapted_base, "resolve_base", 2)
    for target in (tmp_path / "run", tmp_path / "run" / "adapter"):
        used.clear()
        answer(target, "What is 3 + 3?", base=None, max_new_tokens=1, temperature=0.0, seed=0)
        assert used["prepare_nf4_cache"] == ({"double_quant": False, "nf4_head": False},)
        assert used["build_adapters"] == ({"dtype": torch.float32},)

    adapter = tmp_path / "run" / "adapter" / "adapter_config.json"
    adapter.write_text(json.dumps(json.loads(adapter.read_text()) | {"revision": "v1"}))
    answer(tmp_path / "run", "What is 3 + 3?", base=str(base), max_new_tokens=1, temperature=0.0, seed=0)
    assert used["resolve_base"] == (
        str(base),
        {"with_weights": False, "layer_replication": ()},
    )  # not the revision of another base


def test_peft_gives_the_logits_of_a_finished_run(tmp_path: Path, base: Path) -> None:
    run_to_end(tiny_config(tmp_path, base, "training.learning_rate=5e-2"))
    folder = tmp_path / "run" / "adapter"
    documents = tiny_documents(33, 21)
    resolved = resolve_base(str(base))
    cache = prepare_nf4_cache(resolved, double_quant=True)
    model = load_for_training(resolved, cache)
    adapter = read_adapter_folder(folder, linear_names=list(model.linears))
    assert {weight.dtype for weight in adapter.weights.values()} == {torch.bfloat16}
    attach_adapters(model, adapter.settings, adapter.weights, dtype=torch.bfloat16)
    ours_TV = packed_logits(model, documents)
    oracle = load_oracle(cache.folder, torch.float32)
    with torch.no_grad():
        without_TV = logits(oracle, documents)
        theirs_TV = logits(load_adapter(oracle, folder), documents)
    assert relative_error(ours_TV, theirs_TV) <= 1e-5
    assert relative_error(without_TV, theirs_TV) > 1e-2


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no tmpfs here")
def test_a_run_does_not_page_into_memory(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(StorageError):
        require_on_disk(SHARED_MEMORY)
    run = SHARED_MEMORY / f"qlora-trainer-{tmp_path.name}"
    config = tiny_config(tmp_path, base, "training.optimizer=paged_adamw_32bit", f"output.dir={run}")
    try:
        assert train_command(config) == 5
        assert "found a tmpfs, whose files are kept in memory" in complaint(capsys)
        assert not run.exists()
    finally:
        run.with_suffix(".yaml").unlink()
