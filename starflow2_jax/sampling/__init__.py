"""Sampling: one pass, left to right, text and images over the same caches."""
