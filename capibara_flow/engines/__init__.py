"""Engines: one product per file, each behind a port; only ``wiring`` chooses among them."""
