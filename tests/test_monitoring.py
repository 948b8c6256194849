"""The dashboard, the alert rules and docs/metrics.md, against what a real daemon says.

Each query goes through a PromQL parser; each series, label and label value that it names must be in the output of a
daemon that reads one film and one that is not there, and whose Redis is away. GPU series come from a stand-in for NVML.
"""

from __future__ import annotations

import http.client
import json
import re
import shutil
import socket
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from tests.conftest import ROOT
from tests.daemon_process import DaemonProcess
from tests.redis_server import free_port
from tests.test_exporter import FakeNvml, gpu_series

promql = pytest.importorskip("promql_parser", reason="promql-parser is missing (pip install promql-parser)")

DASHBOARD = ROOT / "configs" / "monitoring" / "grafana-dashboard.json"
ALERTS = ROOT / "configs" / "monitoring" / "alerts.yaml"
WITHIN_S = 60.0
OF_THE_TARGET = {"job", "instance"}  # labels that Prometheus adds to what it scrapes
GRAFANA_TIMES = {"$__rate_interval": "5m", "$__interval": "1m"}

Series = Mapping[str, Mapping[str, set[str]]]  # label values by label by metric


class OverUnix(http.client.HTTPConnection):
    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=20)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(20)
        self.sock.connect(str(self._path))


def get(path: Path, page: str) -> tuple[int, str]:
    with closing(OverUnix(path)) as connection:
        connection.request("GET", page)
        response = connection.getresponse()
        return response.status, response.read().decode()


def scrape_until(path: Path, pattern: str) -> str:
    deadline = time.monotonic() + WITHIN_S
    while True:
        status, text = get(path, "/metrics")
        assert status == 200
        if re.search(pattern, text):
            return text
        assert time.monotonic() < deadline, f"no {pattern} within {WITHIN_S} s:\n{text}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def scraped(
    demo_clip: Path, untrained_artifact: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, str]]:
    """Give a running daemon's metrics socket, and a scrape of it that holds results."""
    folder = tmp_path_factory.mktemp("daemon")
    path = folder / "metrics.sock"
    config = {
        "models": {"people": {"path": str(untrained_artifact), "max_batch": 2, "workers": 1, "threads": 1}},
        "streams": {
            "gate": {"url": str(demo_clip), "loop": True, "fps": 2, "delivery": "stored"},
            "gone": {"url": str(folder / "none.mp4")},
        },
        "publish": {
            "zeromq": {"bind": f"tcp://127.0.0.1:{free_port()}"},
            "redis": {"url": f"redis://127.0.0.1:{free_port()}"},
            "spool": {"path": str(folder / "spool")},
        },
        "metrics": {"listen": f"unix://{path}"},
    }
    with DaemonProcess(folder, config):
        yield path, scrape_until(path, r'streamd_stream_results_total\{stream="gate"\} [1-9]')


@pytest.fixture(scope="module")
def series(scraped: tuple[Path, str]) -> Series:
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for family in text_string_to_metric_families(scraped[1] + gpu_series(FakeNvml())):
        for sample in family.samples:
            for label, value in (sample.labels or {"": ""}).items():
                found[sample.name][label].add(value)
    return found


def dashboard_queries() -> dict[str, tuple[str, str]]:
    """Give each panel's queries with their legends."""
    return {
        f"{panel['id']} {panel['title']} {target['refId']}": (target["expr"], target["legendFormat"])
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for target in panel.get("targets", ())
    }


def alerts() -> dict[str, Any]:
    return {rule["alert"]: rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]}


QUERIES = {
    **dashboard_queries(),
    **{
        name: (rule["expr"], " ".join(rule["annotations"].values()).replace("$labels.", ""))
        for name, rule in alerts().items()
    },
}


def parse(query: str) -> Any:
    for name, text in GRAFANA_TIMES.items():
        query = query.replace(name, text)
    return promql.parse(query)


def selectors(query: str) -> list[Any]:
    found: list[Any] = []

    def visit(expression: Any) -> None:
        if isinstance(expression, promql.MatrixSelector):
            found.append(expression.vector_selector)
        elif isinstance(expression, promql.VectorSelector):
            found.append(expression)

    promql.walk(parse(query), visit)
    return found


def labels_of(expression: Any, series: Series) -> set[str]:
    """Say which labels the result of a query has, and check those that it groups and joins by."""
    match expression:
        case promql.VectorSelector():
            return {*series.get(expression.name, ()), *OF_THE_TARGET} - {""}
        case promql.MatrixSelector():
            return labels_of(expression.vector_selector, series)
        case promql.ParenExpr():
            return labels_of(expression.expr, series)
        case promql.Call():
            labels = set().union(*(labels_of(argument, series) for argument in expression.args))
            return labels - {"le"} if expression.func.name == "histogram_quantile" else labels
        case promql.AggregateExpr():
            kept = set(expression.modifier.labels) if expression.modifier else set()
            assert kept <= labels_of(expression.expr, series), f"groups by labels that are not there: {expression}"
            return kept
        case promql.BinaryExpr():
            left, right = labels_of(expression.lhs, series), labels_of(expression.rhs, series)
            matching = expression.modifier.matching if expression.modifier else None
            if matching and matching.type == promql.LabelModifierType.Include:
                assert set(matching.labels) <= left & right, f"joins by labels that are not there: {expression}"
            elif left and right:
                ignored = set(matching.labels) if matching else set()
                assert left - ignored == right - ignored, f"joins {left} with {right}: {expression}"
            return left or right
        case promql.NumberLiteral() | promql.StringLiteral():
            return set()
    raise AssertionError(f"a kind of expression that this test does not know: {expression!r}")


@pytest.mark.parametrize("name", QUERIES)
def test_every_query_asks_for_series_and_labels_that_are_there(name: str, series: Series) -> None:
    query, text = QUERIES[name]
    for selector in selectors(query):
        if selector.name == "up":  # Prometheus makes it for every target
            continue
        assert selector.name in series, f"no such series: {selector}"
        known = series[selector.name]
        for matcher in selector.matchers.matchers:
            assert matcher.name in {*known, *OF_THE_TARGET}, f"{selector.name} has no label {matcher.name}"
            if matcher.name not in OF_THE_TARGET and "$" not in matcher.value:
                assert set(matcher.value.split("|")) <= known[matcher.name], f"{selector}: values that never come"
    shown = {label.strip().split()[0] for label in re.findall(r"\{\{([^}]*)\}\}", text)} - {"$value"}
    assert shown <= labels_of(parse(query), series), f"{text} names labels that the result does not have"


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("sum by (camera) (streamd_ready)", "groups"),
        ("streamd_ready and on (stream) streamd_threads", "joins"),
        ("streamd_stream_packets_total / streamd_threads", "joins"),
    ],
)
def test_the_check_sees_a_label_that_is_not_there(query: str, problem: str, series: Series) -> None:
    with pytest.raises(AssertionError, match=problem):
        labels_of(parse(query), series)


def test_the_variables_of_the_dashboard_are_labels_that_are_there(series: Series) -> None:
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    queries = [variable["query"] for variable in variables if variable["type"] == "query"]
    for query in queries:
        asked = re.fullmatch(r"label_values\((?P<metric>\w+)(\{[^}]*\})?, (?P<label>\w+)\)", query)
        assert asked and asked["label"] in {*series[asked["metric"]], *OF_THE_TARGET}, query
    used = set(re.findall(r"\$(\w+)", " ".join(query for query, _ in dashboard_queries().values())))
    assert used <= {variable["name"] for variable in variables} | {name[1:] for name in GRAFANA_TIMES}


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_alert_says_how_bad_it_is_and_what_it_means() -> None:
    for name, rule in alerts().items():
        assert name.startswith("Streamd")
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["annotations"]["summary"]
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}


def assert_firing(tmp_path: Path, series: Mapping[str, str], at: str, *names: str) -> None:
    """Let promtool evaluate the rules over values that are 15 s apart: these alerts fire, each once, and no other."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is missing (Debian: prometheus)")
    expected = [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in names]
    query = 'count by (alertname) (ALERTS{alertstate="firing"})'
    test = {
        "interval": "15s",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [{"expr": query, "eval_time": at, "exp_samples": expected}],
    }
    file = tmp_path / "rules-test.yaml"
    file.write_text(yaml.safe_dump({"rule_files": [str(ALERTS)], "evaluation_interval": "15s", "tests": [test]}))
    done = subprocess.run([promtool, "test", "rules", str(file)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stream_that_tries_in_vain_is_told_of_although_its_state_changes(tmp_path: Path) -> None:
    state = 'streamd_stream_state{{instance="a",job="streamd",stream="gate",state="{}"}}'
    series = {
        state.format("running"): "0x40",
        state.format("ended"): "0x40",
        state.format("connecting"): "1 0 " * 20,
        state.format("unreachable"): "0 1 " * 20,
    }
    assert_firing(tmp_path, series, "1m")
    assert_firing(tmp_path, series, "5m", "StreamdStreamDown")


def test_frames_that_find_the_model_busy_are_told_of(tmp_path: Path) -> None:
    labels = 'instance="a",job="streamd",stream="gate"'
    series = {
        f'streamd_stream_frames_dropped_total{{{labels},reason="replaced"}}': "0+100x160",
        f'streamd_stream_frames_dropped_total{{{labels},reason="corrupt"}}': "0+1x160",
        f"streamd_stream_frames_decoded_total{{{labels}}}": "0+375x160",
    }
    assert_firing(tmp_path, series, "35m", "StreamdFramesReplaced")


def test_a_daemon_that_is_well_sets_off_no_alert(tmp_path: Path, scraped: tuple[Path, str]) -> None:
    series = {}
    for line in scraped[1].splitlines():
        sample = re.fullmatch(r"(?P<name>\w+)(\{(?P<labels>.*)\})? (?P<value>\S+)", line)
        if sample and "gone" not in line and "redis" not in line:
            labels = ",".join(filter(None, ('job="streamd"', sample["labels"])))
            series[f"{sample['name']}{{{labels}}}"] = f"{sample['value']}x240"
    assert len(series) > 50
    assert_firing(tmp_path, series, "50m")


def test_the_docs_have_every_series_and_no_other(series: Series) -> None:
    told = set(re.findall(r"^\| `((?:streamd|process)_\w+)`", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE))
    exported = {re.sub(r"_(bucket|count|sum)$", "", name) for name in series}
    assert told == exported


def test_a_real_daemon_counts_its_streams(scraped: tuple[Path, str]) -> None:
    path, _ = scraped
    text = scrape_until(path, r'streamd_stream_failures_total\{state="not_found",stream="gone"\} [1-9]')
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for sample in chain.from_iterable(family.samples for family in text_string_to_metric_families(text))
    }
    decoded = values["streamd_stream_frames_decoded_total", "gate"]
    results = values["streamd_stream_results_total", "gate"]
    dropped = sum(number for key, number in values.items() if key[0] == "streamd_stream_frames_dropped_total")
    assert 0 < results <= decoded <= values["streamd_stream_packets_total", "gate"]
    # The counts of one scrape are read one after the other, while frames come.
    assert -2 <= decoded - results - dropped <= 4, "what was decoded is processed, dropped, or on its way"
    assert values["streamd_stream_frames_dropped_total", "gate", "thinned"] > 0, "10 frames/s, and fps: 2"
    assert abs(values["streamd_stream_capture_to_publish_seconds_count", "arrival", "gate"] - results) <= 1
    assert abs(values["streamd_model_queue_wait_seconds_count", "cpu", "people"] - results) <= 2
    assert values["streamd_stream_newest_frame_age_seconds", "gate"] < WITHIN_S
    assert ("streamd_stream_newest_frame_age_seconds", "gone") not in values
    assert values["streamd_ready",] == 1


def test_a_real_daemon_tells_that_redis_is_away_and_what_waits_for_it(scraped: tuple[Path, str]) -> None:
    path, _ = scraped
    text = scrape_until(path, r'streamd_spool_entries\{publisher="stored redis [^"]*"\} [1-9]')
    assert re.search(r'streamd_spool_bytes\{publisher="stored redis [^"]*"\} [1-9]', text)
    assert re.search(r'streamd_publisher_connected\{publisher="redis [^"]*"\} 0', text)
    assert re.search(r'streamd_publisher_connected\{publisher="zeromq [^"]*"\} 1', text)


def test_a_real_daemon_is_healthy_and_ready(scraped: tuple[Path, str]) -> None:
    path, _ = scraped
    assert get(path, "/healthz") == (200, "ok\n")
    assert get(path, "/readyz") == (200, "ready\n")
