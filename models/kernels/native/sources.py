"""The digest by which a library is known to be built of the C++ sources beside it.

`setup.py` runs this file when it builds the library, so it imports the standard library only.
"""

import hashlib
from pathlib import Path


def digest_sources(folder: Path) -> str:
    """Return the SHA-256 of the names and contents of a folder's C++ files."""
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.cpp"), *folder.glob("*.h"))):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
