"""Ranks, and how they compute the same."""
