"""Use of trained models: evaluation and prediction."""
