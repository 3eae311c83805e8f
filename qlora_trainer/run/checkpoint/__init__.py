"""Checkpoints on disk: committed atomically, verified before use."""
