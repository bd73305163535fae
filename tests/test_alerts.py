"""The dashboard and the alerts name metrics and labels that there are, in expressions that Prometheus would take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml

from volseg.cluster.metrics import COUNTERS, GAUGES, TAGS

DEPLOY = Path(__file__).parents[1] / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana" / "volseg.json").read_text())
RULES: dict[str, Any] = yaml.safe_load((DEPLOY / "prometheus" / "volseg.rules.yaml").read_text())
# Ray adds these to every sample, and _total to the name of a counter.
RAY_LABELS = {"NodeAddress", "WorkerId", "Component", "SessionName", "Version"}
METRICS = {f"ray_{name}_total": {*TAGS} for name in COUNTERS} | {
    f"ray_{name}": {*tags} for name, (_, tags) in GAUGES.items()
}
VARIABLES = {"$__rate_interval": "5m", "$job": ".+"}


def alerts() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    """Yield every expression with where it stands; the dashboard's variables replaced."""
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for panel in panels():
        for target in panel["targets"]:
            expression = target["expr"]
            for name, value in VARIABLES.items():
                expression = expression.replace(name, value)
            yield panel["title"], expression


def problems(expression: str) -> list[str]:
    """Return what is wrong with an expression: its syntax, its metrics, or their labels."""
    try:
        tree = promql_parser.parse(expression)
    except ValueError as error:
        return [str(error)]
    found: list[str] = []
    labels: set[str] = set()

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            known = METRICS.get(node.name or "")
            if known is None:
                found.append(f"no metric {node.name}")
                return
            labels.update(known)
            found.extend(f"{node.name} has no {m.name}" for m in node.matchers.matchers if m.name not in known)

    promql_parser.walk(tree, visit)
    groups = re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", expression)
    grouped = {name.strip() for names in groups for name in names.split(",")}
    return found + [f"nothing has {name}" for name in grouped - labels - RAY_LABELS]


@pytest.mark.parametrize(("where", "expression"), [pytest.param(w, e, id=w) for w, e in expressions()])
def test_expressions(where: str, expression: str) -> None:
    assert not problems(expression)


@pytest.mark.parametrize(
    ("expression", "problem"),
    [
        ("sum(ray_volseg_voxels_total", "unclosed left parenthesis"),
        ("ray_volseg_voxel_total", "no metric ray_volseg_voxel_total"),
        ("ray_volseg_voxels", "no metric ray_volseg_voxels"),
        ("volseg_voxels_total", "no metric volseg_voxels_total"),
        ('ray_volseg_voxels_total{job="a"}', "ray_volseg_voxels_total has no job"),
        ("sum by (job) (ray_volseg_voxels_total)", "nothing has job"),
        ("rate(ray_volseg_voxels_total)", "expected type matrix"),
    ],
)
def test_faults_are_found(expression: str, problem: str) -> None:
    assert any(problem in found for found in problems(expression))


def test_every_metric_is_looked_at() -> None:
    """What nobody looks at need not be emitted; the alerts go by states, the dashboard shows all."""
    text = json.dumps(DASHBOARD) + json.dumps(RULES)
    assert {name for name in METRICS if not re.search(rf"{name}\b", text)} == set()


def test_rules_have_the_form_of_prometheus() -> None:
    """As its documentation of alerting rules says; what is unknown there would be refused by Prometheus."""
    assert set(RULES) == {"groups"}
    for group in RULES["groups"]:
        assert set(group) <= {"name", "interval", "limit", "rules"}
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    assert {"VolsegNoProgress", "VolsegBlocksFailing", "VolsegGpuStarved"} <= set(names)
    for rule in alerts():
        assert set(rule) <= {"alert", "expr", "for", "keep_firing_for", "labels", "annotations"}
        promql_parser.parse_duration(rule.get("for", "1m"))
        assert rule["labels"]["severity"] in {"warning", "critical"}
        assert {"summary", "description"} == set(rule["annotations"])
        # What a template names must be left in the answer.
        for label in re.findall(r"\$labels\.(\w+)", rule["annotations"]["summary"]):
            assert f"by ({label})" in rule["expr"]


def test_dashboard_has_the_form_of_grafana() -> None:
    assert isinstance(DASHBOARD["schemaVersion"], int)
    assert DASHBOARD["uid"] == "volseg-jobs"
    names = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert set(names) == {"datasource", "job"}
    assert re.fullmatch(r"label_values\((\w+), volseg_job\)", names["job"]["query"]["query"])[1] in METRICS  # type: ignore[index]
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        assert panel["type"] in {"timeseries", "stat", "bargauge"}
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        assert all(source["uid"] == "${datasource}" for source in sources(panel))
        at = panel["gridPos"]
        cells = {(at["x"] + i, at["y"] + j) for i in range(at["w"]) for j in range(at["h"])}
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, "two panels overlap"
        taken |= cells


def sources(panel: dict[str, Any]) -> list[dict[str, str]]:
    return [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
