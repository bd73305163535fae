"""Results as people read them."""

from __future__ import annotations

from typing import Any

from volseg.cli.progress import ProgressLine, clock, quantity, size


def table(values: dict[str, Any]) -> str:
    """Write names and values in two columns."""
    width = max(len(name) for name in values)
    return "\n".join(f"{name.replace('_', ' '):{width}}  {_plain(value)}" for name, value in values.items())


def planned(plan: dict[str, Any]) -> str:
    """Write a plan."""
    memory = plan["memory_per_worker"]
    terms = ", ".join(f"{name} {size(count)}" for name, count in memory.items() if name != "total" and count)
    return table({
        "input": f"{_sides(plan['shape'])} voxels, region {plan['region']}",
        "patches": f"{plan['patches']} of {_sides(plan['patch'])}, stride {_sides(plan['stride'])}",
        "blocks": f"{plan['blocks']} of {_sides(plan['block'])}, stored in chunks of {_sides(plan['chunks'])}",
        "forwards": f"{plan['forwards']}: {plan['forwards_per_patch']:.3f} a patch, "
        f"{plan['forwards_per_voxel']:.2f} voxels computed for each one written",
        "arithmetic": quantity(plan["flops"], "FLOP"),
        "workers": f"{plan['workers']} on {plan['device']}, executor {plan['executor']}",
        "memory": f"{size(memory['total'])} a worker of at most {size(plan['memory_limit'])} ({terms})",
        "reads": f"{size(plan['bytes_read'])}, halos included",
        "writes": f"{size(plan['bytes_written'])} before compression",
    })  # fmt: skip


def segmented(report: dict[str, Any]) -> str:
    """Write what a finished segmentation did."""
    blocks, seconds = report["blocks"], report["seconds"]
    lines = [
        f"complete: {report['output']}",
        f"{blocks['total']} blocks ({blocks['computed']} computed, {blocks['resumed']} done before), "
        f"{report['forwards']} forwards in {clock(seconds['wall'])}",
    ]
    lines += [f"  {c['id']:3} {c['name']}: {100 * (c['fraction'] or 0):.2f} %" for c in report["classes"]]
    for name, text in (
        ("absent_chunks", "absent chunks were read as fill value"),
        ("nonfinite_filled", "NaN or Inf voxels were filled"),
    ):
        if report[name]:
            lines.append(f"note: {report[name]} {text}")
    return "\n".join(lines)


def verified(result: dict[str, Any]) -> str:
    """Write what a verification found."""
    blocks = result["blocks"]
    how = "digests of all voxels compared" if result["deep"] else "presence and size of every object checked"
    lines = [f"{result['status']}: {blocks['with_receipt']} of {blocks['total']} blocks have a receipt; {how}"]
    if result["status"] == "incomplete":
        lines.append("run the same 'volseg segment' command again to finish it")
    damaged = result["damaged"]
    lines += [
        f"block {d['block']} at {d['box']}: {d['error']}; stored in {', '.join(d['objects'])}" for d in damaged[:10]
    ]
    if len(damaged) > 10:
        lines.append(f"and {len(damaged) - 10} more: --json names them all")
    if damaged:
        lines.append(
            "run the same 'volseg segment' command again: it computes what is absent or has another size; where the "
            f"size is right, remove the object from {result['output']} first"
        )
    return "\n".join(lines)


def evaluated(result: dict[str, Any]) -> str:
    """Write scores a class."""
    rows = [("id", "class", "Dice", "IoU", "precision", "recall", "truth voxels")]
    rows += [
        (
            str(c["id"]), c["name"], _score(c["dice"]), _score(c["iou"]), _score(c["precision"]), _score(c["recall"]),
            f"{c['truth_voxels']:,}",
        )
        for c in result["classes"]
    ]  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    mean = result["mean_foreground_dice"]
    return "\n".join([*lines, f"mean foreground Dice {_score(mean)}"])


def imported(result: dict[str, Any]) -> str:
    """Write what an import made."""
    return table(result)


def trained(result: dict[str, Any]) -> str:
    """Write how a training ended."""
    return table(result)


class TrainingLine:
    """Shows the progress of a training."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line

    def __call__(self, now: Any) -> None:
        """Take one progress report of the training."""
        extra = f"loss {now.loss:.3f}"
        if now.val_dice is not None:
            extra += f", validation Dice {now.val_dice:.3f}"
        # Whichever limit comes first is what the bar counts towards.
        if now.max_seconds is not None and now.seconds / now.max_seconds > now.step / now.max_steps:
            self._line.update(int(now.seconds), int(now.max_seconds), f"step {now.step}, {extra}", unit="s")
        else:
            self._line.update(now.step, now.max_steps, extra, unit="steps")


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)) and len(value) <= 4 and not any(isinstance(v, dict) for v in value):
        return ", ".join(_plain(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{name.replace('_', ' ')} {_plain(part)}" for name, part in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


def _sides(sides: Any) -> str:
    return " x ".join(str(side) for side in sides)


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
