"""The `starflow2` command."""
