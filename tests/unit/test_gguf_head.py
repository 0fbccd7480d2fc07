"""The head of a GGUF file: what gguf's own reader finds in it, and no harm from a file that lies."""

import struct
from pathlib import Path

import gguf
import pytest
from gguf_fixture import write_gguf

from pipeline.error import UserError
from pipeline.gguf_head import read_head

START = b"GGUF" + struct.pack("<IQQ", 3, 0, 1)  # version 3, no tensor, one key
KEY = struct.pack("<Q", 1) + b"a"


def test_it_is_what_ggufs_own_reader_finds(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    head, reader = read_head(path), gguf.GGUFReader(path)
    # bytes are texts of a list there; fields that begin with "GGUF." are the reader's own
    found = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    words = [word.decode() for word in head.values["tokenizer.ggml.tokens"]]
    assert head.values | {"tokenizer.ggml.tokens": words} == found
    assert head.tensors == {tensor.name: (tuple(tensor.shape), tensor.tensor_type) for tensor in reader.tensors}


def test_it_is_read_as_far_as_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    head = read_head(path, until=".context_length")
    assert list(head.values)[-1] == "llama.context_length" and head.tensors == {}


def test_a_head_that_is_cut_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path)
    content = path.read_bytes()
    end = content.index(b"output_norm.weight")
    for length in range(0, end, 97):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"model\.gguf is not a whole GGUF file \("):
            read_head(path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"<html>not a model</html>", "it does not begin with 'GGUF'"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is outdated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**32) + bytes(9999), "it announces 4,294,967,296 key-value pairs, which"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0) + bytes(9999), "it announces 9,223,372,036,854,775,808 tensors"),
        (START + struct.pack("<Q", 2**64 - 1), f"it ends within the {2**64 - 1} bytes from byte 32 on"),
        (START + KEY + struct.pack("<I", 13), "13 is not the type of a value"),
        (START + KEY + struct.pack("<IQ", 8, 2**63), f"it ends within the {2**63} bytes from byte 45 on"),
        (START + KEY + struct.pack("<IIQ", 9, 6, 2**62), f"it ends within the {2**64} bytes from byte 49 on"),
        (START + KEY + struct.pack("<IIQ", 9, 8, 2**63), "it ends within the 8 bytes from byte 49 on"),
        (START + KEY + struct.pack("<IIQ", 9, 9, 1), "9 is not the type of a value"),  # a list of lists
        (START + struct.pack("<Q", 1) + b"\xff" + struct.pack("<IB", 0, 0), "'utf-8' codec can't decode"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + KEY + struct.pack("<I", 2**32 - 1), "it ends within the 343597383"),
    ],
)  # fmt: skip
def test_a_head_that_lies_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_head(path)
    assert str(error.value).startswith(f"{path} is not a whole GGUF file ({problem}")
