"""The picture of a search: widths over its steps, and where each share's channels are."""

from pathlib import Path

from adapters.pictures import new_figure, save_figure
from adapters.run_log import read_metrics
from models.pruning import MODULES, widths_of
from models.spec import DecoderSpec

PLOT_FILE = "widths.png"


def plot_widths(folder: Path, spec: DecoderSpec) -> None:
    """Draw the widths of `metrics.jsonl` into `widths.png`.

    Above: the share of its channels that each module keeps, on the average over layers, by step.
    Below, for each share removed: the same for each layer at the end.

    Args:
        folder: of the run.
        spec: of the base.

    Raises:
        TrainingError: the file cannot be written.
    """
    # Of a repeated record, such as after a crash, the last counts.
    records = read_metrics(folder)
    results = {r["remove"]: r for r in records if r["event"] == "result"}
    steps = [r for r in records if r["event"] == "step"]
    figure = new_figure(8, 4 + 2 * len(results))
    rows = figure.subplots(1 + len(results), 1, height_ratios=[2] + [1] * len(results))
    axes = rows if not results else rows[0]
    for j, module in enumerate(MODULES):
        axes.plot([r["step"] for r in steps], [r["widths"][j] for r in steps], lw=1, label=module)
    numbers = [r["step"] for r in steps]
    axes.plot(numbers, [r["target"] for r in steps], "k--", lw=0.8, label="parameters, target")
    axes.plot(numbers, [r["kept"] for r in steps], "k", lw=0.8, label="parameters")
    axes.set_xlabel("step")
    axes.set_ylabel("share kept")
    axes.legend(fontsize="small")
    for result, below in zip(results.values(), rows[1:] if results else (), strict=True):
        shares = [
            [width / full for width, full in zip(*layer, strict=True)]
            for layer in zip(result["widths"], widths_of(spec), strict=True)
        ]
        columns = list(zip(*shares, strict=True))
        image = below.imshow(columns, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        below.set_yticks(range(len(MODULES)), MODULES)
        below.set_xticks(range(0, len(shares), 1 + len(shares) // 16))
        below.set_xlabel("layer")
        below.set_title(f"{result['remove']:.0%} of the linears' parameters removed", fontsize=10)
        figure.colorbar(image, ax=below, label="share kept")
    save_figure(figure, folder / PLOT_FILE)
