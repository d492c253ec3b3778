"""STARFlow2 in JAX: one causal mechanism that writes text and draws images with exact likelihoods."""

__version__ = "0.1.0"
