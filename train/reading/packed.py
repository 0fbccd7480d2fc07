"""A file's bytes, unpacked if they are packed by gzip, zstd, bzip2 or xz, which the content tells and not the name."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz"}
FAULTS = (EOFError, zlib.error, lzma.LZMAError, OSError)  # what unpacking raises
PIECE_BYTES = 1 << 16


def opened(path: Path) -> Any:
    """The file's bytes as a binary file, of which reading raises one of FAULTS where they are damaged or cut off."""
    with path.open("rb") as file:
        magic = file.read(6)
    packing = next((name for mark, name in MAGIC.items() if magic.startswith(mark)), None)
    if packing == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    if packing == "gzip":
        return gzip.open(path, "rb")
    if packing:
        return io.BufferedReader(Streams(path.open("rb"), bz2.BZ2Decompressor if packing == "bzip2" else xz_stream))
    return path.open("rb")


class Streams(io.RawIOBase):
    """Packed streams one after another, as parallel packers write them.

    Python's own readers of bzip2 and xz take a damaged stream after the first one for the end of the file.
    """

    def __init__(self, file: IO[bytes], begin: Callable[[], Any]) -> None:
        self.file, self.begin = file, begin
        self.stream, self.packed = begin(), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while True:
            if self.stream.eof:
                self.packed = (self.stream.unused_data or self.file.read(PIECE_BYTES)).lstrip(b"\0")  # xz pads
                if not self.packed:
                    return 0
                self.stream = self.begin()
            elif not self.packed and self.stream.needs_input and not (packed := self.file.read(PIECE_BYTES)):
                raise EOFError("it ends before its end mark")
            elif not self.packed and self.stream.needs_input:
                self.packed = packed
            data = self.stream.decompress(self.packed, len(buffer))
            self.packed = b""
            if data:
                buffer[: len(data)] = data
                return len(data)

    def close(self) -> None:
        self.file.close()
        super().close()


def xz_stream() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ)
