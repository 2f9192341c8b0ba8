"""Parts of a training run: its setup, its checks, and what it does beside its loop."""
