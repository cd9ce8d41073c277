"""supervisor's own RPC methods, less those that would cut every stream: each of these answers what to type instead."""

from typing import Any

from supervisor.rpcinterface import SupervisorNamespaceRPCInterface
from supervisor.xmlrpc import Faults, RPCError

ENGINE = "engine"
STOP_ALL = "it would cut every running stream. Type `sgnode stop` (it drains first), `sgnode stop --now`, or `shutdown` in here"
STOP_ENGINE = "it would cut every running stream. Type `sgnode restart engine` (it drains first), or `sgnode drain` before this"
RELOAD = "it would restart the whole node. Type `update` to take up a changed supervisor.conf, or `sgnode restart`"


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

    def restart(self) -> Any:
        """Refused: supervisord would start over with everything

        @return boolean result  Never
        """
        raise _refuse("`reload`", RELOAD)

    def _look(self, group: str) -> None:
        # Set by the plugin, which the same supervisord loads beside this.
        plugin = getattr(self.supervisord, "sgnode", None)
        if group == ENGINE and plugin is not None and plugin.serves:
            raise _refuse("`stop engine`", STOP_ENGINE)
