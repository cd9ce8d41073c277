"""The part of sgnode that runs inside supervisord ([rpcinterface:...]) and inside supervisorctl ([ctlplugin:sgnode]).

Nothing in here may block: supervisord has one loop. The factories import late, so that each side loads only its own half.
"""

from typing import Any


def make_rpc(supervisord: Any) -> Any:
    """supervisor.rpcinterface_factory: called once, after the control socket is bound and before any program is spawned."""
    from procs.plugin.rpc import Plugin
    from shared import config

    supervisord.sgnode = Plugin(supervisord, config.load())
    return supervisord.sgnode


def make_main_rpc(supervisord: Any) -> Any:
    """supervisor.rpcinterface_factory of the namespace ``supervisor``: supervisor's own methods, guarded."""
    from procs.plugin.guard import GuardedRPC

    return GuardedRPC(supervisord)


def make_ctl(controller: Any) -> Any:
    """supervisor.ctl_factory: called once in each supervisorctl."""
    from procs.plugin.ctl import NodeCommands

    return NodeCommands(controller)
