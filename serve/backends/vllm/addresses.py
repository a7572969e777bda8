"""How adapters are named to vLLM's workers: a folder, the content it must have, how much of it."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlencode

from adapters.format import AdapterError, StoredAdapter, read_adapter


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterAddress:
    """Where an adapter lies; its text is the path of a LoRA request.

    Attributes:
        folder: of the adapter.
        digest: of the content that is wanted; "": whatever is there.
        scale: how much of a side network, above 0, at most 1.
    """

    folder: str
    digest: str = ""
    scale: float = 1.0

    def __str__(self) -> str:
        fields = {"digest": self.digest} if self.digest else {}
        if self.scale != 1.0:
            fields["scale"] = repr(self.scale)
        return f"{self.folder}#{urlencode(fields)}" if fields else self.folder

    def read(self) -> StoredAdapter:
        """Read the adapter.

        Raises:
            AdapterError: it cannot be read, or is no more what it was.
        """
        stored = read_adapter(Path(self.folder))
        if self.digest and stored.digest != self.digest:
            raise AdapterError(f"{self.folder} has changed since it was attached")
        return stored


def parse_address(text: str) -> AdapterAddress:
    """Read an address; a plain path is one.

    Raises:
        ValueError: the scale is no number above 0 and at most 1.
    """
    folder, mark, query = text.rpartition("#")
    fields = dict(parse_qsl(query)) if mark else {}
    if not mark or not fields or not set(fields) <= {"digest", "scale"}:
        return AdapterAddress(folder=text)
    scale = float(fields.get("scale", 1.0))
    if not 0 < scale <= 1:
        raise ValueError(f"the scale of a side network must be above 0 and at most 1, got {scale}")
    return AdapterAddress(folder=folder, digest=fields.get("digest", ""), scale=scale)
