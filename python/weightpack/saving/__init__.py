"""Models written to folders and files: gathered from their parameters, streamed through the engine."""
