"""The keeper's loop: pidfds on every process of the engine, its death said at once, everything freed before the end."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zmq

from procs.keeper import child, leftovers, life, stopped, tree
from procs.keeper.cgroup import Cgroup
from procs.keeper.life import Life
from shared import gpus
from shared.config import NodeConfig
from shared.frames import Beat, Death, EngineState
from shared.gpus import Gpus
from shared.heart import Heart
from shared.prctl import become_subreaper
from shared.sockets import Decoder, LoopSocket, subscriber
from shared.state import State

SCAN_LOADING_SECONDS = 0.25
SCAN_SECONDS = 1.0
"""How often new processes of the engine are looked for: often while it loads, when its children appear."""
LOOK_SECONDS = 0.02
"""How often each process is looked at for its being about to end. A look takes some 10 µs."""
LOADING_GRACE_SECONDS = 3.0
"""From SIGTERM to SIGKILL for an engine that has nothing to drain yet."""
REAP_MARGIN_SECONDS = 5.0
"""Kept of supervisord's stopwaitsecs for killing and reaping what the engine left."""
KILL_AGAIN_SECONDS = 0.05
KILL_SIGNAL = signal.SIGUSR1
"""To the keeper: the engine shall die now. From the coordinator when it hangs, from the kernel when supervisord is gone."""
EPOCH_SIGNAL = signal.SIGUSR2
"""To the keeper, from the coordinator: the engine shall die now, its group's epoch is over and its peers may never answer."""
OURS = {signal.SIGTERM, signal.SIGINT, KILL_SIGNAL, EPOCH_SIGNAL}
HELD_SECONDS = 20.0
"""A killed process that is still there, or GPU memory that is still taken, after so long is told as a failure of the host."""


@dataclass
class Watched:
    """A live process of the engine."""

    pidfd: int
    stat: int
    """Its /proc/PID/stat, opened once."""
    title: str

    @classmethod
    def open(cls, pid: int) -> "Watched":
        """Raises OSError when the process is gone."""
        pidfd = os.pidfd_open(pid)
        try:
            return cls(pidfd, os.open(f"/proc/{pid}/stat", os.O_RDONLY), tree.title(pid))
        except OSError:
            os.close(pidfd)
            raise

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.stat)

    def end_status(self) -> int | None:
        """As tree.end_status."""
        with contextlib.suppress(OSError):
            return tree.end_status(os.pread(self.stat, 1024, 0).decode(errors="replace"))
        return None


def keep(config: NodeConfig, command: Sequence[str], stop_wait: float) -> int:
    """Start the engine and keep it until it ends; the exit code. ``stop_wait``: supervisord's stopwaitsecs for this program.

    Raises OSError when the engine can't be started, TimeoutError when an earlier one can't be removed.
    """
    runtime_dir = config.path
    parent = os.getppid()
    become_subreaper()
    cgroup = Cgroup.make(runtime_dir)
    leftovers.clear(runtime_dir, cgroup)
    own = life.begin(runtime_dir)
    # A SIGTERM that comes while there is no handler yet waits for it: the engine must not be left behind.
    signal.pthread_sigmask(signal.SIG_BLOCK, OURS)
    pid = child.start(command, {**os.environ, **own.environment(runtime_dir)}, cgroup)
    logging.info("engine %d: pid %d%s", own.incarnation, pid, "" if cgroup is None else ", with its own cgroup")
    try:
        return asyncio.run(Keeper(config, own, pid, cgroup, stop_wait, parent).run())
    finally:
        if cgroup is not None:
            cgroup.remove()
        own.end()


class Keeper:
    """One engine's life, from its start to the last of its processes."""

    def __init__(
        self, config: NodeConfig, own: Life, engine_pid: int, cgroup: Cgroup | None, stop_wait: float, parent: int
    ) -> None:
        self._config = config
        self._incarnation = own.incarnation
        self._epoch = own.epoch
        self._engine = engine_pid
        self._forked = time.time()
        self._cgroup = cgroup
        self._stop_wait = stop_wait
        self._parent = parent
        self._watched: dict[int, Watched] = {}
        self._statuses: dict[int, int] = {}
        self._engine_gone = asyncio.Event()
        self._stop_asked = asyncio.Event()
        self._child_event = asyncio.Event()
        self._childless = False
        self._engine_state: str = State.STARTING
        self._death: Death | None = None
        self._epoch_ended = False
        """It was ended for its group's sake: no failure of its own."""
        self._seen: set[int] = set()
        """Every process that the engine ever had."""

    async def run(self) -> int:
        """Until nothing of the engine is left. 0 after a stop that was asked for, otherwise not 0."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self._stop_asked.set)
        loop.add_signal_handler(signal.SIGINT, self._stop_asked.set)
        loop.add_signal_handler(signal.SIGCHLD, self._reap)
        loop.add_signal_handler(KILL_SIGNAL, self._kill_asked)
        loop.add_signal_handler(EPOCH_SIGNAL, self._epoch_over)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, OURS)
        self._watch(self._engine)
        self._heart = Heart(self._config.path, "keeper", incarnation=self._incarnation, epoch=self._epoch)
        self._heart.repeat = lambda: [] if self._death is None else [self._death]
        self._heart.marks["forked"] = self._forked
        self._heart.start()
        self._heart.set(State.READY, info={"engine_pid": str(self._engine)})
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        decoder: Decoder[EngineState] = Decoder(EngineState, "engine")
        states = LoopSocket(subscriber(context, self._config.path, ["engine"]), self._hear(decoder))
        watching = [loop.create_task(self._scan()), loop.create_task(self._look())]
        finding = loop.create_task(asyncio.to_thread(gpus.find))
        try:
            await self._either(self._engine_gone, self._stop_asked)
            if not self._engine_gone.is_set():
                await self._stop_engine()
            for task in watching:
                task.cancel()
            await self._clear(await finding)
            return self._exit_code()
        finally:
            for task in watching:
                task.cancel()
            states.close()
            context.term()
            self._heart.close()

    @staticmethod
    async def _either(*events: asyncio.Event) -> None:
        tasks = [asyncio.ensure_future(event.wait()) for event in events]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()

    def _hear(self, decoder: Decoder[EngineState]) -> Callable[[list[bytes]], None]:
        def on_message(parts: list[bytes]) -> None:
            frame = decoder.decode(parts[0])
            if isinstance(frame, Beat) and frame.incarnation == self._incarnation:
                self._engine_state = frame.state

        return on_message

    # --- watching ---

    def _watch(self, pid: int) -> None:
        known = self._watched.get(pid)
        if known is not None:
            known.title = tree.title(pid) or known.title
            return
        try:
            watched = self._watched[pid] = Watched.open(pid)
        except OSError:  # gone already
            if pid == self._engine:
                self._ended(pid)
            return
        self._seen.add(pid)
        asyncio.get_running_loop().add_reader(watched.pidfd, self._ended, pid)

    async def _scan(self) -> None:
        still = stopped.Stopped()
        while True:
            for pid in tree.descendants(os.getpid()):
                self._watch(pid)
            words = still.look({pid: self._who(pid, watched.title) for pid, watched in self._watched.items()})
            ending = self._death is not None or self._stop_asked.is_set()
            if words != self._heart.beat.info.get("stopped", "") and not ending:
                logging.warning("%s", words or "what was stopped runs again")
                self._heart.set(State.READY, words, info={**self._heart.beat.info, "stopped": words})
            loading = self._engine_state in (State.STARTING, State.LOADING, State.WARMING)
            await asyncio.sleep(SCAN_LOADING_SECONDS if loading else SCAN_SECONDS)

    async def _look(self) -> None:
        """See that a process is about to end long before its pidfd says so; the engine first, whose children die with it."""
        while self._death is None and not self._stop_asked.is_set():
            for pid, watched in sorted(self._watched.items(), key=lambda item: item[0] != self._engine):
                who = self._who(pid, watched.title)
                if who is not None and (status := watched.end_status()) is not None:
                    self._statuses.setdefault(pid, status)
                    self._say_death(who, pid, watched.title)
                    break
            await asyncio.sleep(LOOK_SECONDS)

    def _who(self, pid: int, title: str) -> str | None:
        """Who of the engine a process is, None for one that it can do without."""
        return "engine" if pid == self._engine else tree.essential(title)

    def _ended(self, pid: int) -> None:
        """A watched process is dead (its pidfd is readable)."""
        watched = self._watched.pop(pid, None)
        if watched is not None:
            asyncio.get_running_loop().remove_reader(watched.pidfd)
            watched.close()
        # The title may be newer than the last look at it; a zombie still has the beginning.
        names = (watched.title if watched else "", tree.title(pid))
        who = next((who for name in names if (who := self._who(pid, name))), None)
        if who is not None and self._death is None and not self._stop_asked.is_set():
            if self._dead(self._engine):
                # Children that die with their parent may be seen before it.
                self._say_death("engine", self._engine, "")
            else:
                self._say_death(who, pid, names[0])
        if pid == self._engine:
            self._engine_gone.set()

    def _dead(self, pid: int) -> bool:
        return pid in self._statuses or tree.status(pid) is not None

    def _say_death(self, who: str, pid: int, name: str, why: str = "") -> None:
        """Say it, then kill the rest: the frame is on its way before anything else is done. ``why`` it was killed by us."""
        status = self._statuses.get(pid, tree.status(pid))
        label = f"{who} {name}" if who != "engine" and name else who
        how = f"was killed: {why}" if why else "ended" if status is None else tree.how(status)
        reason = f"{label} (pid {pid}) {how}"
        self._death = Death(self._incarnation, who, pid, reason, time.time())
        self._heart.publish(self._death)
        self._kill_all()
        self._heart.set(State.FAILED, reason)
        logging.error("engine %d is dead: %s", self._incarnation, reason)

    def _kill_asked(self) -> None:
        """KILL_SIGNAL: end the engine without a word to it; whoever waits for its tokens is told."""
        self._kill("supervisord is gone" if os.getppid() != self._parent else "it hangs")

    def _epoch_over(self) -> None:
        """EPOCH_SIGNAL."""
        self._epoch_ended = self._death is None
        self._kill("its epoch is over")

    def _kill(self, why: str) -> None:
        if self._death is None:
            logging.error("the engine is killed: %s", why)
            self._say_death("engine", self._engine, "", why)

    # --- ending ---

    async def _stop_engine(self) -> None:
        """SIGTERM to the engine alone, then its time; whatever happens it is dead afterwards."""
        loading = self._engine_state in (State.STARTING, State.LOADING)
        grace = LOADING_GRACE_SECONDS if loading else max(1.0, self._stop_wait - REAP_MARGIN_SECONDS)
        logging.info("stopping the engine (%s), at most %.0f s", self._engine_state, grace)
        self._heart.set(State.DRAINING, "the engine is stopping")
        watched = self._watched.get(self._engine)
        if watched is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watched.pidfd, signal.SIGTERM)
        try:
            async with asyncio.timeout(grace):
                await self._engine_gone.wait()
        except TimeoutError:
            logging.warning("the engine did not stop in %.0f s and is killed", grace)

    def _kill_all(self) -> None:
        if self._cgroup is not None:
            self._cgroup.kill()
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._engine, signal.SIGKILL)
        # Also with a cgroup: entering it may have failed.
        for pid in tree.descendants(os.getpid()):
            tree.kill(pid)

    def _reap(self) -> None:
        """Take every dead child; ``_childless`` when there is none at all any more."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._childless = True
                break
            if pid == 0:
                break
            self._statuses[pid] = status
        self._child_event.set()

    async def _clear(self, memory: Gpus | None) -> None:
        """Kill and reap until nothing is left. No deadline: an exit before that would start an engine beside this one."""
        began = time.monotonic()
        self._reap()
        while held := self._left(memory):
            if time.monotonic() - began > HELD_SECONDS and held != self._heart.beat.info.get("held", ""):
                logging.error("%s", held)
                self._heart.set(State.FAILED, held, info={**self._heart.beat.info, "held": held})
            self._kill_all()
            self._child_event.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_AGAIN_SECONDS):
                    await self._child_event.wait()
        if self._death is None:
            self._heart.set(State.STOPPED, "")
        logging.info("engine %d: nothing of it is left", self._incarnation)

    def _left(self, memory: Gpus | None) -> str:
        """What an engine that was killed still holds, in words; empty when nothing."""
        if not self._childless:
            alive = [f"{pid} ({tree.title(pid)}, state {tree.state(pid)})" for pid in tree.descendants(os.getpid())]
            return f"killed, but not gone: pid {', '.join(alive)}" if alive else "killed processes are being reaped"
        held = memory.held(self._seen) if memory is not None else []
        return f"GPU memory of dead processes is not given back: {'; '.join(held)}" if held else ""

    def _exit_code(self) -> int:
        if self._death is None or self._epoch_ended:
            return 0
        status = self._statuses.get(self._engine, 0)
        return os.WEXITSTATUS(status) or 1 if os.WIFEXITED(status) else 1
