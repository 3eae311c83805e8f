"""Names that a shared library defines, read from its ELF file (System V ABI, "Symbol Table"); nothing is loaded."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

_DYNAMIC_SYMBOLS = 11  # SHT_DYNSYM


def defined_symbols(path: Path) -> frozenset[str]:
    """Of a 64-bit little-endian library: the dynamic symbols that are not undefined."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:6] != b"\x7fELF\x02\x01":
            raise ValueError(f"{path} is no 64-bit little-endian ELF file")
        first, size, count = struct.unpack_from("<Q", data, 40) + struct.unpack_from("<HH", data, 58)
        # name, type, flags, address, offset, size, link, info, alignment, entry size
        sections = [struct.unpack_from("<IIQQQQIIQQ", data, first + size * index) for index in range(count)]
        found = set()
        for section in sections:
            if section[1] == _DYNAMIC_SYMBOLS:
                strings = sections[section[6]]
                for entry in range(section[4], section[4] + section[5], section[9]):
                    name, _info, _other, defined_in = struct.unpack_from("<IBBH", data, entry)
                    if defined_in:
                        start = strings[4] + name
                        found.add(data[start : data.find(b"\0", start)].decode())
        return frozenset(found)
