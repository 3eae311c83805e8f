"""Chat templates as their models publish them, tokenizers that have their special tokens, and what they write, by hand.

The templates are written from their documented form; texts about tools are shortened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora_trainer.data.messages import Message
from qlora_trainer.data.tool_calls import ToolCall

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

# Text, and the number of the message whose answer it is, stop token included; None for what is never one.
Segments = list[tuple[str, int | None]]
Writer = Callable[[Sequence[Message], list[Any]], Segments]
CORPUS = [
    "What does `shutil.copytree` do? Recursively copy a directory tree and return the destination directory.\n\n",
    "user\n\nassistant\n\nmodel\n\nsystem\n\n  Hello, how are you?\n\n\n  The answer is 42.  \n\n",
]
QWEN_SYSTEM = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
LLAMA_SYSTEM = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"


@dataclass(frozen=True, slots=True)
class Published:
    """One model's way to write conversations.

    Attributes:
        name: of the template's file.
        kind: of the tokenizer: byte-level BPE, or SentencePiece's with byte fallback.
        specials: special tokens that the template writes.
        bos, eos: tokens; no BOS where the model has none.
        segments: what the template writes of messages and tools, spelled out by hand.
        takes_system: whether a system turn may come first.
        most_calls: tool calls that an answer may hold at most; 0 where the template knows no tools.
        takes_text_with_calls: whether an answer with calls may have text.
        refuses_tools: how a template that knows none is refused.
    """

    name: str
    kind: Literal["bytes", "sentencepiece"]
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    segments: Writer
    takes_system: bool = True
    most_calls: int = 0
    takes_text_with_calls: bool = False
    refuses_tools: str = "leaves out the (tool|call|calls|result) "


def _json(value: object, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=False, **options)


def _call(call: ToolCall, arguments: str) -> str:
    return f'{{"name": "{call.name}", "{arguments}": {_json(json.loads(call.arguments))}}}'


def _chatml(messages: Sequence[Message], _: list[Any]) -> Segments:
    segments: Segments = []
    for at, message in enumerate(messages):
        of = at if message.role == "assistant" else None
        segments += [(f"<|im_start|>{message.role}\n", None), (f"{message.content}<|im_end|>", of), ("\n", None)]
    return segments


def _hermes_tools(tools: list[Any]) -> str:
    listed = "".join("\n" + _json(tool) for tool in tools)
    about = "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    return f"{about}<tools>{listed}\n</tools>"


def _hermes_result(messages: Sequence[Message], at: int) -> str:
    """Results are the user's; those that follow each other are one turn."""
    begins = "" if messages[at - 1].role == "tool" else "<|im_start|>user"
    ends = "" if at + 1 < len(messages) and messages[at + 1].role == "tool" else "<|im_end|>\n"
    return f"{begins}\n<tool_response>\n{messages[at].content}\n</tool_response>{ends}"


def _qwen_2_5(messages: Sequence[Message], tools: list[Any]) -> Segments:
    has_system = messages[0].role == "system"
    system = messages[0].content if has_system else QWEN_SYSTEM
    about = f"\n\n{_hermes_tools(tools)}" if tools else ""
    segments: Segments = [(f"<|im_start|>system\n{system}{about}<|im_end|>\n", None)]
    for at, message in enumerate(messages):
        calls = "".join(f"\n<tool_call>\n{_call(call, 'arguments')}\n</tool_call>" for call in message.tool_calls)
        if message.role == "tool":
            segments.append((_hermes_result(messages, at), None))
        elif calls and not message.content:  # the line feed after the role belongs to the first call
            segments += [("<|im_start|>assistant\n", None), (f"{calls[1:]}<|im_end|>", at), ("\n", None)]
        elif message.role == "assistant":
            segments += [("<|im_start|>assistant\n", None), (f"{message.content}{calls}<|im_end|>", at), ("\n", None)]
        elif at or not has_system:
            segments.append((f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n", None))
    return segments


def _qwen_3(messages: Sequence[Message], tools: list[Any]) -> Segments:
    """Thoughts are written of the last answer, and of what was thought since the last question."""
    has_system = messages[0].role == "system"
    segments: Segments = []
    if tools:
        system = f"{messages[0].content}\n\n" if has_system else ""
        segments.append((f"<|im_start|>system\n{system}{_hermes_tools(tools)}<|im_end|>\n", None))
    elif has_system:
        segments.append((f"<|im_start|>system\n{messages[0].content}<|im_end|>\n", None))
    last_question = max(at for at, message in enumerate(messages) if message.role == "user")
    for at, message in enumerate(messages):
        if message.role == "tool":
            segments.append((_hermes_result(messages, at), None))
        elif message.role == "assistant":
            content = message.content
            if at > last_question and (at == len(messages) - 1 or message.reasoning):
                stripped = content.lstrip("\n")
                thoughts = message.reasoning.strip("\n")
                written = f"<think>\n{thoughts}\n</think>\n\n{stripped}"
            else:
                written = content
            calls = "\n".join(f"<tool_call>\n{_call(call, 'arguments')}\n</tool_call>" for call in message.tool_calls)
            between = "\n" if calls and content else ""
            segments += [
                ("<|im_start|>assistant\n", None),
                (f"{written}{between}{calls}<|im_end|>", at),
                ("\n", None),
            ]
        elif at or not has_system:
            segments.append((f"<|im_start|>{message.role}\n{message.content}<|im_end|>\n", None))
    return segments


def _llama_3_1(messages: Sequence[Message], tools: list[Any]) -> Segments:
    """Tools stand before the first question; a call is JSON, and so is the text of a result."""
    has_system = messages[0].role == "system"
    system = LLAMA_SYSTEM + (messages[0].content.strip() if has_system else "")
    begin = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
    segments: Segments = [(begin + ("Environment: ipython\n" if tools else "") + system + "<|eot_id|>", None)]
    about = "Given the following functions, please respond with a JSON for a function call.\n\n"
    about += "".join(_json(tool, indent=4) + "\n\n" for tool in tools)
    for at, message in enumerate(messages[has_system:], start=has_system):
        role, content = message.role, message.content.strip()
        if role == "tool":
            role, content = "ipython", _json(message.content)
        elif message.tool_calls:
            [call] = message.tool_calls
            content = _call(call, "parameters")
        elif at == has_system and tools:
            content = about + content
        segments += [
            (f"<|start_header_id|>{role}<|end_header_id|>\n\n", None),
            (f"{content}<|eot_id|>", at if role == "assistant" else None),
        ]
    return segments


def _gemma(messages: Sequence[Message], _: list[Any]) -> Segments:
    has_system = messages[0].role == "system"
    prefix = messages[0].content + "\n\n" if has_system else ""
    segments: Segments = [("<bos>", None)]
    for at, message in enumerate(messages[has_system:], start=has_system):
        is_answer = message.role == "assistant"
        begin = f"<start_of_turn>{'model' if is_answer else message.role}\n{prefix if at == has_system else ''}"
        end = f"{message.content.strip()}<end_of_turn>"
        segments += [(begin, None), (end, at if is_answer else None), ("\n", None)]
    return segments


def _mistral(messages: Sequence[Message], tools: list[Any]) -> Segments:
    """Tools stand before the last question, and before every one that reads the same."""
    segments: Segments = [("<s>", None)]
    last_question = [message for message in messages if message.role == "user"][-1]
    for at, message in enumerate(messages):
        if message.tool_calls:
            calls = ", ".join(
                f'{_call(call, "arguments")[:-1]}, "id": "{call.call_id}"}}' for call in message.tool_calls
            )
            segments.append((f"[TOOL_CALLS] [{calls}]</s>", at))
        elif message.role == "assistant":
            segments.append((f" {message.content.strip()}</s>", at))
        elif message.role == "tool":
            result = f'{{"content": {message.content}, "call_id": "{message.tool_call_id}"}}'
            segments.append((f"[TOOL_RESULTS] {result}[/TOOL_RESULTS]", None))
        else:
            about = f"[AVAILABLE_TOOLS] {_json(tools)}[/AVAILABLE_TOOLS]" if tools and message == last_question else ""
            segments.append((f"{about}[INST] {message.content}[/INST]", None))
    return segments


def _phi_3(messages: Sequence[Message], _: list[Any]) -> Segments:
    segments: Segments = []
    for at, message in enumerate(messages):
        of = at if message.role == "assistant" else None
        segments += [(f"<|{message.role}|>\n", None), (f"{message.content}<|end|>", of), ("\n", None)]
    return [*segments, ("<|endoftext|>", None)]


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PHI_TOKENS = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
_MISTRAL_TOKENS = (
    "<s>",
    "</s>",
    *(f"[{end}{what}]" for what in ("INST", "AVAILABLE_TOOLS", "TOOL_RESULTS") for end in ("", "/")),
    "[TOOL_CALLS]",
)
_ALTERNATE = r"refuses \(Conversation roles must alternate"
PUBLISHED = (
    Published("chatml", "bytes", _CHATML_TOKENS, None, "<|im_end|>", _chatml),
    Published("llama_3_1", "bytes", _LLAMA_TOKENS, "<|begin_of_text|>", "<|eot_id|>", _llama_3_1, most_calls=1),
    Published(
        "qwen_2_5", "bytes", _CHATML_TOKENS, None, "<|im_end|>", _qwen_2_5, most_calls=3, takes_text_with_calls=True
    ),
    Published("qwen_3", "bytes", _CHATML_TOKENS, None, "<|im_end|>", _qwen_3, most_calls=3, takes_text_with_calls=True),
    Published(
        "gemma_2",
        "sentencepiece",
        _GEMMA_TOKENS,
        "<bos>",
        "<eos>",
        _gemma,
        takes_system=False,
        refuses_tools=_ALTERNATE,
    ),
    Published("gemma_3", "sentencepiece", _GEMMA_TOKENS, "<bos>", "<eos>", _gemma, refuses_tools=_ALTERNATE),
    Published(
        "mistral_v0_3", "sentencepiece", _MISTRAL_TOKENS, "<s>", "</s>", _mistral, takes_system=False, most_calls=3
    ),
    Published("phi_3", "sentencepiece", _PHI_TOKENS, "<s>", "<|endoftext|>", _phi_3),
)


def make_tokenizer(published: Published) -> PreTrainedTokenizerFast:
    """A small tokenizer of the model's kind, with its template."""
    from transformers import PreTrainedTokenizerFast

    backend = _byte_level() if published.kind == "bytes" else _sentencepiece()
    others = [token for token in published.specials if token not in (published.bos, published.eos)]
    untyped: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # its constructor has no types
    tokenizer = untyped(
        tokenizer_object=backend,
        eos_token=published.eos,
        pad_token=published.eos,
        extra_special_tokens=others,
        **({"bos_token": published.bos} if published.bos else {}),
    )
    tokenizer.chat_template = (Path(__file__).parent / "templates" / f"{published.name}.jinja").read_text()
    return tokenizer


def _byte_level() -> Tokenizer:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS * 20, trainer)
    return backend


def _sentencepiece() -> Tokenizer:
    """As Gemma's: spaces are visible, unknown characters are bytes, and runs of newlines are tokens of their own."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    merges = [("\n", "\n"), ("\n\n", "\n"), ("▁", "▁"), ("▁", "H"), ("l", "l"), ("e", "ll"), ("▁", "t"), ("▁t", "h")]
    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *(chr(code) for code in range(ord("!"), ord("~") + 1)),
        "\n",
        "▁",
        *(first + second for first, second in merges),
    ]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend
