"""supervisor's own RPC methods, less those that would cut every stream: each of these answers what to type instead."""

from typing import Any

from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.xmlrpc import Faults, RPCError

from shared.config import NodeConfig

ENGINE = "engine"
LEADERS = ("agent", "frontend")
"""Programs that rank 0 alone has."""
STOP_ALL = "it would cut every running stream. Type `sgnode stop` (it drains first), `sgnode stop --now`, or `shutdown` in here"
STOP_ENGINE = "it would cut every running stream. Type `sgnode restart engine` (it drains first), or `sgnode drain` before this"
GROUP = "the engines of a group start and stop together. Type `sgnode restart engine` on rank 0 (it drains), or `sgnode stop`"
RELOAD = "it would restart the whole node. Type `update` to take up a changed supervisor.conf, or `sgnode restart`"


def start_refusal(config: NodeConfig, group: str) -> str:
    """Why this rank of a group doesn't start a program by hand, and what to type instead; empty when it does."""
    if config.nnodes > 1 and group == ENGINE:
        return GROUP
    if group in LEADERS and not config.leads:
        where = f"rank 0 ({config.dist_init_addr}) has it; this is rank {config.node_rank} of {config.nnodes}"
        return f"{where}. Type it there"
    return ""


def _refuse(what: str, why: str) -> RPCError:
    return RPCError(Faults.FAILED, f"{what} is refused: {why}")


class GuardedRPC(SupervisorNamespaceRPCInterface):  # type: ignore[misc]
    """The namespace ``supervisor``. SIGTERM and ``shutdown`` stop in order, so they stay as they are."""

    def stopAllProcesses(self, wait: bool = True) -> Any:
        """Refused: stops without an order

        @param boolean wait    Wait for each process to be fully stopped
        @return array result   Never
        """
        raise _refuse("`stop all`", STOP_ALL)

    def stopProcess(self, name: str, wait: bool = True) -> Any:
        """Stop a process named by name; the engine only when the node does not serve

        @param string name         The name of the process to stop (or 'group:name')
        @param boolean wait        Wait for the process to be fully stopped
        @return boolean result     Always return True unless error
        """
        self._look(name.partition(":")[0])
        return super().stopProcess(name, wait)

    def stopProcessGroup(self, name: str, wait: bool = True) -> Any:
        """Stop all processes in the process group named 'name'; the engine's only when the node does not serve

        @param string name     The group name
        @param boolean wait    Wait for each process to be fully stopped
        @return array result   An array of process status info structs
        """
        self._look(name)
        return super().stopProcessGroup(name, wait)

    def startProcess(self, name: str, wait: bool = True) -> Any:
        """Start a process; in a group the engine is started by the coordinator alone

        @param string name         Process name (or group:name, or group:*)
        @param boolean wait        Wait for process to be fully started
        @return boolean result     Always true unless error
        """
        self._look_at_start(name.partition(":")[0])
        return super().startProcess(name, wait)

    def startProcessGroup(self, name: str, wait: bool = True) -> Any:
        """Start all processes in the group named 'name'

        @param string name     The group name
        @param boolean wait    Wait for each process to be fully started
        @return array result   An array of process status info structs
        """
        self._look_at_start(name)
        return super().startProcessGroup(name, wait)

    def startAllProcesses(self, wait: bool = True) -> Any:
        """Start all processes; refused in a group, whose engines start together

        @param boolean wait    Wait for each process to be fully started
        @return array result   An array of process status info structs
        """
        if self._config is not None and self._config.nnodes > 1:
            raise _refuse("`start all`", GROUP)
        return super().startAllProcesses(wait)

    def shutdown(self) -> Any:
        """Stop the node: as SIGTERM does

        @return boolean result always returns True unless error
        """
        plugin = self._plugin
        return True if plugin is not None and plugin.hold() else super().shutdown()

    def restart(self) -> Any:
        """Refused: supervisord would start over with everything

        @return boolean result  Never
        """
        raise _refuse("`reload`", RELOAD)

    @property
    def _plugin(self) -> Any:
        # Set by the plugin, which the same supervisord loads beside this.
        return getattr(self.supervisord, "sgnode", None)

    @property
    def _config(self) -> NodeConfig | None:
        return None if self._plugin is None else self._plugin.config

    def _look(self, group: str) -> None:
        config = self._config
        if group == ENGINE and config is not None and config.nnodes > 1:
            raise _refuse("`stop engine`", GROUP)
        if group == ENGINE and self._plugin is not None and self._plugin.serves:
            raise _refuse("`stop engine`", STOP_ENGINE)

    def _look_at_start(self, group: str) -> None:
        if self._config is not None and (why := start_refusal(self._config, group)):
            raise _refuse(f"`start {group}`", why)
