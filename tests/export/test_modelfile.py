"""The Modelfile names base and adapter, and has a template only where the tokenizer's own says the same."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qlora_trainer.cli.app import main
from qlora_trainer.export.modelfile import known_format, modelfile
from qlora_trainer.model.base import read_tokenizer
from tests.run.told import complaint

TEMPLATES = Path(__file__).parents[1] / "data" / "templates"
LLAMA_3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@pytest.mark.parametrize(
    "template,stop,system",
    [
        ("chatml", "<|im_end|>", ""),
        ("qwen_3", "<|im_end|>", ""),
        ("qwen_2_5", "<|im_end|>", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
        (LLAMA_3, "<|eot_id|>", ""),
    ],
)
def test_a_format_is_known_by_what_it_says(template: str, stop: str, system: str, base: Path) -> None:
    tokenizer = read_tokenizer(base)
    is_text = "{" in template
    tokenizer.chat_template = template if is_text else (TEMPLATES / f"{template}.jinja").read_text()
    found = known_format(tokenizer)
    assert found is not None
    assert (found[0].stop, found[1]) == (stop, system)
    text = modelfile("x.gguf", "FROM base", tokenizer)
    assert text.startswith('FROM base\nADAPTER ./x.gguf\nTEMPLATE """')
    assert f'PARAMETER stop "{stop}"' in text
    assert (f'SYSTEM """{system}"""' in text) is bool(system)


@pytest.mark.parametrize("template", ["gemma_2", "gemma_3", "llama_3_1", "mistral_v0_3", "phi_3"])
def test_another_template_is_left_out_and_said(template: str, base: Path) -> None:
    """Llama 3.1 tells the date, which no Modelfile can; the others are formats that nobody compared."""
    tokenizer = read_tokenizer(base)
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    assert known_format(tokenizer) is None
    text = modelfile("x.gguf", "FROM base", tokenizer)
    assert "TEMPLATE is left out" in text
    assert 'TEMPLATE """' not in text
    assert f'PARAMETER stop "{tokenizer.eos_token}"' in text


def test_it_is_written_beside_the_file(finished: Path, base: Path, tmp_path: Path) -> None:
    assert main(["export", str(finished), "--gguf", str(tmp_path / "mine.gguf"), "--ollama"]) == 0
    assert sorted(os.listdir(tmp_path)) == ["Modelfile", "mine.gguf"]
    lines = (tmp_path / "Modelfile").read_text().splitlines()
    assert lines[:2] == [f"FROM {base}", "ADAPTER ./mine.gguf"]


def test_one_that_is_there_is_not_written_over(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "Modelfile").write_text("mine")
    arguments = ["export", str(finished), "--gguf", str(tmp_path / "mine.gguf"), "--ollama"]
    capsys.readouterr()
    assert main(arguments) == 2
    assert "there already" in complaint(capsys)
    assert os.listdir(tmp_path) == ["Modelfile"]
    assert (tmp_path / "Modelfile").read_text() == "mine"


@pytest.mark.parametrize("options", [["--ollama", "--to", "x"], ["--portable", "--gguf", "x.gguf"], []])
def test_options_that_mean_nothing_are_refused(
    options: list[str], finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert main(["export", str(finished), *options]) == 2
    complaint(capsys)
