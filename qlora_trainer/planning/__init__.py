"""What a run needs before it starts: its own step, run on fake tensors, priced and searched."""
