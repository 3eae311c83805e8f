"""The header of a safetensors file, looked at before the library reads it.

The library reads whatever length the first eight bytes claim, up to 100 MB: a header of a million names takes a
gigabyte once parsed.
"""

from __future__ import annotations

from pathlib import Path

from qlora_trainer.config.strict_json import decode

# A 70B model's optimizer state has 3,400 names of 150 bytes; this leaves 30 x as much, and a header of 10^6 names
# (60 MB) is refused unread.
MAX_HEADER_BYTES = 16 * 2**20


def require_sane_header(path: Path) -> None:
    """Refuse a file whose header is no JSON object of a reasonable size.

    Raises:
        ValueError: it is not.
        OSError: the file cannot be read.
    """
    num_file_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        num_header_bytes = int.from_bytes(start, "little")
        if len(start) < 8 or num_header_bytes > num_file_bytes - 8:
            raise ValueError(f"not a safetensors file: {num_file_bytes:,} bytes cannot hold the header it claims")
        if num_header_bytes > MAX_HEADER_BYTES:
            raise ValueError(f"a header of {num_header_bytes:,} bytes, more than {MAX_HEADER_BYTES:,}")
        text = file.read(num_header_bytes)
    try:
        decode(text)
    except ValueError as error:
        raise ValueError(f"its header: {error}") from error
