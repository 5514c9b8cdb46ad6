"""Decisions: pure, synchronous, total. No clock, no chance, no input or output."""
