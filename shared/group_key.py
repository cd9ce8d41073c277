"""The group's key: one CURVE key pair in a file that every node has. Whoever has the file belongs to the group."""

import tempfile
from pathlib import Path

import zmq
import zmq.auth

from shared.errors import NodeError

Key = tuple[bytes, bytes]
"""Public and secret key, Z85."""
FLAG = "--group-key-file"


def load(file: str | None) -> Key | None:
    """The key in the file; None without a file. Raises NodeError naming the flag when it is not one, or others may read it."""
    if file is None:
        return None
    path = Path(file)
    try:
        if path.stat().st_mode & 0o077:
            raise NodeError(f"{FLAG} {file}: others can read it; `chmod 600 {file}`")
        public, secret = zmq.auth.load_certificate(path)
    except OSError as error:
        raise NodeError(f"{FLAG} {file}: {error.strerror or 'no such file'}") from error
    except ValueError as error:
        raise NodeError(f"{FLAG} {file}: not a group's key; `sgnode group-key FILE` makes one") from error
    if secret is None or len(public) != 40 or len(secret) != 40:
        raise NodeError(f"{FLAG} {file}: not a group's key; `sgnode group-key FILE` makes one")
    return public, secret


def make(path: Path) -> None:
    """Write a new key, readable by its owner only. Raises NodeError when there is a file already, or it can't be written."""
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as place:
            _public, written = zmq.auth.create_certificates(place, "group", {"for": "the nodes of one sgnode group"})
            Path(written).chmod(0o600)
            path.hardlink_to(written)
    except FileExistsError as error:
        raise NodeError(f"FILE {path}: exists; a new key would lock out the nodes that have the old one") from error
    except OSError as error:
        raise NodeError(f"FILE {path}: {error.strerror}") from error


def use(sock: zmq.Socket[bytes], key: Key | None, *, server: bool) -> None:
    """Let a socket speak with holders of the key only; with everybody when there is none."""
    if key is None:
        return
    sock.curve_publickey, sock.curve_secretkey = key
    if server:
        sock.curve_server = True
    else:
        sock.curve_serverkey = key[0]
