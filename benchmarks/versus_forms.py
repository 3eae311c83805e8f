"""The ways of running TRL's `SFTTrainer` that `versus_trl.py` chooses from, and the choice. No torch.

All of them would be 192. One axis after the other is tried from where the last one ended: what a document's rows look
like (micro-batch, batching and malloc together: padding ties the first two, and large micro-batches fault the most
pages), then everything else, compiling last: it takes minutes. What comes close to the best then runs longer. A form is
judged by the steps after the first one, in which large micro-batches pay for warming up what a run pays once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any, Literal

Batching = Literal["plain", "grouped", "packed"]
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
NO_MMAP = {"MALLOC_MMAP_MAX_": "0"}  # mallopt(3): large blocks come from the heap, whose pages are not mapped anew
VALUES: dict[str, tuple[Any, ...]] = {
    "micro_batch": (1, 2, 4, 8),
    "batching": ("plain", "grouped", "packed"),
    "is_recomputed": (False, True),
    "dtype": ("fp32", "bf16"),
    "is_compiled": (False, True),
    "is_without_mmap": (False, True),
}
# Each entry is an axis; the fields of one entry vary together.
SPEED_AXES = (("micro_batch", "batching", "is_without_mmap"), ("dtype",), ("is_recomputed",))
MEMORY_AXES = (("is_recomputed",), ("dtype",), ("batching",), ("is_without_mmap",))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One way to run the peer; the effective batch is the same in all.

    Attributes:
        micro_batch: rows of a forward pass: documents, or packed rows of the greatest length.
        batching: in the given order; documents of like lengths together; or several in a row (TRL's best fit).
        is_recomputed: activation checkpointing.
        dtype: of weights that are not quantized, activations and products.
        is_compiled: `torch_compile`.
        is_without_mmap: `MALLOC_MMAP_MAX_=0` in the environment.
    """

    micro_batch: int
    batching: Batching = "plain"
    is_recomputed: bool = False
    dtype: str = "fp32"
    is_compiled: bool = False
    is_without_mmap: bool = False

    @property
    def name(self) -> str:
        words = [str(self.micro_batch), self.batching, "recompute" if self.is_recomputed else "keep", self.dtype]
        words += ["compile"] * self.is_compiled + ["nommap"] * self.is_without_mmap
        return "-".join(words)

    @property
    def environment(self) -> dict[str, str]:
        return NO_MMAP if self.is_without_mmap else {}

    @property
    def is_in_our_order(self) -> bool:
        """Whether each step learns from the documents that ours learns from, and from them one by one."""
        return self.batching == "plain"

    def is_possible(self, documents_per_step: int, packs_per_step: int) -> bool:
        """Whether it differs from the others and the effective batch can be cut so."""
        if self.batching == "grouped" and self.micro_batch == 1:
            return False  # one document has no neighbours: the same as plain
        per_step = packs_per_step if self.batching == "packed" else documents_per_step
        return self.micro_batch <= per_step and per_step % self.micro_batch == 0


def parse_form(name: str) -> Form:
    """The form of that name.

    Raises:
        ValueError: no form is called so.
    """
    for values in product(*VALUES.values()):
        form = Form(**dict(zip(VALUES, values, strict=True)))
        if form.name == name:
            return form
    example = Form(micro_batch=8, batching="grouped", is_compiled=True, is_without_mmap=True).name
    raise ValueError(f"{name}: expected a form such as {example} or {Form(micro_batch=1, is_recomputed=True).name}")


def with_our_order(forms: Sequence[Form]) -> list[Form]:
    """The forms, and one document at a time in the given order if none of them keeps it.

    Grouping and packing learn in another order, and their losses differ by that alone.
    """
    return [*forms] if any(form.is_in_our_order for form in forms) else [*forms, Form(micro_batch=1)]


def packs_per_step(documents_per_step: int, mean_tokens: float, max_length: int) -> int:
    """Packed rows that hold about as many tokens as the documents of a step."""
    return max(1, round(documents_per_step * mean_tokens / max_length))


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What one run of a form took.

    Attributes:
        form: what was run.
        tokens_of_steps, seconds_of_steps: real tokens and wall time of each step done.
        import_bytes: resident after the imports.
        peak_bytes: VmHWM, whole process.
        error: why it did not end; "" if it did.
        num_tokens: of all its documents.
        eval_loss: held-out, where it was asked for.
    """

    form: Form
    tokens_of_steps: tuple[int, ...] = ()
    seconds_of_steps: tuple[float, ...] = ()
    import_bytes: int = 0
    peak_bytes: int = 0
    error: str = ""
    num_tokens: int = 0
    eval_loss: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """From the beginning of training to the end of the last step."""
        return sum(self.tokens_of_steps) / sum(self.seconds_of_steps) if self.seconds_of_steps else 0.0

    @property
    def later_tokens_per_second(self) -> float:
        """Of the steps after the first, which warms up and compiles."""
        later = sum(self.seconds_of_steps[1:])
        return sum(self.tokens_of_steps[1:]) / later if later else 0.0

    @property
    def taken_bytes(self) -> int:
        """Peak above what the imports left resident."""
        return self.peak_bytes - self.import_bytes

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {
            "form": self.form.name,
            "tokens_per_second": self.tokens_per_second,
            "later_tokens_per_second": self.later_tokens_per_second,
            "taken_bytes": self.taken_bytes,
        }


def slowness(trial: Trial) -> float:
    """Lower is better: seconds a token after the first step, which a longer run pays once."""
    speed = trial.later_tokens_per_second
    return 1 / speed if speed else float("inf")


def largeness(trial: Trial) -> float:
    """Lower is better: bytes above imports; a form that did not end may have needed more."""
    return float("inf") if trial.error or not trial.seconds_of_steps else trial.taken_bytes


def variants(form: Form, axis: Sequence[str]) -> Iterator[Form]:
    """The form with every other combination of values of these fields."""
    for values in product(*(VALUES[name] for name in axis)):
        other = replace(form, **dict(zip(axis, values, strict=True)))
        if other != form:
            yield other


def descend(
    start: Form,
    axes: Sequence[Sequence[str]],
    *,
    measure: Callable[[Form], Trial | None],
    is_possible: Callable[[Form], bool],
    badness: Callable[[Trial], float],
) -> Trial | None:
    """Take the best of each axis, one axis after the other.

    Args:
        start: where to begin.
        axes: fields of `Form` that vary together.
        measure: runs a form, or remembers; None when there is no time for another one.
        is_possible: forms for which this is false are passed over.
        badness: what is to be least.

    Returns:
        The best trial; None if not even the first could be run.
    """
    best = measure(start)
    for axis in axes:
        if best is None:
            return None
        for form in filter(is_possible, list(variants(best.form, axis))):
            trial = measure(form)
            if trial is not None and badness(trial) < badness(best):
                best = trial
    return best


def close_to_best(trials: Sequence[Trial], badness: Callable[[Trial], float], share: float) -> list[Form]:
    """The forms of the best trial and of up to two others that are worse by no more than this share; best first."""
    ended = sorted((trial for trial in trials if badness(trial) != float("inf")), key=badness)
    return [trial.form for trial in ended[:3] if badness(trial) <= (1 + share) * badness(ended[0])]


assert {field.name for field in fields(Form)} == VALUES.keys()
