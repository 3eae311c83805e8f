"""Did the quickstart learn, in the memory it promises? Reads the run folder; needs nothing but Python."""

import json
import sys
from pathlib import Path

MAX_PEAK_BYTES = 2 * 2**30
MIN_LOSS_DROP = 0.30

run = Path(sys.argv[1])
summary = json.loads((run / "summary.json").read_text())
drop = 1 - summary["eval_loss_after"] / summary["eval_loss_before"]
print(f"eval loss {summary['eval_loss_before']:.3f} -> {summary['eval_loss_after']:.3f} ({drop:.1%} lower)")
print(f"peak memory {summary['process_peak_bytes'] / 2**20:.0f} MiB, trained in {summary['train_seconds']:.0f} s")
failures = [
    text
    for text, is_met in {
        "the run is not done": summary["status"] == "done",
        f"the held-out loss fell by less than {MIN_LOSS_DROP:.0%}": drop >= MIN_LOSS_DROP,
        f"peak memory is above {MAX_PEAK_BYTES} bytes": summary["process_peak_bytes"] < MAX_PEAK_BYTES,
        "no adapter was written": (run / "adapter" / "adapter_model.safetensors").is_file(),
    }.items()
    if not is_met
]
sys.exit("; ".join(failures) or None)
