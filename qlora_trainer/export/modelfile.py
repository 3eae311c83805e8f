"""A Modelfile for Ollama beside a GGUF adapter: base, adapter, and as much of the chat template as is known.

Ollama has templates of its own, in Go's language. Which one stands for a tokenizer's is found by comparing what the
tokenizer makes of a short conversation with what that format says; where none does, the file says so and leaves it out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from qlora_trainer.config.bases import SHIPPED_BASES
from qlora_trainer.errors import StorageError
from qlora_trainer.export.new_folder import write_checked
from qlora_trainer.export.source import Source
from qlora_trainer.model.base import read_tokenizer
from qlora_trainer.model.packaged_base import PACKAGED_BASES
from qlora_trainer.run.checkpoint.storage import Storage, refusal

MODELFILE_NAME = "Modelfile"


@dataclass(frozen=True, slots=True)
class ChatFormat:
    """How turns are written.

    Attributes:
        before, after: around the role, and after its text: `before[0] role before[1] text after`.
        go_template: the same in Ollama's language.
        stop: what ends an answer.
    """

    before: tuple[str, str]
    after: str
    go_template: str
    stop: str

    def turn(self, role: str, text: str) -> str:
        return f"{self.before[0]}{role}{self.before[1]}{text}{self.after}"


_FORMATS = (
    ChatFormat(
        before=("<|im_start|>", "\n"),
        after="<|im_end|>\n",
        go_template=(
            "{{- range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}<|im_start|>assistant\n"
        ),
        stop="<|im_end|>",
    ),
    ChatFormat(
        before=("<|start_header_id|>", "<|end_header_id|>\n\n"),
        after="<|eot_id|>",
        go_template=(
            "{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n{{ .Content }}<|eot_id|>"
            "{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
        ),
        stop="<|eot_id|>",
    ),
)


def write_modelfile(adapter: Path, source: Source, *, storage: Storage) -> None:
    """Write `Modelfile` beside a GGUF adapter.

    Args:
        adapter: the GGUF file.
        source: its base.
        storage: where to write.

    Raises:
        ConfigError: the base has no tokenizer that can be read.
        StorageError: the disk refused.
    """
    path = adapter.with_name(MODELFILE_NAME)
    tokenizer = read_tokenizer(source.base.folder)
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    try:
        write_checked(path, modelfile(adapter.name, _base_line(source), tokenizer).encode(), storage)
    except (OSError, StorageError) as error:
        with suppress(OSError):
            path.unlink()
        if isinstance(error, OSError):
            raise refusal(error, where=path, doing="writing the Modelfile", place="--gguf") from error
        raise


def modelfile(adapter_name: str, base_line: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of a Modelfile.

    Args:
        adapter_name: of the GGUF file beside it.
        base_line: what comes after FROM, with a comment above it maybe.
        tokenizer: of the base, with the template that was trained with.
    """
    lines = [base_line, f"ADAPTER ./{adapter_name}"]
    found = known_format(tokenizer)
    if found is None:
        lines.append("# TEMPLATE is left out: the chat template of this base has no known form in Ollama's language.")
        stops = [tokenizer.eos_token] if isinstance(tokenizer.eos_token, str) else []
    else:
        chat_format, system = found
        lines.append(f'TEMPLATE """{chat_format.go_template}"""')
        lines += [f'SYSTEM """{system}"""'] if system else []
        stops = [chat_format.stop]
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    return "\n".join(lines) + "\n"


def known_format(tokenizer: PreTrainedTokenizerBase) -> tuple[ChatFormat, str] | None:
    """The format of a tokenizer's chat template, and the system prompt it puts where none is given; None if unknown."""
    if not tokenizer.chat_template:
        return None
    turns = [("user", "2 + 2?"), ("assistant", "4"), ("user", "3 + 3?")]
    for chat_format in _FORMATS:
        opening = "".join(chat_format.before[0] + "assistant" + chat_format.before[1])
        rest = "".join(chat_format.turn(role, text) for role, text in turns) + opening
        with_system = _rendered(tokenizer, [("system", "Be brief."), *turns])
        without = _rendered(tokenizer, turns)
        bos = tokenizer.bos_token if isinstance(tokenizer.bos_token, str) else ""
        if with_system is None or without is None:
            return None
        # A BOS at the start is not the template's: Ollama adds it as the base's own file says.
        if with_system.removeprefix(bos) not in _both(chat_format.turn("system", "Be brief.") + rest, bos):
            continue
        system = _default_system(without, rest, chat_format)
        if system is not None and '"""' not in system:
            return chat_format, system
    return None


def _both(text: str, bos: str) -> tuple[str, str]:
    """A format whose first mark is the BOS loses it with the BOS."""
    return text, text.removeprefix(bos)


def _default_system(text: str, rest: str, chat_format: ChatFormat) -> str | None:
    """What the template says of itself before the first turn: "" for nothing, None where that is no system turn."""
    if not text.endswith(rest):
        return None
    start, first, last = text[: -len(rest)], chat_format.turn("system", "\0").partition("\0")[0], chat_format.after
    if first not in start:
        return "" if len(start) < len(first) else None
    return start.partition(first)[2].removesuffix(last)


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]]) -> str | None:
    messages = [{"role": role, "content": text} for role, text in turns]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError, KeyError):
        return None  # a template that has no place for a system prompt, say


def _base_line(source: Source) -> str:
    name = source.base.name
    if name in SHIPPED_BASES:
        packaged = PACKAGED_BASES[name]
        spec = find_spec(packaged.package)
        assert spec is not None  # the base was found in it
        assert spec.origin is not None
        return f"FROM {Path(spec.origin).parent / packaged.file_name}"
    folder = source.base.folder
    if any(folder.glob("*.safetensors")):
        return f"FROM {folder}"
    return f"# Put the base's own GGUF file here; it is {name}.\nFROM ./base.gguf"
