"""Exceptions that end a command with one clear line instead of a traceback."""


class UserError(Exception):
    """Bad input or a bad environment, not a bug.

    The message is one line: what is wrong, where (file, record, key), what would be right. Commands
    print it behind `starflow2: error: ` and exit with 2; the traceback appears only where the
    environment has `STARFLOW2_TRACEBACK=1`.
    """


class Interrupted(Exception):
    """Training was asked to stop, and its state is saved.

    Attributes:
        stage: name of the stage that was running.
        step: the last finished, saved step of that stage.
    """

    def __init__(self, stage: str, step: int) -> None:
        super().__init__(stage, step)
        self.stage = stage
        self.step = step

    def __str__(self) -> str:
        return (
            f"interrupted at stage {self.stage} step {self.step}; saved; "
            "run the same command to continue"
        )
