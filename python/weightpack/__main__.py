"""`python -m weightpack`, and the `weightpack` command."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line and exits with its code."""
    from .cli import run

    sys.exit(run())


if __name__ == "__main__":
    main()
