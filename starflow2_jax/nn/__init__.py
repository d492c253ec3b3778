"""Building blocks; they know no model."""
