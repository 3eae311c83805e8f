"""One process of `benchmarks.plan_accuracy`: a real run, or its resume, counted by torch's profiler or by the kernel.

    python -m benchmarks.plan_accuracy_run SPEC.json RESULT.json --part run|resume|profile

`profile` is both, one after the other: every allocation from the loading of the base on is read off torch.profiler's
memory events; the plan is made by then, and no dispatch mode is active. In the others nobody watches, and VmHWM is read
at each record; the kernel's mark is set back there (`/proc/self/clear_refs`), so that each part has a mark of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

# What `Preparing.what` begins with, and the name of the part that is over then.
ENDS = {"planning": "data", "quantizing": "plan", "loading": "cache", "rehearsing": "load"}
LOSS_OP = "qlora_trainer::chunked_cross_entropy"
BACKWARD_OP = "autograd::engine::evaluate_function"
MARK = "plan_accuracy:"
LAYERS_BACKWARD = "plan_accuracy, backward begins in the last layer"


def status_bytes() -> dict[str, int]:
    """The kernel's figures of this process: peak, resident, and of that what is anonymous or of files."""
    names = {"VmHWM": "peak", "VmRSS": "resident", "RssAnon": "anonymous", "RssFile": "file"}
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key in names:
            found[names[key]] = int(value.split()[0]) * 1024
    return found


def resident_base_bytes() -> int:
    """Resident bytes of the base's mapped files: of the `.safetensors` under XDG_CACHE_HOME."""
    found, is_base = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split(maxsplit=5)
        if not head[0].endswith(":"):
            is_base = is_of_cache(head[5] if len(head) > 5 else "")
        elif is_base and head[0] == "Rss:":
            found += int(head[1]) * 1024
    return found


def is_of_cache(path: str) -> bool:
    """Whether a mapping's file is a base's NF4 form."""
    return path.startswith(os.environ["XDG_CACHE_HOME"]) and path.endswith(".safetensors")


def paged_state_bytes() -> int:
    """Of the optimizer's state that is in a mapped file (see `hardware.paging`), in whole pages."""
    areas = (line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines())
    borders = (area[0].split("-") for area in areas if len(area) > 5 and "/.paged-" in area[5])
    return sum(int(end, 16) - int(first, 16) for first, end in borders)


def forget_peak() -> None:
    """Set VmHWM back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def parts_of_run(records: Iterator[Any], predicted: dict[str, Any], until_saved: int | None) -> Iterator[str]:
    """Runs it, and yields the name of each part of the run when it is over.

    Args:
        records: the run.
        predicted: what its plan says is put here.
        until_saved: stop, as a crash would, when the checkpoint of this step is there.
    """
    from qlora_trainer.run.records import Evaluated, Finished, Planned, Prepared, Preparing, Saved, StepDone

    for record in records:
        match record:
            case Preparing():
                yield next((part for start, part in ENDS.items() if record.what.startswith(start)), "")
            case Planned():
                predicted |= record.plan.predicted.as_json()
            case Prepared():
                yield "rehearsal"
            case Evaluated():
                yield "eval"
            case StepDone():
                yield "step"
            case Finished():
                yield "finish"
            case Saved():
                yield "save"
                if record.step == until_saved:
                    return


def run_and_profile(
    records: Iterator[Any], predicted: dict[str, Any], until_saved: int | None, *, is_resume: bool
) -> dict[str, int]:
    """Phase -> its allocated peak, as the profiler counts; steps are split further.

    Mapping a file counts as allocating all of it: paged state is taken off, as it is no part of a plan's allocated
    bytes.
    """
    from torch.profiler import ProfilerActivity, profile, record_function

    profiler = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    paged_bytes = 0
    is_counting = is_resume  # then no plan is made, and the checkpoint is opened first
    if is_counting:
        profiler.start()
    for part in parts_of_run(records, predicted, until_saved):
        paged_bytes = max(paged_bytes, paged_state_bytes())
        if is_counting:
            with record_function(MARK + part):
                pass
        elif part == "cache":
            is_counting = True
            profiler.start()
    profiler.stop()
    peaks = phase_peaks(profiler.profiler.kineto_results.experimental_event_tree())  # type: ignore[union-attr]
    return {phase: peak - paged_bytes for phase, peak in peaks.items() if is_resume or phase != "resume"}


def mark_last_layer(model: Any) -> Any:
    """Lets the profile show when the gradient reaches the last layer's output; returns `model`."""
    from torch.profiler import record_function

    from qlora_trainer.model.activation_policy import decoder_layers

    def on_gradient(_gradient: Any) -> None:
        with record_function(LAYERS_BACKWARD):
            pass

    def after(_module: Any, _args: Any, out: Any) -> None:
        hidden = out[0] if isinstance(out, tuple) else out
        if hidden.requires_grad:
            hidden.register_hook(on_gradient)

    decoder_layers(model)[-1].register_forward_hook(after)
    return model


def phase_peaks(roots: Sequence[Any]) -> dict[str, int]:
    """Phase -> most bytes alive in it, from the profiler's event tree; allocations before the profile are not in it."""
    from torch._C._profiler import _EventType

    events = []  # (nanoseconds, what, bytes)
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        waiting.extend(event.children)
        if event.tag == _EventType.Allocation:
            if event.extra_fields.device.type == "cpu":
                events.append((event.start_time_ns, "", event.extra_fields.alloc_size))
        elif event.name.startswith(MARK):
            events.append((event.start_time_ns, event.name.removeprefix(MARK), 0))
        elif event.name == LOSS_OP:
            events.append((event.end_time_ns, "loss", 0))
        elif event.name == LAYERS_BACKWARD:
            events.append((event.start_time_ns, "backward begins", 0))
        elif event.name.startswith(BACKWARD_OP):
            events.append((event.end_time_ns, "backward", 0))
    events.sort(key=lambda event: event[0])
    return _read_phases(events)


def _read_phases(events: Sequence[tuple[int, str, int]]) -> dict[str, int]:
    """What stands between two marks belongs to the phase that the second one ends."""
    peaks: dict[str, int] = {}
    live = peak = 0
    levels = [0]  # since the last mark
    is_loss_open = False  # until backward reaches the layers: the plan counts what is before them with the loss
    pending: dict[str, int] = {}  # parts of what turns out to be a step, or an evaluation

    def close(phase: str, into: dict[str, int]) -> None:
        nonlocal peak
        into[phase] = max(into.get(phase, 0), peak)
        peak = live
        levels[:] = [live]

    for _, mark, num_bytes in events:
        live += num_bytes
        peak = max(peak, live)
        levels.append(live)
        if mark == "loss":
            is_loss_open = True
            levels[:] = [live]
        elif mark == "backward begins":
            if is_loss_open:
                close("loss", pending)
            is_loss_open = False
        elif mark == "backward" and not is_loss_open:
            close(mark, pending)
        elif mark == "step":
            close("optimizer", pending)
            peaks |= {phase: max(peaks.get(phase, 0), value) for phase, value in pending.items()}
            pending = {}
        elif mark and mark != "backward":
            if mark == "rehearsal":
                # The evaluation lets go of everything; then the state is set back, and then read.
                peaks["resume"] = max(levels[levels.index(min(levels)) :])
            peak = max(peak, *pending.values(), 0)
            pending = {}
            close(mark, peaks)
    return peaks


def run_and_read_kernel(records: Iterator[Any], predicted: dict[str, Any], until_saved: int | None) -> dict[str, Any]:
    """Part -> the kernel's figures at its end, `peak` being the part's own; `base`: resident of the base's files."""
    figures: dict[str, Any] = {"imported": status_bytes()}
    forget_peak()
    for part in parts_of_run(records, predicted, until_saved):
        now = status_bytes() | {"base": resident_base_bytes()}
        before = figures.get(part, {"peak": 0})
        figures[part] = now if now["peak"] >= before["peak"] else before
        forget_peak()
    figures["children"] = {"peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024}
    return figures


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what SPEC says; the figures go to RESULT."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plan_accuracy_run")
    parser.add_argument("spec", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--part", choices=("run", "resume", "profile"), required=True)
    chosen = parser.parse_args(arguments)
    spec = json.loads(chosen.spec.read_text())

    from qlora_trainer.config.load import load_config
    from qlora_trainer.run import prepare
    from qlora_trainer.run.loop import train

    if chosen.part == "profile":
        load = vars(prepare)["load_quantized"]
        setattr(prepare, "load_quantized", lambda *args, **options: mark_last_layer(load(*args, **options)))  # noqa: B010
    config = load_config(None, spec["overrides"])
    predicted: dict[str, Any] = {}
    measured: dict[str, Any] = {}
    for part in ("run", "resume") if chosen.part == "profile" else (chosen.part,):
        is_resume = part == "resume"
        records = train(config, resume="auto" if is_resume else None)
        until_saved = None if is_resume else spec["stop_after_step"]
        if chosen.part == "profile":
            measured[part] = run_and_profile(records, predicted, until_saved, is_resume=is_resume)
        else:
            measured[part] = run_and_read_kernel(records, predicted, until_saved)
        records.close()  # type: ignore[attr-defined]  # it is a generator, and holds the run folder's lock
        gc.collect()  # a model that is let go of during the next part would count as less than nothing there
    chosen.result.write_text(json.dumps({"predicted": predicted, "measured": measured}))


if __name__ == "__main__":
    main()
