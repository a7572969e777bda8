"""Find the folders that clients name, and nothing outside of what the operator opened."""

from collections.abc import Sequence
from pathlib import Path

from adapters.format import CONFIG_FILE, TENSOR_FILE
from serve.backends.protocol import AdapterLoadError


def find_folder(path: str, roots: Sequence[Path]) -> Path:
    """Find a folder below one of some roots, the files of an adapter in it too.

    Args:
        path: absolute, or relative to a root.
        roots: resolved.

    Returns:
        The folder, resolved.

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
            if root not in folder.parents:
                continue
            for file in (folder / CONFIG_FILE, folder / TENSOR_FILE):
                if root not in file.resolve().parents:
                    raise AdapterLoadError(
                        f"path {shown}: {file.name} is a link to outside of the adapter root"
                    )
            if folder.is_dir():
                return folder
    except (OSError, RuntimeError) as error:  # too long a name, a circle of links
        raise AdapterLoadError(f"path {shown} cannot be followed") from error
    raise AdapterLoadError(f"path must be a folder below the adapter root, got {shown}")
