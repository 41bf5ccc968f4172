"""Start any command. This module imports no other, so that Ctrl-C is one line while the others are imported."""

import sys


def main() -> None:
    """Run the command that the program's name or the first argument names. Exit with 130 after Ctrl-C."""
    try:
        from .command_line import main

        main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # 128 + SIGINT, as a shell shows it


if __name__ == "__main__":
    main()
