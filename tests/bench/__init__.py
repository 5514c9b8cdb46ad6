"""How much Capibara costs beside talking to the engine directly: ``python -m tests.bench``."""
