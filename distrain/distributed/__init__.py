"""Ranks: their process group and collectives, compute threads and numerics."""
