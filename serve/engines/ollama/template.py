"""A chat template in Ollama's language, Go's text/template, found by asking the Jinja template and proved equal to it.

Ollama replaces a Jinja template that is less than 100 edits away from one of its own by a Go template that may say
something else (its `template/template.go`, `Named`); one that is given with the model is never replaced.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

Messages = list[dict[str, str]]
Render = Callable[[Messages, bool], str]


ROLES = ("system", "user", "assistant")
# Words that no template contains; letters only, as a template may strip or change anything else.
SYSTEM, ASKED, ANSWERED, AGAIN = "Qsystemword", "Qaskedword", "Qanswerword", "Qagainword"


class Refused(Exception):
    """The template does not take these messages, or has an error."""


def renderer(template: str, bos: str, eos: str) -> Render:
    """A function of messages and whether the assistant's turn is opened (transformers `chat_template_utils.py`).

    Raises:
        Refused: the template is no Jinja; the function raises it for messages that the template refuses.
    """
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, **layout: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **layout)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": lambda f: datetime.now().strftime(f)}
    errors = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
    try:
        compiled = environment.from_string(template)
    except errors as error:
        raise Refused(str(error)) from None

    def render(messages: Messages, prompt: bool) -> str:
        try:
            return compiled.render(messages=messages, add_generation_prompt=prompt, bos_token=bos, eos_token=eos)
        except errors as error:
            raise Refused(str(error)) from None

    return render


@dataclass(frozen=True)
class Shape:
    """Text around messages: `opening` by whether a system message is first, `turns` by role, `answer` at the end."""

    opening: dict[bool, str]
    turns: dict[str, tuple[str, str]]
    answer: str

    def render(self, messages: Messages) -> str:
        """What `go` writes, by Python."""
        text = self.opening[messages[0]["role"] == "system"]
        for message in messages:
            head, tail = self.turns[message["role"]]
            text += head + message["content"] + tail
        return text + self.answer

    def go(self) -> str:
        """The Go template: no white space but its text's own, so that no trim marker is needed."""
        with_system, without = self.opening[True], self.opening[False]
        always = _shared(with_system, without)
        with_system, without = with_system[len(always) :], without[len(always) :]
        first = ""
        if with_system:
            first = f'{{{{ if eq .Role "system" }}}}{_text(with_system)}{{{{ else }}}}{_text(without)}{{{{ end }}}}'
            first = f"{{{{ if eq $i 0 }}}}{first}{{{{ end }}}}"
        elif without:
            first = f'{{{{ if and (eq $i 0) (ne .Role "system") }}}}{_text(without)}{{{{ end }}}}'
        loop = f"{{{{ range $i, $message := .Messages }}}}{first}{self._turn()}{{{{ end }}}}"
        return f"{_text(always)}{loop}{_text(self.answer)}"

    def _turn(self) -> str:
        """One text for all roles where only the role's name differs, else a case each."""
        head, tail = self.turns["user"]
        before, named, after = head.rpartition("user")
        if named and all(turn == (f"{before}{role}{after}", tail) for role, turn in self.turns.items()):
            return f"{_text(before)}{{{{ .Role }}}}{_text(after)}{{{{ .Content }}}}{_text(tail)}"
        cases = [
            f'if eq .Role "{role}" }}}}{_text(head)}{{{{ .Content }}}}{_text(tail)}'
            for role, (head, tail) in self.turns.items()
        ]
        return "{{ " + "{{ else ".join(cases) + "{{ end }}"


def _shared(one: str, other: str) -> str:
    """What both texts begin with."""
    differing = (at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return one[: next(differing, min(len(one), len(other)))]


def _text(text: str) -> str:
    """Text as it stands in a Go template; a brace could open an action together with the next one."""
    return text.replace("{", '{{ "{" }}')


def compile_shape(render: Render) -> Shape | None:
    """The shape that renders everything as the Jinja template does; None if it says more than a shape can."""
    try:
        shape = _probe(render)
        same = shape is not None and all(shape.render(each) == render(each, True) for each in conversations())
    except (Refused, ValueError):
        return None
    return shape if same else None


def _probe(render: Render) -> Shape | None:
    """Cut rendered conversations at their words, and what stands between two words at what one of them has alone."""
    asked, answered = _message("user", ASKED), _message("assistant", ANSWERED)
    again, system = _message("user", AGAIN), _message("system", SYSTEM)
    first, user_tail = _cut(render([asked], False), ASKED)
    answer = _after(_cut(render([asked], True), ASKED)[1], user_tail)
    _, between, back, _ = _cut(render([asked, answered, again], False), ASKED, ANSWERED, AGAIN)
    assistant_head = _after(between, user_tail)
    _, _, assistant_tail = _cut(render([asked, answered], False), ASKED, ANSWERED)
    user_head = _after(back, assistant_tail)
    _, _, to_system, system_tail, _ = _cut(
        render([asked, answered, system, again], False), ASKED, ANSWERED, SYSTEM, AGAIN
    )
    system_head = _after(to_system, assistant_tail)
    system_tail = _before(system_tail, user_head)
    led = _cut(render([system, asked], False), SYSTEM, ASKED)[0]
    return Shape(
        opening={True: _before(led, system_head), False: _before(first, user_head)},
        turns={
            "system": (system_head, system_tail),
            "user": (user_head, user_tail),
            "assistant": (assistant_head, assistant_tail),
        },
        answer=answer,
    )


def conversations() -> list[Messages]:
    """What a compiled template must render as the Jinja template does: orders of roles, and awkward contents."""
    awkward = [
        "",
        " ",
        "  two, three   ",
        "\n\nlines\n\n",
        "{{ .Content }} {% if %} }}",
        "<|x|> </s> [INST]",
        "🙂 é\u0301\r\n\t",
    ]
    user, assistant, system = (lambda text, role=role: _message(role, text) for role in ("user", "assistant", "system"))
    found = [[user(text)] for text in awkward]
    found += [[system(text), user("ask")] for text in awkward]
    found += [[user("ask"), assistant(text), user(text)] for text in awkward]
    long = [message for turn in range(3) for message in (user(f"ask {turn}"), assistant(f"answer {turn}"))]
    found += [[*long, user("end")], [system("rules"), *long, user("end")]]
    found += [[*long, system("more rules"), user("end")], [system("rules"), *long, system("more"), user("end")]]
    return found


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _cut(text: str, *words: str) -> list[str]:
    """The pieces around words that follow one another.

    Raises:
        ValueError: a word is missing or comes twice.
    """
    pieces = []
    for word in words:
        if text.count(word) != 1:
            raise ValueError(f"{word} is not there once")
        piece, _, text = text.partition(word)
        pieces.append(piece)
    return [*pieces, text]


def _after(text: str, head: str) -> str:
    if not text.startswith(head):
        raise ValueError(f"{text!r} does not begin with {head!r}")
    return text[len(head) :]


def _before(text: str, tail: str) -> str:
    if not text.endswith(tail):
        raise ValueError(f"{text!r} does not end with {tail!r}")
    return text[: len(text) - len(tail)]
