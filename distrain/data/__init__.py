"""Samples: their order, draws, storage, decoding and delivery."""
