"""Ways to start the training function."""
