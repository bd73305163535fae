"""A picture of how a training went: loss, validation Dice and learning rate over the steps."""

from __future__ import annotations

import importlib.util
import io
from typing import Any


def draw_curve(rows: list[dict[str, Any]]) -> bytes | None:
    """Return a PNG of `rows` (those of metrics.jsonl), None where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left = figure.add_subplot()
    right = left.twinx()
    trained = [r for r in rows if "loss" in r]
    scored = [r for r in rows if r.get("val_dice") is not None]
    left.plot([r["step"] for r in trained], [r["loss"] for r in trained], color="#4477aa", label="loss")
    if scored:
        x, y = [r["step"] for r in scored], [r["val_dice"] for r in scored]
        right.plot(x, y, color="#cc3311", marker="o", markersize=3, label="validation Dice")
        best = max(scored, key=lambda r: float(r["val_dice"]))
        right.annotate(f"{best['val_dice']:.3f}", (best["step"], best["val_dice"]), color="#cc3311")
    left.set_xlabel("step")
    left.set_ylabel("loss", color="#4477aa")
    left.set_ylim(bottom=0)
    right.set_ylabel("mean foreground Dice", color="#cc3311")
    right.set_ylim(0, 1)
    left.grid(alpha=0.3)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
