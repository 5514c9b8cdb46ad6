"""The map: every message, every subject, every stream, every hop. Imports pydantic and the standard library only."""
