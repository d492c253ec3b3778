"""What a run reports while it works: see `starflow2_jax.metrics`, which evaluation reads, too."""

from starflow2_jax.metrics import MetricsWriter, Progress, read_metrics

__all__ = ["MetricsWriter", "Progress", "read_metrics"]
