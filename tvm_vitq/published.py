"""Top-1 on ImageNet as papers report it: for comparison with figures of one's own, never mixed with them."""

from __future__ import annotations

MODELS = ("ViT-S", "ViT-B", "DeiT-T", "DeiT-S", "DeiT-B", "Swin-S", "Swin-B")

FLOAT = (81.39, 84.54, 72.21, 79.85, 81.80, 83.23, 85.27)

TOP1: dict[str, dict[str, tuple[float | None, ...]]] = {
    "w8a8": {
        "fq-vit": (None, 83.31, 71.61, 79.17, 81.20, 82.71, None),
        "ptq4vit": (81.00, 84.25, None, 79.47, 81.48, 83.11, 85.15),
        "glf-q": (80.35, None, None, 79.07, None, 83.08, None),
    },
    "w6a6": {
        "ptq4vit": (78.63, 81.65, None, 76.28, 80.25, 82.38, 84.01),
        "repq-vit": (80.43, 83.62, 70.76, 78.90, 81.27, 82.79, None),
        "erq": (None, None, None, 79.46, 81.54, None, 85.06),
        "is-vit": (80.43, 83.82, 70.85, 79.15, 81.68, 82.89, 84.94),
        "dopq-vit": (80.52, 84.02, 71.17, 79.30, 81.69, 82.95, 84.97),
        "adfq-vit": (80.54, 83.92, 70.96, 79.04, 81.53, 82.81, 84.82),
        "adalog": (80.91, 84.80, 71.38, 79.39, 81.55, 83.19, 85.09),
    },
    "w4a4": {
        "fq-vit": (0.10,) * 7,
        "ptq4vit": (42.57, 30.69, 36.96, 34.08, 64.39, 76.09, 74.02),
        "repq-vit": (65.05, 68.48, 57.43, 69.03, 75.61, 79.45, 78.32),
        "erq": (68.91, 76.63, 60.29, 72.56, 78.23, 80.74, 82.44),
        "adalog": (72.75, 79.68, 63.52, 72.06, 78.03, 80.77, 82.47),
        "igq-vit": (73.61, 79.32, 62.45, 74.66, 79.23, 80.98, 83.14),
        "repquant": (73.28, 77.84, 64.44, 75.21, 78.46, 81.52, None),
        "adfq-vit": (72.14, 78.71, 62.91, 75.06, 78.75, 80.63, 82.33),
        "is-vit": (74.87, 80.07, 65.21, 75.81, 79.97, 81.17, 82.60),
        "dopq-vit": (75.69, 80.95, 65.54, 75.84, 80.13, 81.71, 83.34),
        "qdrop": (67.62, 82.02, 64.95, 74.73, 79.64, 81.03, 82.79),
        "aphq-vit": (76.07, 82.41, 66.66, 76.40, 80.21, 81.81, 83.42),
        "fima-q": (76.68, 83.04, 66.84, 76.87, 80.33, 81.82, 83.60),
        "glf-q": (77.82, 83.22, 67.37, 77.34, 80.53, 82.01, 83.80),
    },
    "w3a3": {
        "repq-vit": (0.10,) * 7,
        "ptq4vit": (0.10, 0.10, None, None, 31.06, 28.69, 20.13),
        "adalog": (13.88, 37.91, 31.56, 24.47, 57.45, 64.41, 69.75),
        "is-vit": (45.16, 63.77, 41.52, 55.78, 73.30, 74.20, 69.30),
        "dopq-vit": (54.72, 65.76, 44.71, 59.26, 74.91, 74.77, 69.63),
        "qdrop": (38.31, 73.79, 46.69, 52.55, 74.32, 74.11, 75.28),
        "aphq-vit": (63.17, 76.31, 55.42, 68.76, 76.30, 76.10, 78.14),
        "fima-q": (64.09, 77.63, 55.55, 69.13, 76.54, 77.26, 78.82),
        "glf-q": (67.40, 78.18, 56.48, 71.55, 77.20, 78.10, 80.45),
    },
}
"""By width and recipe, in the order of MODELS. Each paper's conventions are its own (which layers stay in 8
bits, how many images calibrate); several rows are known from later papers' tables only."""


def markdown() -> str:
    """One table a width."""
    head = f"| recipe | {' | '.join(MODELS)} |\n|---|{'---|' * len(MODELS)}\n"
    parts = [
        "## Published figures\n\nTop-1 in percent on ImageNet, as published, by others, with their own code: "
        "nothing here was measured with this package. `docs/imagenet.md` says how to measure it.\n"
    ]
    for bits, rows in TOP1.items():
        lines = [("float", FLOAT), *rows.items()]
        table = "".join(
            f"| {name} | {' | '.join('' if v is None else f'{v:.2f}' for v in row)} |\n"
            for name, row in lines
        )
        parts.append(f"### {bits}, published\n\n{head}{table}")
    return "\n".join(parts)
