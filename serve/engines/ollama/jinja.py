"""A chat template rendered as transformers renders it, in a sandbox, without importing transformers."""

import json
from collections.abc import Callable
from datetime import datetime
from typing import Any

Messages = list[dict[str, str]]
Render = Callable[[Messages, bool], str]


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
