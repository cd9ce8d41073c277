"""supervisorctl's side: the ``node`` command, and ``agent`` as the name of all agents."""

import json
from collections.abc import Callable
from typing import Any

from supervisor.supervisorctl import ControllerPluginBase, LSBStatusExitStatuses

from shared.table import render

GROUP = "agent"
"""numprocs names the processes agent:0, agent:1, ...; supervisor 4.3 then calls plain ``agent`` "no such process"."""
WHOLE_GROUP = ("start", "stop", "restart", "status", "signal")
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
            setattr(controller, f"do_{command}", self._for_group(getattr(stock, f"do_{command}")))
        for command in ONE_BY_ONE:
            setattr(controller, f"do_{command}", self._for_each(getattr(stock, f"do_{command}")))

    def do_node(self, _arg: str) -> None:
        """node\t\t\tThe node's state and its processes"""
        try:
            document = json.loads(self.ctl.get_server_proxy("sgnode").node())
        except OSError as error:
            self.ctl.output(f"no node answers at {self.ctl.options.serverurl}: {error.strerror}")
            self.ctl.exitstatus = LSBStatusExitStatuses.NOT_RUNNING
            return
        self.ctl.output(render(document))
        if document.get("state") != "ready":
            self.ctl.exitstatus = LSBStatusExitStatuses.UNKNOWN

    @staticmethod
    def _for_group(stock: Callable[[str], Any]) -> Callable[[str], Any]:
        def run(arg: str) -> Any:
            return stock(" ".join(f"{GROUP}:*" if word == GROUP else word for word in arg.split()))

        return run

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
