"""The node's own flags: defaults, environment, the YAML file, what is left for the worker, and one line for each mistake."""

from pathlib import Path

import pytest

from procs.cli import flags
from shared.errors import NodeError


def parse(*argv: str, **environ: str) -> flags.NodeFlags:
    return flags.parse(argv, environ)


def test_defaults() -> None:
    found = parse("model")
    assert found.worker_argv == ["--model-path", "model"]
    assert (found.name, found.runtime_dir, found.agents, found.frontend) == ("default", None, 1, None)
    assert (found.http_host, found.http_port, found.system_host, found.system_port) == ("127.0.0.1", 8000, "127.0.0.1", 9090)
    assert (found.drain_grace, found.drain_timeout, found.console) == (5.0, 300.0, True)


def test_the_environment_gives_dynamos_defaults_and_flags_win() -> None:
    environ = {
        "DYN_SYSTEM_PORT": "7001",
        "DYN_SYSTEM_HOST": "0.0.0.0",
        "DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS": "2",
        "DYN_CANARY_WAIT_TIME": "4",
        "DYN_HEALTH_CHECK_REQUEST_TIMEOUT": "6",
    }
    found = parse("m", **environ)
    assert (found.system_port, found.system_host, found.drain_grace) == (7001, "0.0.0.0", 2.0)
    assert found.health == {"canary_wait": 4.0, "canary_timeout": 6.0}
    assert parse("m", "--system-port", "0", "--drain-grace", "1", **environ).drain_grace == 1.0


@pytest.mark.parametrize(("text", "seconds"), [("-3", 0.0), ("soon", 5.0), ("", 5.0)])
def test_an_invalid_grace_period_reads_as_dynamo_reads_it(text: str, seconds: float) -> None:
    assert parse("m", DYN_GRACEFUL_SHUTDOWN_GRACE_PERIOD_SECS=text).drain_grace == seconds


def test_system_port_minus_one_is_dynamos_disabled_and_ours_is_always_there() -> None:
    assert parse("m", DYN_SYSTEM_PORT="-1").system_port == 9090


def test_worker_flags_pass_through_in_order_around_the_nodes_own() -> None:
    found = parse("m", "--tp-size", "2", "--name", "a", "--enable-metrics", "--agents=3", "--lora-paths", "x=y", "z")
    assert found.worker_argv == ["--model-path", "m", "--tp-size", "2", "--enable-metrics", "--lora-paths", "x=y", "z"]
    assert (found.name, found.agents) == ("a", 3)


def test_the_model_may_follow_the_nodes_own_flags() -> None:
    assert parse("--name", "a", "m", "--tp-size", "2").worker_argv == ["--model-path", "m", "--tp-size", "2"]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["--http-port", "70000"], "--http-port"),
        (["--http-port", "-1"], "--http-port"),
        (["--http-port", "http"], "--http-port"),
        (["--agents", "0"], "--agents"),
        (["--agents", "two"], "--agents"),
        (["--drain-grace", "-1"], "--drain-grace"),
        (["--drain-timeout", "nan"], "--drain-timeout"),
        (["--drain-timeout", "inf"], "--drain-timeout"),
        (["--media-timeout", "0"], "--media-timeout"),
        (["--media-timeout", "-1"], "--media-timeout"),
        (["--name", "a/b"], "--name"),
        (["--name", ""], "--name"),
        (["--name", ".."], "--name"),
        (["--name", "a" * 33], "--name"),
        (["--name"], "--name"),
        (["--synthetic", "step=1,"], "--synthetic"),
        (["--synthetic", "step_seconds=fast"], "--synthetic"),
        (["--config", "/nonexistent/node.yaml"], "/nonexistent/node.yaml"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_flag(argv: list[str], names: str) -> None:
    with pytest.raises(NodeError) as caught:
        parse("m", *argv)
    assert names in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["port", "99999", "1.5"])
def test_a_wrong_system_port_in_the_environment_is_an_error_of_that_flag(text: str) -> None:
    with pytest.raises(NodeError, match="--system-port"):
        parse("m", DYN_SYSTEM_PORT=text)


def test_the_synthetic_engines_dials() -> None:
    found = parse("m", "--synthetic", "step_seconds=0.5,tokens_per_step=3,fault=load").synthetic
    assert found is not None and (found.step_seconds, found.tokens_per_step, found.fault) == (0.5, 3, "load")


# --- the YAML file ---------------------------------------------------------------------------------------------------


def from_file(tmp_path: Path, text: str, *argv: str) -> flags.NodeFlags:
    file = tmp_path / "node.yaml"
    file.write_text(text)
    return parse("--config", str(file), *argv)


def test_the_file_has_node_and_worker_flags_with_dashes_or_underscores(tmp_path: Path) -> None:
    found = from_file(tmp_path, "model: m\nhttp_port: 0\nagents: 2\nfrontend: false\ntp_size: 2\nenable-metrics: true\n")
    assert (found.http_port, found.agents, found.frontend) == (0, 2, False)
    assert found.worker_file == {"--model-path": "m", "--tp-size": 2, "--enable-metrics": True}
    assert found.worker_argv == []


def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    found = from_file(tmp_path, "agents: 2\nfrontend: true\nname: a\n", "other", "--agents", "4", "--no-frontend")
    assert (found.name, found.agents, found.frontend) == ("a", 4, False)
    assert found.worker_argv == ["--model-path", "other"]


def test_synthetic_dials_may_be_a_mapping(tmp_path: Path) -> None:
    found = from_file(tmp_path, "synthetic: {step_seconds: 0.5, children: 1}\n").synthetic
    assert found is not None and (found.step_seconds, found.children) == (0.5, 1)


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    assert from_file(tmp_path, "# nothing\n", "m").worker_file == {}


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("{unclosed", "not YAML"),
        ("- a\n- list\n", "mapping"),
        ("just text", "mapping"),
        ("\x00", "not YAML"),
        ("config: other.yaml", "another one"),
        ("agents: [1, 2]", "--agents"),
        ("http-port: true", "--http-port"),
        ("http-port: false", "http-port"),
        ("agents: none", "--agents"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path: Path, text: str, names: str) -> None:
    with pytest.raises(NodeError) as caught:
        from_file(tmp_path, text, "m")
    assert names in str(caught.value) and "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_one_line(tmp_path: Path) -> None:
    file = tmp_path / "node.yaml"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(NodeError, match=r"node\.yaml"):
        parse("m", "--config", str(file))
