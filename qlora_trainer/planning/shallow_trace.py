"""A training step over a few of a model's layers, traced once: the parts that every deeper step is made of.

The layers are the first one, whose input needs no gradient, and one more of each kind (windowed or full attention,
with which adapters, below or above the first adapter, ...); they are traced recomputed, and kept or offloaded when
somebody asks for that. `price` puts the parts together for any depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from qlora_trainer.model.activation_policy import tile_layers, tile_tokens_of
from qlora_trainer.model.adapters import trainable_parameters
from qlora_trainer.model.lora_settings import LoraSettings
from qlora_trainer.model.offload import keep_least
from qlora_trainer.planning.dry_model import DryModel, attach_dry_adapters, dry_store, layer_kinds, only_layers
from qlora_trainer.planning.inside import ATTENTION, IN_PARTS, LOSS, inside_bytes
from qlora_trainer.planning.timeline import EMPTY_SEGMENT, Probe, Segment, choose_probe, read_segments
from qlora_trainer.planning.tracker import StorageTracker, TensorSpec
from qlora_trainer.planning.work import NO_WORK, WorkSum, sum_work
from qlora_trainer.step.batch import MicroBatch
from qlora_trainer.step.train_step import accumulate_gradients, evaluate

Policy = Literal["offload", "recompute", "keep"]
_ATTENTION_PASSES = dict(zip((*ATTENTION, *IN_PARTS), 2 * (1.0, 2.5), strict=True))  # backward: 2.5 (Dao, 2023)
# What attention in parts starts on a GPU for a document, or a head of one: the kernel, and its result put in place; two
# products, forward's kernel again, backward's four and three results.
_PART_LAUNCHES = dict(zip(IN_PARTS, (2, 10), strict=True))


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One layer's share of a step.

    Attributes:
        forward, backward: what it allocates; backward is empty below the first adapter, where no gradient arrives.
        forward_work, backward_work: what it computes.
        query_spec: what attention is given first; heads are its second dimension, a head's size is its last.
        attention_passes: how often attention's forward is computed, or what takes as long.
        part_launches: where attention goes part by part, operations that compute, of each part.
        num_parts: that a document longer than a run has (see `attention_in_parts`).
    """

    forward: Segment
    backward: Segment
    forward_work: WorkSum
    backward_work: WorkSum
    query_spec: TensorSpec
    attention_passes: float
    part_launches: int
    num_parts: int


@dataclass(frozen=True, slots=True)
class PolicyParts:
    """A training step whose layers all have one policy.

    Attributes:
        embed, loss: before the first layer, and from the last layer's output to its gradient.
        embed_work, loss_work: what they compute.
        layers: (kind, is first layer) -> parts.
        head_spec: what the loss is given: hidden states and the output projection.
        dropped_bytes: made before the first layer, dropped in the loss.
    """

    embed: Segment
    loss: Segment
    embed_work: WorkSum
    loss_work: WorkSum
    layers: Mapping[tuple[int, bool], LayerParts]
    head_spec: tuple[TensorSpec, TensorSpec]
    dropped_bytes: int


@dataclass(frozen=True, slots=True)
class StepParts:
    """What a training step is made of.

    Attributes:
        probe: where it was traced.
        kinds: the kind of each layer of the whole model.
        evaluation: an evaluation over the same few layers, without gradients.
        of: the parts of a step, by what its layers keep; traced when it is first asked for.
    """

    probe: Probe
    kinds: tuple[int, ...]
    evaluation: Segment
    of: Callable[[Policy], PolicyParts]

    @property
    def head_spec(self) -> tuple[TensorSpec, TensorSpec]:
        return self.of("recompute").head_spec

    def of_layer(self, index: int, policy: Policy) -> LayerParts:
        return self.of(policy).layers[self.kinds[index], index == 0]

    def drops_input(self, policy: Policy) -> bool:
        """Whether the first layer's input is dropped before the loss: where it is kept, which needs it no more then,
        or offloaded, but not where it is recomputed."""
        return self.of(policy).dropped_bytes > self.of("recompute").dropped_bytes


def trace_step(
    dry: DryModel,
    settings: LoraSettings,
    *,
    adapter_dtype: torch.dtype,
    pulling: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> StepParts:
    """Trace a step over a few layers of `dry`.

    Args:
        dry: the whole model, without adapters.
        settings: of the adapters. One rank for all does not matter; where a pattern gives some another, they are traced
            as they are, and the parts are those of this rank alone.
        adapter_dtype: what the adapters are held in.
        pulling: while one of these is entered, `dry` is as the step is to have it.

    Where layers take tokens in tiles, of whatever size, they are traced at tiles of the probe's.
    """
    names = layer_kinds_with_targets(dry, settings)
    numbers = {kind: number for number, kind in enumerate(dict.fromkeys(names))}
    kinds = tuple(numbers[name] for name in names)
    indices = [0, *(next(i for i in range(1, len(kinds)) if kinds[i] == kind) for kind in dict.fromkeys(kinds[1:]))]
    probe = choose_probe(size for sizes in dry.resident.values() for size in sizes)
    probe = replace(probe, has_rank=not settings.rank_pattern)

    @contextmanager
    def probing() -> Iterator[Probe]:
        with pulling():
            tile_tokens = tile_tokens_of(dry.model)
            if tile_tokens:
                tile_layers(dry.model, probe.tile)
            yield replace(probe, has_tile=tile_tokens > 0)
            tile_layers(dry.model, tile_tokens)

    with probing() as own:
        recomputed = _trace(dry, settings, indices, kinds, "recompute", own, adapter_dtype)
        evaluation = _trace_evaluation(dry, indices, own)  # with the same adapters

    @cache
    def of(policy: Policy) -> PolicyParts:
        if policy == "recompute":
            return recomputed
        with probing() as own:
            return _trace(dry, settings, indices, kinds, policy, own, adapter_dtype)

    return StepParts(own, kinds, evaluation, of)


def layer_kinds_with_targets(dry: DryModel, settings: LoraSettings) -> list[tuple[str, ...]]:
    """`layer_kinds`, told apart also by what is trained of its linears, and by what gradients it sees.

    That is the rank of an adapter (0 for none), and whether the bias is trained; of norms, what is trained.
    """
    targets, biases, norms = set(settings.targets), set(settings.biases), set(settings.norms)
    names = {id(part): name for name, part in {**dry.model.linears, **dry.model.norms}.items()}
    trained = {
        name: (settings.rank_of(name) * (name in targets), name in biases, name in norms) for name in names.values()
    }
    trained_of = [[trained[names[id(part)]] for part in layer.modules() if id(part) in names] for layer in dry.layers]
    first = next((index for index, own in enumerate(trained_of) if any(map(any, own))), 0)
    chosen = []
    for index, kind in enumerate(layer_kinds(dry)):
        # No gradient reaches what is below the first that is trained, and that layer's own input needs none.
        place = "below" if index < first else "first" if index == first else "above"
        chosen.append((*kind, str(trained_of[index]), place))
    return chosen


def _trace(
    dry: DryModel,
    settings: LoraSettings,
    indices: Sequence[int],
    kinds: Sequence[int],
    policy: Policy,
    probe: Probe,
    adapter_dtype: torch.dtype,
) -> PolicyParts:
    tracker = StorageTracker(
        device_type=dry.model.device.type, inside=inside_bytes, record_work=True, results=dry.results
    )
    probed = replace(settings, rank=probe.rank) if probe.has_rank else settings
    with dry.fake_mode, only_layers(dry, indices) as chosen:
        own, in_layers = ({id(part) for layer in layers for part in layer.modules()} for layers in (chosen, dry.layers))
        parts = {**dry.model.linears, **dry.model.norms}
        gone = {name for name, part in parts.items() if id(part) in in_layers - own}
        targets, biases, norms = (
            tuple(name for name in names if name not in gone) for names in (probed.targets, probed.biases, probed.norms)
        )
        with dry.results:
            attach_dry_adapters(dry, replace(probed, targets=targets, biases=biases, norms=norms), dtype=adapter_dtype)
            for parameter in trainable_parameters(dry.model).values():
                parameter.grad = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
            num_recomputed = 0 if policy == "keep" else len(indices)
            keep_least(dry.model, num_recomputed, num_recomputed if policy == "offload" else 0, dry_store(dry))
            dry.model.module.train()
            micro_batch = full_micro_batch(probe.tokens, (probe.tokens,), dry.model.device)
        with tracker, marking(tracker, chosen, dry.final_norm), in_one_thread():
            accumulate_gradients(
                dry.model, [micro_batch], num_supervised_tokens=probe.tokens, loss_chunk_tokens=probe.tokens
            )
            tracker.mark("end")
    segments, work = read_segments(tracker, probe), sum_work(tracker, probe)
    given = next(inside.arguments for _, inside in segments["loss"].insides if inside.op == LOSS)
    return PolicyParts(
        embed=segments["embed"],
        loss=segments["loss"],
        embed_work=work["embed"],
        loss_work=work["loss"],
        layers={(kinds[index], index == 0): _layer_parts(place, segments, work) for place, index in enumerate(indices)},
        head_spec=(given[0], given[2]),
        dropped_bytes=tracker.events.bytes_between("embed", "loss"),
    )


def _layer_parts(place: int, segments: Mapping[object, Segment], work: Mapping[object, WorkSum]) -> LayerParts:
    forward, backward = segments["forward", place], segments.get(("backward", place), EMPTY_SEGMENT)
    attended = [inside for _, inside in (*forward.insides, *backward.insides) if inside.op in _ATTENTION_PASSES]
    return LayerParts(
        forward=forward,
        backward=backward,
        forward_work=work["forward", place],
        backward_work=work.get(("backward", place), NO_WORK),
        query_spec=next(inside.arguments[0] for inside in attended if inside.op in (ATTENTION[0], IN_PARTS[0])),
        attention_passes=sum(_ATTENTION_PASSES[inside.op] for inside in attended),
        part_launches=sum(_PART_LAUNCHES.get(inside.op, 0) for inside in attended),
        num_parts=attended[0].arguments[1].shape[1],
    )


def _trace_evaluation(dry: DryModel, indices: Sequence[int], probe: Probe) -> Segment:
    """Nothing is kept without gradients, so a few layers need as much as all of them. The adapters of before serve."""
    tracker = StorageTracker(device_type=dry.model.device.type, inside=inside_bytes, results=dry.results)
    with dry.fake_mode, only_layers(dry, indices):
        micro_batch = full_micro_batch(probe.tokens, (probe.tokens,), dry.model.device)
        with tracker:
            tracker.mark("eval")
            evaluate(dry.model, [micro_batch], loss_chunk_tokens=probe.tokens)
            del micro_batch
    return read_segments(tracker, probe)["eval"]


def full_micro_batch(
    num_tokens: int, document_lengths: Sequence[int], device: torch.device, *, rows: int = 1
) -> MicroBatch:
    """A micro-batch in the worst case: no padding, every token supervised. Under a fake mode it has no values.

    With more than one row, each holds one document, and `num_tokens` is cut to whole rows.
    """

    def whole(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    return MicroBatch(
        input_ids_BT=whole(rows, num_tokens // rows),
        position_ids_BT=whole(rows, num_tokens // rows),
        document_lengths=tuple(document_lengths) if rows == 1 else (num_tokens // rows,),
        source_positions_N=whole(num_tokens),
        targets_N=whole(num_tokens),
        row_keys_T=whole(num_tokens),
        num_tokens=num_tokens,
    )


def in_one_thread() -> AbstractContextManager[None]:
    """Autograd runs here, not in a thread of the device: that lets go of its last tensors when it comes to it.

    Whether one of them was still there when a step went on was a matter of luck, and a tile's gradient more in a peak.
    """
    return torch.autograd.set_multithreading_enabled(False)


@contextmanager
def marking(tracker: StorageTracker, layers: Sequence[nn.Module], final_norm: nn.Module) -> Iterator[None]:
    """While active, layers mark their forward and backward in the tracker, and what they recompute.

    Marks: "embed", ("forward", 0), ..., "loss", ("backward", last), ..., ("backward", 0). A layer's forward lasts until
    the next module begins, since only then the caller lets go of what went into the layer.
    """

    def before(place: int) -> Any:
        return lambda *_: tracker.mark(("forward", place))

    def after(place: int) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            hidden = out[0] if isinstance(out, tuple) else out
            if hidden.requires_grad:
                hidden.register_hook(lambda _: tracker.mark(("backward", place)))

        return hook

    tracker.mark("embed")
    with ExitStack() as stack:
        for place, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(before(place)).remove)
            stack.callback(layer.register_forward_hook(after(place)).remove)
            stack.enter_context(_noting_recomputation(tracker, layer))
        stack.callback(final_norm.register_forward_pre_hook(lambda *_: tracker.mark("loss")).remove)
        yield


@contextmanager
def _noting_recomputation(tracker: StorageTracker, layer: nn.Module) -> Iterator[None]:
    """While active, what `layer` makes when it is computed again counts as `recompute`."""
    checkpoint = layer.__dict__.get("_gradient_checkpointing_func")
    if checkpoint is None:
        yield
        return

    def noted(function: Any, *args: Any, **kwargs: Any) -> Any:
        def run(*inner_args: Any, **inner_kwargs: Any) -> Any:
            if torch._C._current_graph_task_id() == -1:  # autograd is not running: this is the forward itself
                return function(*inner_args, **inner_kwargs)
            with tracker.as_category("recompute"):
                return function(*inner_args, **inner_kwargs)

        return checkpoint(run, *args, **kwargs)

    layer.__dict__["_gradient_checkpointing_func"] = noted
    try:
        yield
    finally:
        layer.__dict__["_gradient_checkpointing_func"] = checkpoint
