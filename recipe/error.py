"""The one exception that a person reads."""


class UserError(Exception):
    """Something the user can mend: each problem is `what, with the value: what fixes it`.

    Raised anywhere, printed in one place only (`recipe.command.boundary`), one `error:` line a problem.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems
