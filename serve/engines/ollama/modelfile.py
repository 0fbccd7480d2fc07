"""What Ollama is told of a model: its file, template, parameters and licence, as a request, a tag and a Modelfile."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TAG = r"[0-9a-f]{12}"


@dataclass(frozen=True)
class Modelfile:
    """`template` is Go, or None where the server is to render the GGUF's own; `sha256` is the GGUF's."""

    name: str
    gguf: Path
    sha256: str
    template: str | None
    parameters: dict[str, Any]
    licence: str | None

    @property
    def tag(self) -> str:
        """`name:<short hash>` of everything that makes the model, so that other bytes never have the same tag."""
        told = [self.sha256, self.template, self.parameters, self.licence]
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, ensure_ascii=False).encode()).hexdigest()
        return f"{self.name}:{digest[:12]}"

    @property
    def latest(self) -> str:
        """The tag that moves."""
        return f"{self.name}:latest"

    def request(self) -> dict[str, Any]:
        """Arguments of the official client's `create`."""
        given = {"template": self.template, "license": self.licence}
        return {
            "model": self.tag,
            "files": {self.gguf.name: f"sha256:{self.sha256}"},
            "parameters": self.parameters,
        } | {key: value for key, value in given.items() if value}

    def text(self, folder: Path) -> str:
        """For people: `ollama create NAME -f folder/Modelfile` makes the same model."""
        lines = [
            f"# {self.tag}, as 'make register' makes it. By hand: ollama create {self.name} -f Modelfile",
            f"FROM ./{self.gguf.relative_to(folder)}",
        ]
        if self.template:
            lines.append(f'TEMPLATE """{self.template}"""')
        for key, value in self.parameters.items():
            for item in value if isinstance(value, list) else [value]:
                lines.append(f'PARAMETER {key} "{item}"' if isinstance(item, str) else f"PARAMETER {key} {item}")
        if self.licence:
            lines.append(f'LICENSE """{self.licence}"""')
        return "\n".join(lines) + "\n"
