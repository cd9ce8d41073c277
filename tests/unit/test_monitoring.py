"""The dashboard and the alerts: their metrics and labels exist, a real Prometheus takes them, alerts fire when they should."""

import json
import re
import shutil
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from monitoring import ALERTS, DASHBOARD, check, dashboard
from procs.relay import node_metrics
from procs.relay.gpu_metrics import GpuMetrics
from procs.relay.text import expose
from shared.gpus import Gpus
from shared.state import Board
from tests import promql
from tests.harness import wait_for
from tests.monitored import RECORDED
from tests.prometheus import Prometheus
from tests.unit.test_gpu import Library
from tests.unit.test_relay import configure

ROOT = Path(__file__).parents[2]
MONITORING = ROOT / "docs" / "monitoring.md"
TESTS = ALERTS.with_name("alerts_test.yml")
QUERIES = list(check.queries(json.loads(DASHBOARD.read_text())))
RULES = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
LEGEND = re.compile(r"{{(\w+)}}")
ANNOTATED = re.compile(r"\$labels\.(\w+)")
WITHOUT_DATA = {"Processes that are not ready": "all are"}
"""Panels that show nothing of what was recorded, each for a reason."""


@pytest.fixture(scope="module")
def expositions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By job: what a real node and its frontend said, and the GPUs' part with the driver's library replaced."""
    gpus = expose(GpuMetrics(configure(tmp_path_factory.mktemp("gpus")), lambda: Gpus(Library())).families())
    return {
        "sgnode": (RECORDED / "node.txt").read_text() + gpus,
        "sgnode-frontend": (RECORDED / "frontend.txt").read_text(),
    }


@pytest.fixture(scope="module")
def catalogue(expositions: dict[str, str]) -> promql.Catalogue:
    found: dict[str, set[str]] = {"up": set()}
    for text in expositions.values():
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                found.setdefault(sample.name, set()).update(sample.labels)
    return found


def promtool(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    if shutil.which("promtool") is None:
        pytest.skip("needs promtool: Debian's prometheus")
    return subprocess.run(["promtool", *arguments], cwd=cwd, capture_output=True, text=True, timeout=60, check=False)


# --- what is asked for exists ------------------------------------------------------------------------------------------


def test_the_dashboard_in_the_repository_is_the_generated_one() -> None:
    assert DASHBOARD.read_text() == dashboard.text(), "run `python -m monitoring.dashboard`"


def test_grafana_s_own_types_read_it_and_lose_nothing() -> None:
    asked = json.loads(DASHBOARD.read_text())
    again = json.loads(JSONEncoder().encode(Dashboard.from_json(asked)))
    assert again == asked
    panels = asked["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place.get("x", 0), place.get("x", 0) + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells), "panels overlap"
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel}: {query.legend}")
def test_metrics_and_labels_of_a_panel_exist(query: check.Query, catalogue: promql.Catalogue) -> None:
    there = promql.labels_of(check.filled(query.expr), catalogue)
    assert set(LEGEND.findall(query.legend)) <= there


def test_the_variables_ask_for_labels_that_there_are(catalogue: promql.Catalogue) -> None:
    for variable in json.loads(DASHBOARD.read_text())["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"])
            assert match is not None
            if "__name__" not in match[1]:
                assert match[2] in promql.labels_of(check.filled(match[1]), catalogue)
            else:
                names = re.search(r'__name__=~"([\w|]+)"', match[1])
                assert names is not None and set(names[1].split("|")) <= set(catalogue)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_and_what_to_do(rule: dict[str, Any], catalogue: promql.Catalogue) -> None:
    there = promql.labels_of(rule["expr"], catalogue)
    says = rule["annotations"]
    assert set(ANNOTATED.findall(json.dumps(says))) <= there
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert says["summary"] and says["action"]
    assert f"| `{rule['alert']}` | {rule['labels']['severity']} |" in MONITORING.read_text()
    page, _, anchor = says["runbook"].partition("#")
    headings = re.findall(r"^#+ (.*)$", (ROOT / page).read_text(), re.M)
    assert anchor in {re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_what_is_recorded_is_what_the_code_still_says(catalogue: promql.Catalogue) -> None:
    """Of the numbers in the beats; run `python -m tests.monitored MODEL` when it isn't."""
    used = {name for query in QUERIES for name in promql.metrics_of(check.filled(query.expr))}
    used |= {name for rule in RULES for name in promql.metrics_of(rule["expr"])}
    of_beats = {name for name in used if catalogue[name] in ({"process"}, {"process", "dp_rank"}) and "_process_" not in name}
    assert of_beats <= {f"sgnode_{key}" for key in node_metrics.HELP}
    assert len(of_beats) > 10


def test_a_log_that_can_t_be_written_is_a_number(tmp_path: Path) -> None:
    def trouble(document: dict[str, Any]) -> str:
        return node_metrics.render(configure(tmp_path), Board(), {}, document)

    assert "\nsgnode_log_trouble 1.0\n" in trouble({"logs": "engine.log: no space left on device"})
    assert "\nsgnode_log_trouble 0.0\n" in trouble({"logs": ""})
    assert "sgnode_log_trouble" not in trouble({})  # supervisord of an older version


@pytest.mark.parametrize(
    ("query", "says"),
    [
        ("sgnode_nonsense", "there is no metric sgnode_nonsense"),
        ('rate(sgnode_tokens{worker="1"}[1m])', "sgnode_tokens has no label worker"),
        ("sum by (model) (sgnode_tokens)", "sgnode_tokens has no label model"),
        ("sgnode_kv_used_blocks / sgnode_tokens", "has no label dp_rank, process"),
        ("sgnode_kv_used_blocks / on (dp_rank) sgnode_tokens", "has no label dp_rank"),
    ],
)
def test_a_wrong_name_is_seen(query: str, says: str, catalogue: promql.Catalogue) -> None:
    with pytest.raises(promql.Unknown, match=says):
        promql.labels_of(query, catalogue)


# --- promtool ----------------------------------------------------------------------------------------------------------


def test_promtool_takes_rules_and_configuration() -> None:
    for arguments in (("check", "rules", str(ALERTS)), ("check", "config", str(ALERTS.with_name("scrape.yml")))):
        done = promtool(*arguments)
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_when_they_should_and_only_then() -> None:
    done = promtool("test", "rules", str(TESTS))
    assert done.returncode == 0, done.stdout + done.stderr
    cases = [case for each in yaml.safe_load(TESTS.read_text())["tests"] for case in each["promql_expr_test"]]
    for rule in RULES:
        of_rule = [bool(case.get("exp_samples")) for case in cases if f'"{rule["alert"]}"' in case["expr"]]
        assert set(of_rule) == {True, False}, f"{rule['alert']} needs a case that fires and one that doesn't"


@pytest.mark.parametrize("expr", ["vector(1) == 0", "vector(1)"], ids=["never", "always"])
def test_alerts_that_never_or_always_fire_fail_each_of_their_cases(tmp_path: Path, expr: str) -> None:
    text = yaml.safe_load(ALERTS.read_text())
    for group in text["groups"]:
        for rule in group["rules"]:
            rule["expr"] = expr
            rule.pop("for", None)
    (tmp_path / ALERTS.name).write_text(yaml.safe_dump(text))
    shutil.copy(TESTS, tmp_path)
    done = promtool("test", "rules", TESTS.name, cwd=tmp_path)
    assert done.returncode == 1
    assert set(re.findall(r'alertname="(\w+)"', done.stdout + done.stderr)) >= {rule["alert"] for rule in RULES}


# --- a real Prometheus -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", autouse=True)
def scraping(expositions: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus | None]:
    """A Prometheus that scrapes what was recorded. Started with the first test: it takes 5 s until it looks at its targets."""
    if shutil.which("prometheus") is None:
        yield None
        return
    servers = {job: _serving(text) for job, text in expositions.items()}
    targets = {job: [f"127.0.0.1:{server.server_port}"] for job, server in servers.items()}
    try:
        with Prometheus(tmp_path_factory.mktemp("prometheus"), targets, interval="200ms") as prometheus:
            yield prometheus
    finally:
        for server in servers.values():
            server.shutdown()
            server.server_close()


@pytest.fixture
def prometheus(scraping: Prometheus | None) -> Prometheus:
    """It has scraped each target five times or more."""
    if scraping is None:
        pytest.skip("needs Debian's prometheus")
    wait_for("some scrapes", lambda: len(scraping.query("count_over_time(up[1m]) > 4")) == 2, 15)
    return scraping


def _serving(text: str) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    return server


def test_prometheus_answers_each_query_and_loads_the_alerts(prometheus: Prometheus) -> None:
    answers = check.check(prometheus.url, 60, "2s")
    assert [answer for answer in answers if answer.error] == []
    empty = {answer.query.panel for answer in answers} - {answer.query.panel for answer in answers if answer.series}
    assert empty == set(WITHOUT_DATA)
    assert len(answers) == len(QUERIES)
    with urllib.request.urlopen(f"{prometheus.url}/api/v1/rules", timeout=5) as answer:
        groups = json.load(answer)["data"]["groups"]
    assert {rule["name"] for group in groups for rule in group["rules"]} == {rule["alert"] for rule in RULES}
    assert [rule["lastError"] for group in groups for rule in group["rules"] if rule.get("lastError")] == []


def test_the_check_says_what_shows_nothing(prometheus: Prometheus, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.json"
    targets = [{"expr": expr, "legendFormat": ""} for expr in ("up", "sgnode_nonsense", "sum(")]
    wrong.write_text(json.dumps({"panels": [{"id": 1, "type": "timeseries", "title": "wrong", "targets": targets}]}))
    good, empty, refused = check.check(prometheus.url, 60, dashboard=wrong)
    assert len(good.series) == 2 and not good.error
    assert not empty.series and not empty.error
    assert "parse error" in refused.error
