"""The device mesh, and which of its axes carry which axes of the arrays."""
