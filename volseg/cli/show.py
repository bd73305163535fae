"""Results as people read them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import yaml

from volseg.cli.progress import ProgressLine, clock, quantity, size
from volseg.recipes import Recipe


def table(values: dict[str, Any]) -> str:
    """Write names and values in two columns."""
    width = max(len(name) for name in values)
    return "\n".join(f"{name.replace('_', ' '):{width}}  {_plain(value)}" for name, value in values.items())


def planned(plan: dict[str, Any]) -> str:
    """Write a plan."""
    memory = plan["memory_per_worker"]
    copies = ""
    if plan["members"] * plan["mirrors"] > 1:
        copies = f" ({plan['members']} members x {plan['mirrors']} mirror images each)"
    terms = ", ".join(f"{name} {size(count)}" for name, count in memory.items() if name != "total" and count)
    return table({
        "input": f"{_sides(plan['shape'])} voxels, region {plan['region']}",
        "patches": f"{plan['patches']} of " + "; ".join(_view(view, len(plan["views"])) for view in plan["views"]),
        "blocks": f"{plan['blocks']} of {_sides(plan['block'])}, stored in chunks of {_sides(plan['chunks'])}",
        **_compared(plan["compared"]),
        "forwards": f"{plan['forwards']}: {plan['forwards_per_patch']:.3f} a patch, "
        f"{plan['forwards_per_voxel']:.2f} voxels computed for each one written" + copies,
        "borders": _borders(plan),
        "arithmetic": quantity(plan["flops"], "FLOP"),
        "workers": f"{plan['workers']} on {plan['device']}, executor {plan['executor']}",
        "memory": f"{size(memory['total'])} a worker of at most {size(plan['memory_limit'])} ({terms})",
        "reads": f"{size(plan['bytes_read'])}, halos included",
        "writes": f"{size(plan['bytes_written'])} before compression",
    })  # fmt: skip


def measured(result: dict[str, Any]) -> str:
    """Write what was measured, what follows from it, and what was assumed on the way."""
    seen, soon = result["measured"], result["expected"]
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in seen["share_of_time"].items())
    rows = {
        "measured": f"{seen['model']}, patch {_sides(seen['patch'])}, overlap {100 * seen['overlap']:.0f} %, "
        f"{seen['precision']} on {seen['device']}",
        "speed": f"{quantity(seen['voxels_per_second'], 'voxel/s')} by {seen['workers']} worker(s): "
        f"{seen['forwards']} forwards, {seen['seconds_per_forward']:.3g} s each, in {clock(seen['seconds'])}",
        "of the workers' time": shares,
        "start": clock(seen["start_seconds"]),
        "memory": f"{size(seen['peak_memory_per_worker'])} a worker at most",
        "expected": f"{_sides(soon['shape'])} voxels on {soon['workers']} worker(s): {clock(soon['seconds'])}, at most "
        f"{clock(soon['seconds_at_most'])} ({soon['forwards']} forwards in {soon['blocks']} blocks)",
        "voxels a second": quantity(soon["voxels_per_second"], "voxel/s"),
        "storage must give": f"{size(soon['storage']['reads_per_second'])}/s read and "
        f"{size(soon['storage']['writes_per_second'])}/s written, before compression",
        "memory needed": f"{size(soon['memory_per_worker'])} a worker",
    }
    return "\n".join([table(rows), "The expectation is extrapolated:", *(f"- {line}" for line in result["assumed"])])


def _compared(costs: dict[str, Any]) -> dict[str, str]:
    """Write what blending and exact mode would cost, and which one is advised."""
    rows = {}
    for name in ("blended", "exact"):
        cost = costs[name]
        if "why" in cost:
            rows[name] = cost["why"]
            continue
        time = "" if cost["relative_time"] is None else f", {cost['relative_time']:.2f} of the time of blending"
        windows = "; ".join(_view(view, len(cost["views"])) for view in cost["views"])
        rows[name] = (
            f"{cost['forwards_per_voxel']:.2f} voxels computed for each one written, {quantity(cost['flops'], 'FLOP')}"
            f"{time if name == 'exact' else ''} ({windows})"
        )
    return {**rows, "advice": costs["advice"]}


def _borders(plan: dict[str, Any]) -> str:
    """Say what happens to the patches at the borders of blocks."""
    seams = plan["seams"]
    if not seams["shared"]:
        return "no patch is computed twice" if plan["forwards_per_patch"] == 1 else "each block computes all it needs"
    columns = "" if seams["columns"] == 1 else f" within {seams['columns']} columns of {_sides(seams['column'])}"
    return f"blocks share patches{columns}; at most {size(seams['bound_bytes'])} of sums wait for other blocks"


def _view(view: dict[str, Any], views: int) -> str:
    along = f", along {view['axis']}" if views > 1 else ""
    if "tile" in view:
        halo = f"halo {_sides(view['halo_before'])}"
        if view["halo_before"] != view["halo_after"]:
            halo += f" before, {_sides(view['halo_after'])} after"
        return f"tile {_sides(view['tile'])}, {halo}, at most {_sides(view['patch'])} read{along}"
    return f"{_sides(view['patch'])}, stride {_sides(view['stride'])}{along}"


def segmented(report: dict[str, Any]) -> str:
    """Write what a finished segmentation did."""
    blocks, seconds = report["blocks"], report["seconds"]
    lines = [
        f"complete: {report['output']}",
        f"{blocks['total']} blocks ({blocks['computed']} computed, {blocks['resumed']} done before), "
        f"{report['forwards']} forwards{_a_patch(report)} in {clock(seconds['wall'])}",
    ]
    if report["numerics"]:
        lines.append(f"forward {report['numerics']['forward']}; " + report["numerics"].get("guard", "no guard needed"))
    if report["waiting"] is not None:
        lines.append(f"workers waited {100 * report['waiting']:.1f} % of their time for input or output")
    lines += [f"  {c['id']:3} {c['name']}: {100 * (c['fraction'] or 0):.2f} %" for c in report["classes"]]
    for name, text in (
        ("absent_chunks", "absent chunks were read as fill value"),
        ("nonfinite_filled", "NaN or Inf voxels were filled"),
    ):
        if report[name]:
            lines.append(f"note: {report[name]} {text}")
    return "\n".join(lines)


def tuned(result: dict[str, Any]) -> str:
    """Write what a tuning tried and chose."""
    lines = [f"chosen: {result['chosen']} (asked for: {result['precision']}); kept in {result['kept']}"]
    for tried in result["tried"]:
        head = f"  {tried['way']:14} batch {tried['batch']:<3}"
        if "problem" in tried:
            lines.append(f"{head} {tried['problem']}")
            continue
        verdict = "" if tried["allowed"] else f"; refused: {tried['guard']}"
        lines.append(f"{head} {1000 * tried['seconds_per_patch']:9.1f} ms a patch, {tried['speed']:.2f} x{verdict}")
    return "\n".join(lines)


def _a_patch(report: dict[str, Any]) -> str:
    ratio = report["forwards_per_patch"]
    return "" if ratio is None else f" ({ratio:.2f} a patch)"


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
    """Write scores a class, with their intervals, and what else was measured."""
    measured = result.get("surface")
    heads = ["id", "class", "Dice (F1)", "95 % interval", "IoU", "precision", "recall", "truth voxels"]
    heads += ["mean distance", "95 % Hausdorff", "surface Dice"] if measured else []
    rows = [heads]
    for c in result["classes"]:
        row = [str(c["id"]), c["name"], _score(c["dice"]), _interval(c["dice_interval"]), _score(c["iou"])]
        row += [_score(c["precision"]), _score(c["recall"]), f"{c['truth_voxels']:,}"]
        if measured:
            row += [_length(c["surface"]["mean"]), _length(c["surface"]["hausdorff_95"]), _score(c["surface"]["dice"])]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = ["  ".join(f"{cell:{w}}" for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    mean, spread = _score(result["mean_foreground_dice"]), _interval(result["mean_foreground_dice_interval"])
    lines.append(f"mean foreground Dice {mean}, 95 % interval {spread}")
    lines.append(f"accuracy {_score(result['accuracy'])}, balanced {_score(result['balanced_accuracy'])}")
    if measured:
        lines.append(
            f"distances in {measured['unit']}, surface Dice within {measured['tolerance']:g} {measured['unit']}"
        )
    if rand := result.get("rand"):
        lines.append(
            f"Rand score of {len(rand['slices'])} slices parted by class {rand['class']}: {_score(rand['score'])} "
            f"(split {_score(rand['split'])}, merge {_score(rand['merge'])})"
        )
    return "\n".join(lines)


def _interval(value: Sequence[float] | None) -> str:
    return "-" if value is None else f"{value[0]:.3f} to {value[1]:.3f}"


def _length(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def imported(result: dict[str, Any]) -> str:
    """Write what an import made."""
    return table(result)


def trained(result: dict[str, Any]) -> str:
    """Write how a training ended."""
    return table(result)


def model(result: dict[str, Any]) -> str:
    """Write what a bundle is."""
    scores = result["scores"].get("validation_dice") or {}
    sides = " x ".join(map(str, result["patch"]))
    rows = {
        "bundle": f"{result['bundle']} ({result['digest'][:12]})",
        "network": f"{result['dims']}D {result['architecture']}, {result['parameters']:,} weights"
        + (f", {result['members']} members" if result["members"] > 1 else ""),
        "arguments": ", ".join(f"{name} {_plain(value)}" for name, value in result["arguments"].items()),
        "patch": sides + (f", slices along {result['axis']}" if result["axis"] else ""),
        "sees": f"{_sides(result['receptive_field'])} voxels to each side",
        "classes": ", ".join(
            f"{c['id']} {c['name']}" + (f" (Dice {_score(scores[c['name']])})" if c["name"] in scores else "")
            for c in result["classes"]
        ),
        "decides by": f"probability of class 1 above {result['threshold']:.3g}"
        if result["threshold"] is not None
        else "largest probability" + (", after a bias a class" if result["class_bias"] else ""),
        "voxel size": f"{_plain(result['voxel_size'])} {result['unit'] or ''}".strip(),
        "trained on": ", ".join(result["provenance"].get("spec", {}).get("image", [])) or "unknown data",
        "weights": result["provenance"].get("weights", "unknown"),
        "files": ", ".join(f"{f['name']} ({size(f['size'])})" for f in result["files"]),
    }
    return table(rows | ({"picture": result["picture"]["picture"]} if "picture" in result else {}))


def exported(result: dict[str, Any]) -> str:
    """Write what an exported network takes and gives."""
    takes, gives = result["input"], result["output"]

    def shape(values: list[int | None]) -> str:
        return ", ".join(
            f"{axis} {'any' if size is None else size}" for axis, size in zip(takes["axes"], values, strict=True)
        )

    sides = takes["sides"]
    margin = f", smaller by {_plain(gives['margin'])} at each end" if any(gives["margin"]) else ""
    return table({
        "wrote": f"{result['export']} ({result['format']}, {result['members']} network(s))",
        "takes": f"{takes['name']}: {takes['values']}, {shape(takes['shape'])}",
        "sides": f"{_plain(sides['smallest'])} and up in steps of {_plain(sides['step'])}",
        "gives": f"{gives['name']}: {gives['values']}, one channel a class ("
        + ", ".join(c["name"] for c in result["classes"])
        + f"){margin}",
    })  # fmt: skip


def suggested(result: dict[str, Any]) -> str:
    """Write what to label next, one line each."""
    lines = [f"{number}. {found['box']}: {found['why']}" for number, found in enumerate(result["suggestions"], 1)]
    return "\n".join([*lines, "Where the network is unsure is a hint, not a proof that labels help most there."])


def recipes(found: list[Recipe]) -> str:
    """Write the recipes, one line each."""
    width = max(len(recipe.name) for recipe in found)
    lines = [f"{recipe.name:{width}}  {recipe.summary}" for recipe in found]
    return "\n".join(
        [*lines, "", "'volseg recipes NAME' shows one with all its options; 'volseg train --recipe NAME' uses it"]
    )


def recipe(found: Recipe) -> str:
    """Write one recipe with its options, as a spec file that could be trained from."""
    options = yaml.safe_dump({"recipe": found.name, **found.options}, sort_keys=False, default_flow_style=None).rstrip()
    parts = [f"{found.name}: {found.summary}", f"Source: {found.source}", found.notes, options]
    return "\n\n".join(textwrap.fill(part, 100) if part is not options else part for part in parts if part)


class TrainingLine:
    """Shows the progress of a training."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line

    def __call__(self, now: Any) -> None:
        """Take one progress report of the training."""
        extra = f"loss {now.loss:.3f}"
        if now.val_dice is not None:
            extra += f", validation Dice {now.val_dice:.3f}"
        facts = asdict(now)
        # Whichever limit comes first is what the bar counts towards.
        if now.max_seconds is not None and now.seconds / now.max_seconds > now.step / now.max_steps:
            self._line.update(int(now.seconds), int(now.max_seconds), f"step {now.step}, {extra}", unit="s", **facts)
        else:
            self._line.update(now.step, now.max_steps, extra, unit="steps", **facts)


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)) and value and all(isinstance(v, (list, tuple)) for v in value):
        return "; ".join(",".join(_plain(part) for part in v) for v in value)
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
