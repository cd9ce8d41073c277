"""Frames of this build and of the recorded older one understand each other: fields are only ever appended."""

import inspect
from types import ModuleType
from typing import Any, get_args, get_type_hints

import msgspec
import pytest

from shared import frames as now
from tests.recorded import frames_v1 as before

UNIONS = ("ToEngine", "FromEngine", "EngineState", "KeeperState", "RelayState", "ProberState", "CoordinatorState", "AnyState")
SAMPLES: dict[Any, Any] = {str: "text", int: 7, float: 0.5, bool: True}


def structs(module: ModuleType) -> dict[str, type[msgspec.Struct]]:
    found = inspect.getmembers(module, lambda m: inspect.isclass(m) and issubclass(m, module.Frame) and m is not module.Frame)
    return dict(found)


def sample(module: ModuleType, kind: type[msgspec.Struct]) -> msgspec.Struct:
    """A frame with every field filled."""
    hints = get_type_hints(kind)
    return kind(*(value(module, hints[field.name]) for field in msgspec.structs.fields(kind)))


def value(module: ModuleType, hint: Any) -> Any:
    if hint in SAMPLES:
        return SAMPLES[hint]
    if inspect.isclass(hint) and issubclass(hint, msgspec.Struct):
        return sample(module, hint)
    origin, arguments = getattr(hint, "__origin__", None), get_args(hint)
    if origin is list:
        return [value(module, arguments[0])]
    if origin is dict:
        return {value(module, arguments[0]): value(module, arguments[1])}
    if arguments:
        return value(module, arguments[0])
    return "anything"


@pytest.mark.parametrize("name", sorted(structs(before)))
def test_the_older_build_s_frames_mean_the_same_now(name: str) -> None:
    old = sample(before, structs(before)[name])
    new = msgspec.msgpack.decode(msgspec.msgpack.encode(old), type=structs(now)[name])
    assert begins(plain(new), plain(old)), (old, new)


def plain(frame: msgspec.Struct) -> Any:
    """As it is on the wire: arrays in arrays."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(frame))


def begins(longer: Any, shorter: Any) -> bool:
    """The shorter one is the longer one's beginning, at every depth: fields may have been appended anywhere."""
    if not isinstance(shorter, list):
        return bool(longer == shorter)
    return isinstance(longer, list) and len(longer) >= len(shorter) and all(map(begins, longer, shorter))


def test_the_comparison_would_notice_a_change_at_any_depth() -> None:
    assert begins(["a", [1, [2, 3]], 9], ["a", [1, [2]]])
    for changed in (["b", [1, [2]]], ["a", [1, [3]]], ["a", [1, []]], ["a", [1, 2]], ["a"]):
        assert not begins(changed, ["a", [1, [2]]])


@pytest.mark.parametrize("name", sorted(structs(before)))
def test_the_older_build_takes_this_build_s_frames(name: str) -> None:
    new = sample(now, structs(now)[name])
    old = msgspec.msgpack.decode(msgspec.msgpack.encode(new), type=structs(before)[name])
    for field in msgspec.structs.fields(type(old)):
        if field.type in SAMPLES:
            assert getattr(old, field.name) == getattr(new, field.name)


def test_no_frame_has_left_its_socket() -> None:
    for union in UNIONS:
        tags = {kind.__struct_config__.tag for kind in get_args(getattr(before, union))}
        assert tags <= {kind.__struct_config__.tag for kind in get_args(getattr(now, union))}, union


def test_the_check_would_notice_a_reordered_field() -> None:
    class Beat(before.Frame, tag="Beat"):
        pid: int
        process: str

    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(msgspec.msgpack.encode(sample(before, before.Beat)), type=Beat)
