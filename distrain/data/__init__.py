"""Samples: their order, storage, decoding, augmentation and loading."""
