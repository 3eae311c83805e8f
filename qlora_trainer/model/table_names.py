"""Embeddings, head and norms of a base by name: what `modules_to_save` may name, and what it means of tied tables.

transformers models that tie both have one table. PEFT trains a copy of either for itself, which unties them, unless
`ensure_weight_tying` is set: then one copy serves both. Here a run does so where `lora.untie_tables` says it, and
trains one table for both elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qlora_trainer.errors import ConfigError

_KEY, _HEAD_KEY, _UNTIES_KEY = "lora.modules_to_save", "quantization.head", "lora.untie_tables"


@dataclass(frozen=True, slots=True)
class BaseTables:
    """The tables of a base over its vocabulary, and its norms.

    Attributes:
        embeddings: full names, the input embedding first.
        head: full name of the output projection.
        is_tied: the head has no table of its own, but the input embedding's.
        norms: full names of those that have a weight, in model order.
    """

    embeddings: tuple[str, ...]
    head: str
    is_tied: bool
    norms: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Of the tables, in model order."""
        return (*self.embeddings, self.head)


def asked_tables(
    wanted: Sequence[str], tables: BaseTables, *, unties: bool = False
) -> tuple[tuple[str, ...], str | None]:
    """What `lora.modules_to_save` means of the tables of a base.

    Args:
        wanted: full names, or their ends after a dot.
        tables: of the base.
        unties: of one that ties two, each that is trained becomes a table of its own.

    Returns:
        Full names of what gets a table of its own that is trained, and the head that uses that of the embedding, too.

    Raises:
        ConfigError: a name means neither a table nor a norm, or one of two tables that the base ties; or nothing is
            there to be untied.
    """
    for name in wanted:
        if not any(means(name, own) for own in (*tables.names, *tables.norms)):
            leaves = dict.fromkeys(_leaf(own) for own in (*tables.names, *tables.norms))
            raise ConfigError(
                where=_KEY,
                found=f"{name!r}, which names no embedding, head or norm of this base",
                expected=f"a list out of: {', '.join(leaves)}",
                fix=f"Correct {_KEY}.",
            )
    chosen = tuple(own for own in tables.names if any(means(name, own) for name in wanted))
    both = (tables.embeddings[0], tables.head)
    tied = [name for name in both if name in chosen] if tables.is_tied else []
    if unties and not tied:
        raise ConfigError(
            where=_UNTIES_KEY,
            found="true, and no table that the base ties is trained",
            expected=f"a base that ties embedding and head, and one of them in {_KEY}",
            fix=f"Leave {_UNTIES_KEY} out.",
        )
    if unties:
        return chosen, None
    if len(tied) == 1:
        raise ConfigError(
            where=_KEY,
            found=f"{_leaf(tied[0])} alone, of a base in which embedding and head are one table",
            expected="both, which are trained as the one table that they are, or neither",
            fix=f"Write {_KEY}: [{', '.join(map(_leaf, both))}], or {_UNTIES_KEY}: true.",
        )
    return (chosen[:-1], tables.head) if tied else (chosen, None)


def asked_norms(wanted: Sequence[str], tables: BaseTables) -> tuple[str, ...]:
    """The norms that `lora.modules_to_save` means, by full name in model order."""
    return tuple(own for own in tables.norms if any(means(name, own) for name in wanted))


def require_nf4_head(head: str, *, is_tied: bool, trained: Sequence[str] = ()) -> None:
    """Refuse `quantization.head: nf4` where there is no frozen head of its own to be packed.

    Args:
        head: full name of the output projection.
        is_tied: it is the embedding, whose rows are looked up in bf16: packed, it would be a second table.
        trained: full names of the tables that are trained whole.

    Raises:
        ConfigError: the head is the embedding, or is trained.
    """
    fix = f"Leave {_HEAD_KEY} at bfloat16"
    if is_tied:
        raise ConfigError(
            where=_HEAD_KEY,
            found="nf4, of a base in which embedding and head are one table",
            expected="a base with a head of its own: beside the embedding, one in NF4 would take memory, not save it",
            fix=f"{fix}, or choose another base.",
        )
    if head in trained:
        raise ConfigError(
            where=_HEAD_KEY,
            found=f"nf4, and {_leaf(head)} in {_KEY}",
            expected="a head that is trained in 16 bits or more, or one that is stored in NF4 and frozen",
            fix=f"{fix}, or take {_leaf(head)} out of {_KEY}.",
        )


def require_frozen_tables(trained: Sequence[str]) -> None:
    """Refuse `memory.embedding_residency: host` where a table is trained.

    Args:
        trained: full names of the tables that are trained whole.

    Raises:
        ConfigError: there are some.
    """
    if trained:
        raise ConfigError(
            where="memory.embedding_residency",
            found=f"host, and {', '.join(map(_leaf, trained))} in {_KEY}",
            expected=f"auto or device, since {_KEY} trains a table, which stays where it is trained",
            fix="Correct memory.embedding_residency.",
        )


def means(name: str, own: str) -> bool:
    """Whether `name` is a full name, or its end after a dot."""
    return own == name or own.endswith("." + name)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
