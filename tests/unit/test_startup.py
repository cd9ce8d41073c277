"""The timeline of a start-up, from configuration and beats to seconds by phase and the line in the status."""

from typing import Any

from procs.coordinator.startup import StartUp
from shared import table
from shared.config import NodeConfig
from shared.frames import Beat

LOG = {"imported": 110.0, "children": 115.5, "weights": 116.0, "loaded": 120.0, "pool": 121.0}


def node(engine: str = "sglang", nnodes: int = 1) -> NodeConfig:
    return NodeConfig(
        name="n", runtime_dir="/r", version="1", role="aggregated", model_path="/m", served_model_name="m",
        engine=engine, nnodes=nnodes, begun=100.0, checked=104.0,
    )  # fmt: skip


def keeper(incarnation: int, forked: float) -> Beat:
    return Beat("keeper", 7, "ready", "", forked + 0.1, "", incarnation, 0, marks={"forked": forked})


def engine(incarnation: int, state: str, since: float, **marks: float) -> Beat:
    return Beat("engine", 8, state, "", since, "", incarnation, 0, marks=marks)


def first(startup: StartUp) -> None:
    """A node's first engine, up to its load."""
    startup.up(104.5)
    startup.asked(104.5)
    startup.hear(keeper(1, 105.0))
    startup.hear(engine(1, "loading", 105.2))


def document(startup: StartUp, *, alive: bool = True) -> dict[str, Any]:
    found = startup.document(alive=alive)
    assert found is not None
    return found


def line(startup: StartUp, now: float = 0.0, *, alive: bool = True) -> list[str]:
    return table.startup_lines({"startup": document(startup, alive=alive)}, now)


def test_each_phase_ends_where_its_mark_says_and_the_next_goes_on() -> None:
    startup = StartUp(node())
    assert line(startup, 104.2) == ["  start-up: 4.2 s so far = check 4.0, processes for 0.2 so far"]
    first(startup)
    assert line(startup, 107.0) == ["  start-up: 7.0 s so far = check 4.0, processes 0.5, keeper 0.5, imports for 2.0 so far"]
    startup.hear(engine(1, "loading", 105.2, imported=110.0))
    assert document(startup)["current"] == "children"
    startup.hear(engine(1, "warming", 121.5, **LOG))
    assert document(startup)["current"] == "graphs"
    startup.hear(engine(1, "ready", 122.0, **LOG))
    assert document(startup)["current"] == "registered" and not document(startup)["done"]
    startup.node_is("warming", 122.1)
    startup.node_is("ready", 122.25)
    startup.node_is("ready", 130.0)
    assert line(startup) == [
        "  start-up: 22.2 s = check 4.0, processes 0.5, keeper 0.5, imports 5.0, SGLang's processes 5.5, init 0.5, weights 4.0, "
        "KV cache 1.0, warm-up 1.0, registered 0.2"
    ]


def test_the_end_of_the_graphs_is_of_the_last_ones() -> None:
    startup = StartUp(node())
    first(startup)
    startup.hear(engine(1, "loading", 105.2, **LOG, captured=125.0))
    startup.hear(engine(1, "ready", 131.0, **LOG, captured=130.0))
    assert document(startup)["phases"]["graphs"] == 9.0 and document(startup)["phases"]["warm_up"] == 1.0


def test_an_engine_that_logs_nothing_has_a_load() -> None:
    for startup in (StartUp(node("synthetic")), StartUp(node())):
        first(startup)
        startup.hear(engine(1, "warming", 111.0))
        startup.hear(engine(1, "ready", 112.0))
        startup.node_is("ready", 112.5)
        assert list(document(startup)["phases"].items())[3:] == [("load", 6.0), ("warm_up", 1.0), ("registered", 0.5)]
    startup = StartUp(node("synthetic"))
    first(startup)
    assert document(startup)["current"] == "load"


def test_a_group_waits_for_its_ranks() -> None:
    startup = StartUp(node(nnodes=2))
    startup.up(104.5)
    assert document(startup)["current"] == "ranks"
    startup.asked(164.5)
    startup.hear(keeper(1, 165.0))
    assert document(startup)["phases"] == {"check": 4.0, "processes": 0.5, "ranks": 60.0, "keeper": 0.5}


def test_the_next_engine_s_is_its_own() -> None:
    startup = StartUp(node())
    first(startup)
    assert line(startup, 106.0, alive=False) == [], "dead, and not asked for again"
    startup.asked(200.0)
    startup.hear(keeper(1, 105.0))  # the last word of the one before
    assert document(startup)["incarnation"] == 0 and document(startup)["phases"] == {}
    startup.hear(keeper(2, 200.5))
    startup.hear(engine(1, "ready", 112.0, **LOG))
    startup.hear(engine(2, "loading", 200.6))
    startup.hear(engine(2, "ready", 210.0))
    startup.node_is("ready", 210.0)
    found = document(startup)
    assert (found["incarnation"], found["begun"], found["seconds"], found["done"]) == (2, 200.0, 10.0, True)
    startup.hear(keeper(3, 300.0))
    assert document(startup)["begun"] == 300.1, "started by hand"


def test_the_next_coordinator_goes_on_with_it() -> None:
    before, after = StartUp(node()), StartUp(node())
    first(before)
    after.remember(document(before))
    after.up(150.0)
    for startup in (before, after):
        startup.hear(keeper(1, 105.0))
        startup.hear(engine(1, "ready", 122.0, **LOG))
        startup.node_is("ready", 122.5)
    assert document(before) == document(after)
    after.remember(None)
    late = StartUp(node())
    late.up(150.0)
    late.hear(keeper(3, 120.0))
    assert "check" not in document(late)["phases"], "an engine later than the node's first"


def test_a_node_that_shall_not_serve_has_nothing_to_register() -> None:
    startup = StartUp(node())
    first(startup)
    startup.hear(engine(1, "ready", 122.0, **LOG))
    startup.node_is("drained", 122.5)
    startup.node_is("ready", 500.0)
    assert document(startup)["done"] and document(startup)["seconds"] == 22.0
    assert "registered" not in document(startup)["phases"]
