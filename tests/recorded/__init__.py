"""Messages as each version wrote them: a folder a version, a file a class, a message a line."""
