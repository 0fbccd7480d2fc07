"""What a person reads of a failure: what to fix, where a stopped command resumes, and what a library said of it."""


class UserError(Exception):
    """Something the user can fix: each problem is `what, with the value: what fixes it`.

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


def reason(error: Exception) -> str:
    """What a library says in its last line, short enough for a message of one line."""
    said = [line.strip() for line in str(error).splitlines() if line.strip()]
    return said[-1][:200] if said else type(error).__name__
