"""Engines of this machine that are started when they are first asked for, and make room for one another."""

from capibara_flow.engines.host.host import ExpertHost, HostedEngine, build_host

__all__ = ["ExpertHost", "HostedEngine", "build_host"]
