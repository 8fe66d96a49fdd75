"""JSON with a checksum of its own, for records in which a wrong bit would be another state.

    {
      "checksum": "xxh3-128 of the content, which is the file without this line",
      ...

Any JSON reader can still read it. What has no such line is of an older release.
"""

import re

import xxhash

from fusedisk.errors import FuseDiskError

_OPEN = b"{\n"
_LINE = re.compile(rb'  "checksum": "([0-9a-f]{32})",\n')


class SealBroken(FuseDiskError):
    """The content is not what was written."""


def seal(content: bytes) -> bytes:
    """Return a JSON object, formatted in lines, with its checksum."""
    assert content.startswith(_OPEN)
    digest = xxhash.xxh3_128_hexdigest(content).encode()
    return _OPEN + b'  "checksum": "' + digest + b'",\n' + content.removeprefix(_OPEN)


def unseal(raw: bytes) -> tuple[bytes, bool]:
    """Return the content, and whether it had a checksum. Raises SealBroken where that differs."""
    line = _LINE.match(raw, len(_OPEN))
    if line is None or not raw.startswith(_OPEN):
        return raw, False
    content = _OPEN + raw[line.end() :]
    if xxhash.xxh3_128_hexdigest(content).encode() != line[1]:
        raise SealBroken("it does not match its checksum")
    return content, True
