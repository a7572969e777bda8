"""Image classifiers from the command line: compressed, tested, and every mistake one line."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from adapters.mixed_rank.vision_folder import load_vision

CLASSES = ("cat", "dog", "emu")
PROCESSOR = {
    "image_processor_type": "ViTImageProcessor", "do_resize": True,
    "size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier and images of its classes, five each, in formats of all kinds."""
    root = tmp_path_factory.mktemp("vision")
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=128, patch_size=8, id2label=dict(enumerate(CLASSES)),
        label2id={name: number for number, name in enumerate(CLASSES)},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(root / "vit")
    (root / "vit" / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    suffixes = ("jpg", "png", "webp", "bmp", "gif")
    for name in CLASSES:
        (root / "images" / name).mkdir(parents=True)
        for number, suffix in enumerate(suffixes):
            size = (20 + 9 * number, 40)
            image = Image.effect_noise(size, 20 + 30 * number).convert(("L", "RGB")[number % 2])
            image.save(root / "images" / name / f"{number}.{suffix}")
    (root / "images" / "cat" / "notes.txt").write_text("not an image")
    return root


@pytest.fixture
def words(made: Path, tmp_path: Path) -> list[str]:
    """A short run that works."""
    return [
        "compress", "--model", str(made / "vit"), "--data", str(made / "images"), "--output",
        str(tmp_path / "out"), "--remove", "0.2", "--sequences", "15", "--steps", "2",
        "--threads", "1",
    ]  # fmt: skip


def test_classifier_is_compressed_and_tested(
    words: list[str], call_proa, made: Path, tmp_path: Path
) -> None:
    done = call_proa(*words, "--description", "thin")
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    assert re.search(r"15 of 15 images; 1 threads", done.stderr)
    assert re.search(r"out: 2\d\.\d% of the linears' .* removed, \d+\.\d% of the", done.stderr)
    told = json.loads((out / "mixed_rank.json").read_text())
    assert (told["description"], told["form"]) == ("thin", "int8")
    test = ["eval", "images", "--data", str(made / "images"), "--batch-size", "4"]
    for folder in (made / "vit", out):
        predictions = tmp_path / "predictions.jsonl"
        done = call_proa(*test, "--model", str(folder), "--output", str(predictions))
        assert done.returncode == 0, done.stderr
        found = re.fullmatch(
            r".*: top-1 (\d+\.\d\d)% \(95 % interval (\d+\.\d\d)% to (\d+\.\d\d)%\), "
            r"(\d+) of 15 images\n",
            done.stdout,
        )
        assert found, done.stdout
        assert float(found[2]) < float(found[1]) < float(found[3])
        records = [json.loads(line) for line in predictions.read_text().splitlines()]
        assert len(records) == 15
        assert sum(r["label"] == r["predicted"] for r in records) == int(found[4])
        record = records[7]
        pixels = transformers.AutoImageProcessor.from_pretrained(made / "vit", backend="pil")(
            Image.open(made / "images" / record["image"]).convert("RGB"), return_tensors="pt"
        )
        with torch.no_grad():
            logits = load_vision(folder)(**pixels).logits
        assert int(logits.argmax()) == record["predicted"]
        assert CLASSES[record["label"]] == record["image"].partition("/")[0]


def test_run_that_was_killed_goes_on(words: list[str], call_proa, tmp_path: Path) -> None:
    words += ["--checkpoint-every", "1"]
    assert call_proa(*words).returncode == 0
    again = call_proa(*words, "--resume")
    assert again.returncode == 1
    assert "complete" in again.stderr


def spoil(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)


DATA_FAULTS = {
    r"images: no class of the model is named 'elk'; there are cat, dog, emu": (
        lambda folder: spoil(folder, "elk/1.png", b"")
    ),
    r"cat/0\.jpg: not a readable image": lambda folder: spoil(folder, "cat/0.jpg", b"\xff\xd8\xff"),
    r"dog/4\.gif: not a readable image": lambda folder: spoil(folder, "dog/4.gif", b"GIF89a"),
    r"no images; wanted is a folder for each class": lambda folder: [
        shutil.rmtree(folder / name) for name in CLASSES
    ],
}


@pytest.mark.parametrize("message", DATA_FAULTS)
@pytest.mark.parametrize("command", ["compress", "eval"])
def test_images_that_do_not_fit_are_named(
    message: str, command: str, words: list[str], call_proa, made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made / "images", tmp_path / "images")
    DATA_FAULTS[message](tmp_path / "images")
    if command == "eval":
        words = ["eval", "images", "--model", str(made / "vit")]
    done = call_proa(*words, "--data", str(tmp_path / "images"))
    assert done.returncode == 2
    assert re.search(f"error: --data: .*{message}", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--sequences", "16"], r"images has 15 images; --sequences is 16"),
        (["--length", "64"], "--length: says nothing about images; --data is a folder"),
        (["--on", "x"], "--on: says nothing about images"),
        (["--quantization", "nf4"], "--quantization: says nothing about images"),
        (["--form", "int4"], "--form: must be float16 or int8 for images, got int4"),
        (["--remove", "0.9"], r"--remove: must be at most 0\.\d+ with ranks in steps of 32"),
        (["--model", "nowhere"], r"--model: nowhere/config\.json: cannot be read"),
    ],
)
def test_mistakes_of_compress_are_one_line(
    words: list[str], call_proa, changes: list[str], message: str
) -> None:
    done = call_proa(*words, *changes)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--limit", "0"], "--limit must be a whole number of at least 1, got 0"),
        (["--batch-size", "-2"], "--batch-size must be a whole number of at least 1, got -2"),
        (["--data", "nowhere"], "--data: nowhere is not a folder"),
        (["--model", "nowhere"], r"--model: nowhere/config\.json: cannot be read"),
        (["--output", "nowhere/x.jsonl"], "--output: .*nowhere is not a folder"),
    ],
)
def test_mistakes_of_eval_are_one_line(
    call_proa, made: Path, changes: list[str], message: str
) -> None:
    words = ["--model", str(made / "vit"), "--data", str(made / "images")]
    done = call_proa("eval", "images", *words, *changes)
    assert done.returncode == 2, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_a_part_of_the_images_is_one_of_all_classes(call_proa, made: Path, tmp_path: Path) -> None:
    output = tmp_path / "predictions.jsonl"
    done = call_proa(
        "eval", "images", "--model", str(made / "vit"), "--data", str(made / "images"), "--limit",
        "9", "--output", str(output),
    )  # fmt: skip
    assert re.search(r"\d of 9 images", done.stdout)
    labels = [json.loads(line)["label"] for line in output.read_text().splitlines()]
    assert len(labels) == 9
    assert set(labels) == {0, 1, 2}
