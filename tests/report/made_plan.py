"""Made-up plans whose numbers are consistent: sums are sums, peaks are the largest."""

from __future__ import annotations

from dataclasses import replace

from qlora_trainer.planning.plan import Alternative, FrontierCell, LeverGain, Plan, PlanKnobs, Prediction, WouldFit

MIB, GIB = 2**20, 2**30

KNOBS = PlanKnobs(
    rank=16,
    alpha=32.0,
    seq_len=1024,
    micro_batch_tokens=2048,
    micro_batches_per_step=8,
    activation_keep_layers=22,
    activation_recompute_layers=8,
    loss_chunk=256,
    optimizer="adamw_8bit",
)
BREAKDOWN = {
    "base": 51 * MIB,
    "quant_state": 3 * MIB,
    "embedding": 108 * MIB,
    "adapter": 19 * MIB,
    "gradient": 19 * MIB,
    "optimizer": 10 * MIB,
    "saved_activation": 640 * MIB,
    "recompute": 96 * MIB,
    "logits": 144 * MIB,
    "dequant_workspace": 7 * MIB,
    "other": 1 * MIB,
}
PREDICTED = Prediction(
    allocated_peak_bytes=1098 * MIB,
    process_peak_bytes=1502 * MIB,
    worst_peak_bytes=1688 * MIB,
    host_peak_bytes=1502 * MIB,
    peak_phase="train_backward",
    breakdown=BREAKDOWN,
    resident={name: BREAKDOWN[name] for name in ("base", "quant_state", "embedding", "adapter", "optimizer")},
    phases={
        "load": 300 * MIB,
        "train_forward": 1002 * MIB,
        "train_backward": 1098 * MIB,
        "optimizer_step": 230 * MIB,
        "eval": 410 * MIB,
        "save": 210 * MIB,
    },
    tokens_per_second=1234.5,
)


def frontier(budget_bytes: int, tokens_per_second: float) -> tuple[FrontierCell, ...]:
    """What a model of one line gives: something fixed, something by rank and something by token."""
    cells = []
    for rank in (8, 16, 32, 64, 128):
        for seq_len in (256, 512, 1024, 2048, 4096, 8192):
            free_bytes = budget_bytes - 700 * MIB - rank * 3 * MIB
            documents = max(0, free_bytes // (seq_len * 400 * 1024))
            speed = tokens_per_second / (1 + rank / 256) / (1 + seq_len / 2048) * (1 - 0.2 / max(1, documents))
            cells.append(
                FrontierCell(
                    rank=rank,
                    seq_len=seq_len,
                    micro_batch_tokens=documents * seq_len,
                    tokens_per_second=speed if documents else 0.0,
                )
            )
    return tuple(cells)


def gains(budget_bytes: int) -> tuple[LeverGain, ...]:
    """The first two alone do not fit; what is streamed is slow."""
    made = (
        ((), 1.3, 0, 0.0),
        (("tile_tokens",), 1.1, 0, 0.0),
        (("base_residency",), 0.7, 3072, 345.0),
        (("tile_tokens", "base_residency"), 0.5, 8192, 456.0),
    )
    return tuple(
        LeverGain(levers=own, least_bytes=round(share * budget_bytes), longest_tokens=longest, tokens_per_second=speed)
        for own, share, longest, speed in made
    )


def fitting_plan() -> Plan:
    """A small model on a CPU; 546 MiB to spare."""
    alternative = Alternative(knobs=replace(KNOBS, rank=32), predicted=PREDICTED)
    return Plan(
        fits=True,
        model="smollm2-135m",
        device="cpu",
        budget_bytes=2 * GIB,
        host_budget_bytes=2 * GIB,
        knobs=KNOBS,
        predicted=PREDICTED,
        trainable_parameters=4_884_480,
        gave_up=("micro-batches of 2,048 tokens instead of 16,384", "8 of 30 layers recompute their activations"),
        alternatives=(alternative,),
        frontier=frontier(2 * GIB, 1500.0),
    )


def gpu_plan() -> Plan:
    """A large model with a long name on a GPU with a long name; the host has a budget of its own."""
    scale = 24
    predicted = Prediction(
        allocated_peak_bytes=PREDICTED.allocated_peak_bytes * scale,
        process_peak_bytes=PREDICTED.allocated_peak_bytes * scale + 900 * MIB,
        worst_peak_bytes=PREDICTED.allocated_peak_bytes * scale + 2000 * MIB,
        host_peak_bytes=5 * GIB,
        peak_phase=PREDICTED.peak_phase,
        breakdown={name: num_bytes * scale for name, num_bytes in BREAKDOWN.items()},
        resident={name: num_bytes * scale for name, num_bytes in PREDICTED.resident.items()},
        phases={name: num_bytes * scale for name, num_bytes in PREDICTED.phases.items()},
        tokens_per_second=18_432.0,
    )
    return replace(
        fitting_plan(),
        model="meta-llama/Llama-3.1-8B-Instruct",
        device="NVIDIA H100 80GB HBM3",
        budget_bytes=79 * GIB,
        host_budget_bytes=64 * GIB,
        knobs=replace(KNOBS, activation_keep_layers=32, activation_recompute_layers=0, optimizer="paged_adamw_32bit"),
        predicted=predicted,
        trainable_parameters=41_943_040,
        gave_up=(),
        frontier=frontier(4 * GIB, 25_000.0),
    )


def failing_plan() -> Plan:
    """The plan of `fitting_plan` in 1 GiB: 478 MiB are missing."""
    return replace(
        fitting_plan(),
        fits=False,
        budget_bytes=1 * GIB,
        host_budget_bytes=1 * GIB,
        alternatives=(),
        frontier=frontier(1 * GIB, 1500.0),
        missing_bytes=478 * MIB,
        would_fit=(
            WouldFit(knob="seq_len", before=1024, after=512, allocated_peak_bytes=420 * MIB),
            WouldFit(knob="memory.budget", before="1 GiB", after="1.65 GiB", allocated_peak_bytes=1098 * MIB),
        ),
    )


def host_failing_plan() -> Plan:
    """Room on the GPU, none in the host's memory."""
    return replace(gpu_plan(), fits=False, host_budget_bytes=3 * GIB, missing_bytes=2 * GIB, alternatives=())
