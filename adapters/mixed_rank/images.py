"""Images as a folder holds them: a folder for each class, in it the class's images."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class ImageError(ValueError):
    """A folder of images does not fit its model, or an image cannot be read; it is named."""


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """The images of some class folders, in the order of their paths.

    Attributes:
        paths: of all images.
        labels: the model's number for the class of each.
        processor: of `transformers`, that makes them what the model takes.
    """

    paths: Sequence[Path]
    labels: Sequence[int]
    processor: Any

    @classmethod
    def open(cls, folder: Path, model: Path) -> "ImageFolder":
        """List the images of a folder; none is read yet.

        Args:
            folder: holds a folder for each class, named as the model names it.
            model: folder of the model, with `config.json` and `preprocessor_config.json`.

        Raises:
            ImageError: there are no images, a class is unknown to the model, or the model's folder
                does not say how it takes images.
        """
        import transformers

        numbers = _class_numbers(model)
        classes = sorted(path for path in folder.iterdir() if path.is_dir()) if (
            folder.is_dir()) else []  # fmt: skip
        unknown = [path.name for path in classes if path.name not in numbers]
        if unknown:
            raise ImageError(
                f"{folder}: no class of the model is named {unknown[0]!r}; there are "
                f"{', '.join(sorted(numbers))}"
            )
        found = [
            (path, numbers[each.name])
            for each in classes
            for path in sorted(each.iterdir())
            if path.suffix.lower() in SUFFIXES
        ]
        if not found:
            raise ImageError(
                f"{folder}: no images; wanted is a folder for each class, with files that end in "
                f"{', '.join(SUFFIXES)}"
            )
        try:
            processor = transformers.AutoImageProcessor.from_pretrained(model, backend="pil")
        except (OSError, ValueError) as error:
            raise ImageError(f"{model}: cannot tell how it takes images ({error})") from error
        paths, labels = zip(*found, strict=True)
        return cls(paths, labels, processor)

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.paths)

    def pixels(self, numbers: Sequence[int]) -> Tensor:
        """Return (B, C, H, W) float32 of some images.

        Raises:
            ImageError: one cannot be read.
        """
        from PIL import Image

        images = []
        for number in numbers:
            try:
                with Image.open(self.paths[number]) as image:
                    images.append(image.convert("RGB"))
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                raise ImageError(f"{self.paths[number]}: not a readable image ({error})") from error
        return torch.as_tensor(self.processor(images, return_tensors="pt")["pixel_values"])


def _class_numbers(model: Path) -> dict[str, int]:
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        return {str(name): int(number) for number, name in config["id2label"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ImageError(f"{model}: config.json does not name the model's classes") from error
