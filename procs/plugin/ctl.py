"""supervisorctl's side: ``node``, ``drain`` and ``resume``, and ``agent`` as the name of all agents."""

import xmlrpc.client
from collections.abc import Callable
from pathlib import Path
from typing import Any

from supervisor.supervisorctl import ControllerPluginBase, LSBInitExitStatuses, LSBStatusExitStatuses

from procs.plugin.guard import start_refusal
from shared import config, rolling
from shared.errors import NodeError
from shared.table import render

GROUP = "agent"
"""numprocs names the processes agent:0, agent:1, ...; supervisor 4.3 then calls plain ``agent`` "no such process"."""
WHOLE_GROUP = ("start", "stop", "status", "signal")
"""Commands that understand ``agent:*``."""
ONE_BY_ONE = ("tail", "pid", "clear", "fg")
"""Commands that know single processes only."""


class NodeCommands(ControllerPluginBase):  # type: ignore[misc]
    """A plugin of supervisorctl's Controller, which asks the stock plugin first.

    It asks itself before any plugin, so the shorthand goes there: as attributes of this one controller, the stock
    commands behind them unchanged.
    """

    name = "sgnode"

    def __init__(self, controller: Any) -> None:
        super().__init__(controller)
        stock = controller.options.plugins[0]
        for command in WHOLE_GROUP:
            setattr(controller, f"do_{command}", self._for_group(command, getattr(stock, f"do_{command}")))
        for command in ONE_BY_ONE:
            setattr(controller, f"do_{command}", self._for_each(getattr(stock, f"do_{command}")))
        controller.do_restart = self._restart(stock.do_restart)

    @property
    def _directory(self) -> Path:
        return Path(str(self.ctl.options.serverurl).removeprefix("unix://")).parent

    def do_node(self, _arg: str) -> None:
        """node\t\t\tThe node's state and its processes"""
        try:
            document = rolling.document(self._directory)
        except NodeError as error:
            self.ctl.output(str(error))
            self.ctl.exitstatus = LSBStatusExitStatuses.NOT_RUNNING
            return
        self.ctl.output(render(document))
        if document.get("state") != "ready":
            self.ctl.exitstatus = LSBStatusExitStatuses.UNKNOWN

    def do_drain(self, _arg: str) -> None:
        """drain\t\t\tLeave discovery and let streams finish; the engine stays up"""
        if self._tried(lambda: rolling.want_drain(self._directory, "drained by `supervisorctl drain`")):
            self.ctl.output("draining; `node` shows how it goes, `resume` takes it back")

    def do_resume(self, _arg: str) -> None:
        """resume\t\t\tServe again after a drain"""
        if self._tried(lambda: rolling.resume(self._directory)):
            self.ctl.output("serving again as soon as it is registered; `node` shows how it goes")

    def _restart(self, stock: Callable[[str], Any]) -> Callable[[str], Any]:
        """Agents one after the other, so that the node goes on serving; everything else as ever."""

        def run(arg: str) -> None:
            names = rolling.agents(self._directory)
            words = arg.split()
            chosen = names if {GROUP, f"{GROUP}:*"} & set(words) else [name for name in names if name in words]
            rest = [word for word in words if word not in (GROUP, f"{GROUP}:*", *names)]
            if chosen:
                known = config.load(self._directory)
                rolling.restart_agents(self._directory, chosen, known.drain_grace + known.drain_timeout, self.ctl.output)
            if rest or not words:
                stock(" ".join(rest))

        return lambda arg: self._tried(lambda: run(arg))

    def _tried(self, call: Callable[[], Any]) -> bool:
        """Run it; what is refused is one line and a failure."""
        try:
            call()
        except NodeError as error:
            self.ctl.output(f"ERROR ({error})")
        except xmlrpc.client.Fault as fault:
            self.ctl.output(f"ERROR ({fault.faultString.partition(': ')[2] or fault.faultString})")
        else:
            return True
        self.ctl.exitstatus = LSBInitExitStatuses.GENERIC
        return False

    def _for_group(self, command: str, stock: Callable[[str], Any]) -> Callable[[str], Any]:
        def run(arg: str) -> None:
            if command == "start" and arg:
                # supervisorctl 4.3 knows no words for a start that is refused.
                arg = " ".join(word for word in arg.split() if not self._refused(word))
                if not arg:
                    return
            words = " ".join(f"{GROUP}:*" if word == GROUP else word for word in arg.split())
            self._tried(lambda: stock(words))

        return run

    def _refused(self, name: str) -> bool:
        """Say why this rank does not start a program, and what to type instead."""
        why = start_refusal(config.load(self._directory), name.partition(":")[0])
        if why:
            self.ctl.output(f"{name}: refused: {why}")
            self.ctl.exitstatus = LSBInitExitStatuses.GENERIC
        return bool(why)

    def _for_each(self, stock: Callable[[str], Any]) -> Callable[[str], Any]:
        def run(arg: str) -> Any:
            words = arg.split()
            if GROUP not in words:
                return stock(arg)
            infos = self.ctl.get_supervisor().getAllProcessInfo()
            names = sorted(f"{GROUP}:{info['name']}" for info in infos if info["group"] == GROUP)
            for name in names:
                if len(names) > 1:
                    self.ctl.output(f"==> {name} <==")
                stock(" ".join(name if word == GROUP else word for word in words))
            return None

        return run
