"""The parts of a training run: what is set up, done and checked."""
