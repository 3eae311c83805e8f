from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlora_trainer.config.did_you_mean import DOTTED_KEYS, SECTIONS, suggest_key
from qlora_trainer.config.foreign import FOREIGN_KEYS


@pytest.mark.parametrize(
    "foreign,ours",
    [
        ("learning_rate", "training.learning_rate"),
        ("lora_r", "lora.rank"),
        ("lora_alpha", "lora.alpha"),
        ("lora_target", "lora.target_modules"),
        ("lora_target_modules", "lora.target_modules"),
        ("lora_target_linear", "lora.target_modules"),
        ("cutoff_len", "data.seq_len"),
        ("sequence_len", "data.seq_len"),
        ("max_seq_length", "data.seq_len"),
        ("max_length", "data.seq_len"),
        ("micro_batch_size", "memory.micro_batch_tokens"),
        ("per_device_train_batch_size", "training.global_batch_size"),
        ("gradient_accumulation_steps", "training.global_batch_size"),
        ("gradient_checkpointing", "memory.activation_checkpointing"),
        ("num_epochs", "training.epochs"),
        ("num_train_epochs", "training.epochs"),
        ("base_model", "model.base"),
        ("model_name_or_path", "model.base"),
        ("lr_scheduler", "training.schedule"),
        ("lr_scheduler_type", "training.schedule"),
        ("warmup_steps", "training.warmup_ratio"),
        ("sample_packing", "data.packing"),
        ("val_set_size", "data.eval_fraction"),
        ("output_dir", "output.dir"),
        ("report_to", "output.trackers"),
        ("save_steps", "training.save_every"),
        ("eval_steps", "training.eval_every"),
        ("load_in_4bit", "always quantized to NF4"),
        ("bnb_4bit_compute_dtype", "quantization.compute_dtype"),
        ("bnb_4bit_use_double_quant", "quantization.double_quant"),
        ("optim", "training.optimizer"),
        ("max_grad_norm", "training.max_grad_norm"),
        ("Learning-Rate", "training.learning_rate"),
    ],
)
@pytest.mark.parametrize("section", ["", "training.", "lora.", "no_such_section."])
def test_names_from_other_trainers(section: str, foreign: str, ours: str) -> None:
    assert ours in suggest_key(section + foreign)


def test_every_counterpart_is_a_key_of_ours() -> None:
    named = {key for counterpart in FOREIGN_KEYS.values() for key in counterpart.keys}
    assert named <= set(DOTTED_KEYS)
    assert all(counterpart.keys or counterpart.note for counterpart in FOREIGN_KEYS.values())


def test_a_foreign_name_is_none_of_ours() -> None:
    """A name that we have ourselves is found before the table is asked: such a row would never be read."""
    assert not {key.rpartition(".")[2] for key in DOTTED_KEYS} & set(FOREIGN_KEYS)


@given(st.sampled_from([key for key in DOTTED_KEYS if len(key.rpartition(".")[2]) > 4]), st.data())
def test_a_key_without_one_of_its_letters_is_recognised(dotted: str, data: st.DataObject) -> None:
    section, _, key = dotted.partition(".")
    position = data.draw(st.integers(0, len(key) - 1))
    misspelt = key[:position] + key[position + 1 :]
    assert dotted in suggest_key(f"{section}.{misspelt}") or misspelt in FOREIGN_KEYS


@pytest.mark.parametrize("section", SECTIONS)
def test_a_misspelt_section_is_recognised(section: str) -> None:
    assert suggest_key(section[:-2] + section[-1]) == f"Did you mean the section {section}?"


def test_nothing_is_made_up() -> None:
    assert suggest_key("zzzz") == ""
    assert suggest_key("training.zzzz") == ""
    assert suggest_key("") == ""
