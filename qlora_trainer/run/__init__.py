"""One training run: its loop, its folder, its records."""
