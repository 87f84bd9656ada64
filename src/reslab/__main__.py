"""The entry point: `python -m reslab`, and the command `reslab`."""

import sys

from reslab.interrupt import guarded


def main() -> int:
    """Run the command line until the interpreter exits."""

    def command() -> int:
        from reslab.cli import main

        return main()

    return guarded(command, until_exit=True)


if __name__ == "__main__":
    sys.exit(main())
