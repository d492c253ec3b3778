"""What an evaluation shows on the terminal."""

import pathlib
from collections.abc import Callable


def print_summary(summary: dict, path: pathlib.Path) -> None:
    """Prints the numbers of a summary, one a line, with dots for what is nested; and its place."""

    def show(values: dict, prefix: str) -> None:
        for name, value in values.items():
            if isinstance(value, dict):
                show(value, f"{prefix}{name}.")
            elif isinstance(value, float):
                print(f"{prefix}{name} {value:.5g}")

    show(summary, "")
    print(f"wrote {path}")


def progress_of(name: str) -> Callable[[int, int], None]:
    """Shows the first process's records on the terminal, from the first that are done."""
    import jax

    from starflow2_jax.metrics import Progress

    progress: list[Progress] = []

    def on_progress(done: int, total: int) -> None:
        if not progress:
            enabled = jax.process_index() == 0
            progress.append(Progress(name, total, unit="records", enabled=enabled))
        progress[0].update(done, {})

    return on_progress
