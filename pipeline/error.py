"""The exceptions that a person reads: what to mend, and where a stopped command goes on."""


class UserError(Exception):
    """Something the user can mend: each problem is `what, with the value: what fixes it`.

    Raised anywhere, printed in one place only (`pipeline.command.boundary`), one `error:` line a problem.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Stopped(KeyboardInterrupt):
    """A signal ended the command after its work was saved; `code` is the shell's for that signal."""

    def __init__(self, said: str, wish: int) -> None:
        super().__init__(said)
        self.code = 128 + wish
