"""Dynamo's variables for health checks: what is taken, and what is said of a wrong value."""

import json
from pathlib import Path

import pytest

from procs.cli import health
from shared.errors import NodeError


def test_nothing_given_changes_nothing() -> None:
    assert health.read({}) == {} and health.read({"DYN_HEALTH_CHECK_ENABLED": "", "DYN_SYSTEM_HEALTH_PATH": ""}) == {}


def test_all_of_them() -> None:
    found = health.read(
        {
            "DYN_CANARY_WAIT_TIME": "5",
            "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "7",
            "DYN_HEALTH_CHECK_BUSY_STALL": "90",
            "DYN_HEALTH_CHECK_ENABLED": "false",
            "DYN_SYSTEM_HEALTH_PATH": "/healthz",
            "DYN_SYSTEM_LIVE_PATH": "/livez",
            "DYN_SYSTEM_STARTING_HEALTH_STATUS": "ready",
        }
    )
    assert found == {
        "canary_wait": 5.0, "canary_timeout": 7.0, "busy_stall": 90.0, "canaries": False,
        "health_path": "/healthz", "live_path": "/livez", "starting_status": "ready",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DYN_CANARY_WAIT_TIME", "soon"),
        ("DYN_CANARY_WAIT_TIME", "-1"),
        ("DYN_HEALTH_CHECK_REQUEST_TIMEOUT", "0"),
        ("DYN_HEALTH_CHECK_BUSY_STALL", "inf"),
        ("DYN_CANARY_WAIT_TIME", "0.5"),
        ("DYN_HEALTH_CHECK_ENABLED", "True"),
        ("DYN_HEALTH_CHECK_ENABLED", "1"),
        ("DYN_HEALTH_CHECK_ENABLED", "maybe"),
        ("DYN_SYSTEM_STARTING_HEALTH_STATUS", "fine"),
        ("DYN_SYSTEM_HEALTH_PATH", "healthz"),
        ("DYN_SYSTEM_HEALTH_PATH", "/metrics"),
        ("DYN_SYSTEM_LIVE_PATH", "/engine/x"),
        ("DYN_SYSTEM_LIVE_PATH", "/{x}"),
        ("DYN_SYSTEM_LIVE_PATH", "/health"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_variable(name: str, value: str) -> None:
    with pytest.raises(NodeError, match=f"{name}.*: expected") as caught:
        health.read({name: value})
    assert "\n" not in str(caught.value)


GOOD = {"token_ids": [5, 6], "stop_conditions": {"max_tokens": 1}}


def test_the_operator_s_canary_is_checked_at_start(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from procs.engine.check import answer

    def asked(text: str, *flags: str) -> object:
        argv = ["--model-path", str(model), "--device", "cpu", "--discovery-backend", "file", *flags]
        if text:
            argv += ["--health-check-payload", text]
        found = answer({"argv": argv})
        return found.get("error") or found["health_check_payload"]

    file = tmp_path / "canary.json"
    file.write_text(json.dumps(GOOD))
    assert asked("") is None
    assert asked(json.dumps(GOOD)) == asked(f"@{file}") == asked(f"@{file}", "--disaggregation-mode", "decode") == GOOD
    assert asked("@/nowhere.json") == "--health-check-payload @/nowhere.json: No such file or directory"
    for text, words in (("{", "not JSON"), ("[1]", "expected a JSON object, got list"), ('{"prompt": "x"}', "token_ids")):
        said = str(asked(text))
        assert said.startswith("--health-check-payload: ") and words in said and "\n" not in said
    monkeypatch.setenv("DYN_HEALTH_CHECK_PAYLOAD", "[")
    assert "not JSON" in str(asked(""))
