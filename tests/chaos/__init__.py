"""What survives what: real processes are killed, stopped and restarted while clients count every character.

``python -m tests.chaos`` or ``make chaos``; see ``__main__``.
"""
