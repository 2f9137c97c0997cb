"""The README's pictures: learning curves, and the pseudo-labels of one image over a run.

python benchmarks/pictures.py curves           # results/shapes.jsonl -> results/shapes.png
python benchmarks/pictures.py pseudo classmix  # trains, ~5 minutes -> results/classmix.png
"""

import argparse
import importlib
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import quality  # noqa: E402

from common.datasets import open_data  # noqa: E402
from common.evaluation import side_by_side  # noqa: E402
from common.transforms import normalize  # noqa: E402

COLORS = [
    "#000000", "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#b8a000",
    "#7f3c8d", "#8c564b", "#7f7f7f", "#a6761d", "#1b9e77", "#66a61e",
]  # fmt: skip
SIZE, LEFT, TOP, RIGHT, BOTTOM = (860, 480), 60, 20, 190, 50


def curves(dataset: str) -> Image.Image:
    """mIoU over the steps, mean over seeds, of all rows but those that stand apart.

    Names stand where the curves end.
    """
    rows = [row for row in quality.read(dataset) if row["row"] not in quality.APART]
    means = {}
    for name in dict.fromkeys(row["row"] for row in rows):
        points = [dict(map(tuple, row["curve"])) for row in rows if row["row"] == name]
        steps = sorted(set.intersection(*map(set, points)))
        means[name] = [(s, 100 * statistics.mean(curve[s] for curve in points)) for s in steps]
    last = max(step for curve in means.values() for step, _ in curve)
    values = [value for curve in means.values() for _, value in curve]
    low, top = 10 * int(min(values) / 10), 10 * (int(max(values) / 10) + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        width, height = SIZE[0] - LEFT - RIGHT, SIZE[1] - TOP - BOTTOM
        return LEFT + width * step / last, TOP + height * (top - value) / (top - low)

    picture = Image.new("RGB", SIZE, "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(14)
    for value in range(low, top + 1, 10):
        draw.line([place(0, value), place(last, value)], fill="#dddddd")
        draw.text((LEFT - 8, place(0, value)[1]), str(value), "black", font, anchor="rm")
    for part in range(6):
        x, y = place(last * part / 5, low)
        draw.text((x, y + 8), str(last * part // 5), "black", font, anchor="mt")
    title = f"mIoU in % on {dataset}, {quality.SPLITS[dataset][1]}, over the steps"
    draw.text((LEFT, SIZE[1] - 8), title, "black", font, anchor="ls")
    names = sorted(means, key=lambda name: -means[name][-1][1])
    line = 17
    heights = [place(0, means[name][-1][1])[1] for name in names]
    for i in range(1, len(heights)):  # names must not cover each other
        heights[i] = max(heights[i], heights[i - 1] + line)
    for name, y in zip(names, heights, strict=True):
        color = COLORS[list(means).index(name) % len(COLORS)]
        points = [place(*point) for point in means[name]]
        draw.line(points, fill=color, width=2, joint="curve")
        label = f"{name} {means[name][-1][1]:.1f}"
        draw.line([points[-1], (SIZE[0] - RIGHT + 14, y)], fill=color)
        draw.text((SIZE[0] - RIGHT + 18, y), label, color, font, anchor="lm")
    return picture


def pseudo_labels(name: str, number: int, columns: int) -> Image.Image:
    """Train on shapes; one unlabeled image, its true label, and its pseudo-labels as they change.

    They are what the evaluated network predicts in eval mode whenever it is evaluated.
    """
    script = importlib.import_module(name)
    validate, found = script.validate, []
    split = quality.SPLITS["shapes"][0]
    args = script.resolve(script.Args(dataset="shapes", split=split, split_seed=0))
    data, chosen = open_data(args)
    image, label = data.load(chosen.unlabeled[number])
    image, label = normalize(torch.as_tensor(image)[None]), torch.as_tensor(label)[None].long()

    def validate_and_keep(model, *args, **kwargs):
        mode = model.training
        with torch.no_grad():
            found.append(model.eval()(image).argmax(1))
        model.train(mode)
        return validate(model, *args, **kwargs)

    script.validate = validate_and_keep
    try:
        with tempfile.TemporaryDirectory() as folder:
            flags = {"dataset": "shapes", "split": split, "split_seed": 0, "output_dir": folder}
            script.main(script.Args(**flags))
    finally:
        script.validate = validate
    shown = [found[round(i * (len(found) - 1) / (columns - 1))] for i in range(columns)]
    strip = side_by_side([image], [label, *shown], data.palette)
    height, width = strip.shape[1:]
    picture = Image.fromarray(strip.permute(1, 2, 0).numpy())
    return picture.resize((2 * width, 2 * height), Image.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kinds = parser.add_subparsers(dest="kind", required=True)
    parser_curves = kinds.add_parser("curves")
    parser_curves.add_argument("--dataset", default="shapes", choices=list(quality.SPLITS))
    parser_pseudo = kinds.add_parser("pseudo")
    parser_pseudo.add_argument("script", choices=quality.SCRIPTS)
    parser_pseudo.add_argument("--image", type=int, default=0, help="of the unlabeled ones")
    parser_pseudo.add_argument("--columns", type=int, default=5, help="moments of the run")
    flags = parser.parse_args()
    if flags.kind == "curves":
        path, picture = f"{flags.dataset}.png", curves(flags.dataset)
    else:
        path = f"{flags.script}.png"
        picture = pseudo_labels(flags.script, flags.image, flags.columns)
    picture.save(quality.RESULTS / path)
    print(quality.RESULTS / path)


if __name__ == "__main__":
    main()
