"""The tensor side of every phase: train, evaluate, hand state out, take it back."""
