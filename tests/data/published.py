"""Chat templates as their models publish them, tokenizers that have their special tokens, and what they write, by hand.

The templates are written from their documented form; texts about tools are shortened.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Turns = Sequence[tuple[str, str]]
Segments = list[tuple[str, bool]]  # text, and whether it is learned
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
        segments: what the template writes, spelled out by hand; the turns end with an answer.
        takes_system: whether a system turn may come first.
    """

    name: str
    kind: Literal["bytes", "sentencepiece"]
    specials: tuple[str, ...]
    bos: str | None
    eos: str
    segments: Callable[[Turns], Segments]
    takes_system: bool = True


def _chatml(turns: Turns) -> Segments:
    segments: Segments = []
    for role, content in turns:
        segments += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>", role == "assistant"), ("\n", False)]
    return segments


def _qwen_2_5(turns: Turns) -> Segments:
    return _chatml(turns if turns[0][0] == "system" else [("system", QWEN_SYSTEM), *turns])


def _qwen_3(turns: Turns) -> Segments:
    """Only the last answer is learned, with the thoughts it did not have; earlier ones are read without any."""
    *before, (role, last) = turns
    return [
        *((text, False) for text, _ in _chatml(before)),
        (f"<|im_start|>{role}\n", False),
        ("<think>\n\n</think>\n\n" + last.lstrip("\n") + "<|im_end|>", True),
        ("\n", False),
    ]


def _llama_3_1(turns: Turns) -> Segments:
    has_system = turns[0][0] == "system"
    system = turns[0][1].strip() if has_system else ""
    segments: Segments = [
        (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n" + LLAMA_SYSTEM + system + "<|eot_id|>",
            False,
        )
    ]
    for role, content in turns[has_system:]:
        segments += [
            (f"<|start_header_id|>{role}<|end_header_id|>\n\n", False),
            (f"{content.strip()}<|eot_id|>", role == "assistant"),
        ]
    return segments


def _gemma(turns: Turns) -> Segments:
    has_system = turns[0][0] == "system"
    prefix = turns[0][1] + "\n\n" if has_system else ""
    segments: Segments = [("<bos>", False)]
    for index, (role, content) in enumerate(turns[has_system:]):
        segments += [
            (f"<start_of_turn>{'model' if role == 'assistant' else role}\n{prefix if index == 0 else ''}", False),
            (f"{content.strip()}<end_of_turn>", role == "assistant"),
            ("\n", False),
        ]
    return segments


def _mistral(turns: Turns) -> Segments:
    segments: Segments = [("<s>", False)]
    for role, content in turns:
        segments.append(
            (f" {content.strip()}</s>", True) if role == "assistant" else (f"[INST] {content}[/INST]", False)
        )
    return segments


def _phi_3(turns: Turns) -> Segments:
    segments: Segments = []
    for role, content in turns:
        segments += [(f"<|{role}|>\n", False), (f"{content}<|end|>", role == "assistant"), ("\n", False)]
    return [*segments, ("<|endoftext|>", False)]


_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
_GEMMA_TOKENS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
_LLAMA_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_PHI_TOKENS = ("<s>", "<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
PUBLISHED = (
    Published("chatml", "bytes", _CHATML_TOKENS, None, "<|im_end|>", _chatml),
    Published("llama_3_1", "bytes", _LLAMA_TOKENS, "<|begin_of_text|>", "<|eot_id|>", _llama_3_1),
    Published("qwen_2_5", "bytes", _CHATML_TOKENS, None, "<|im_end|>", _qwen_2_5),
    Published("qwen_3", "bytes", _CHATML_TOKENS, None, "<|im_end|>", _qwen_3),
    Published("gemma_2", "sentencepiece", _GEMMA_TOKENS, "<bos>", "<eos>", _gemma, takes_system=False),
    Published("gemma_3", "sentencepiece", _GEMMA_TOKENS, "<bos>", "<eos>", _gemma),
    Published(
        "mistral_v0_3",
        "sentencepiece",
        ("<s>", "</s>", "[INST]", "[/INST]"),
        "<s>",
        "</s>",
        _mistral,
        takes_system=False,
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
