"""Find the folders that clients name, and nothing outside of what the operator opened."""

from collections.abc import Sequence
from pathlib import Path

from serve.backends.protocol import AdapterLoadError


def find_folder(path: str, roots: Sequence[Path]) -> tuple[Path, Path]:
    """Find a folder below one of some roots.

    A link may be swapped for another a moment later: whoever reads the folder must follow none.

    Args:
        path: absolute, or relative to a root.
        roots: resolved.

    Returns:
        The folder, resolved, and its root.

    Raises:
        AdapterLoadError: it is not below a root, by way of a symlink or otherwise, or is no folder.
    """
    if not roots:
        raise AdapterLoadError("adapters cannot be attached: no adapter_root is set")
    shown = repr(path[:200])
    if "://" in path or "\0" in path:
        raise AdapterLoadError(f"path must be a folder on the server, got {shown}")
    try:
        for root in roots:
            folder = (root / path).resolve()
            if root in folder.parents and folder.is_dir():
                return folder, root
    except (OSError, RuntimeError) as error:  # too long a name, a circle of links
        raise AdapterLoadError(f"path {shown} cannot be followed") from error
    raise AdapterLoadError(f"path must be a folder below the adapter root, got {shown}")
