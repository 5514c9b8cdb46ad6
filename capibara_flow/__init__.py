"""Capibara Flow: one door in front of many open-weight models, on NATS."""

__version__ = "0.1.0"
