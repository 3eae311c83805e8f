"""QLoRA fine-tuning that fits the memory you have and loses nothing when it is interrupted."""

__version__ = "0.1.0"
