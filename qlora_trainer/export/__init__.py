"""What leaves a run: adapters as PEFT, portable and GGUF files, and merged models."""
