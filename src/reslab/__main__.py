"""The entry point: `python -m reslab`, and the command `reslab`."""

from typing import NoReturn

from reslab.interrupt import guarded, leave


def main() -> NoReturn:
    """Run the command line, and end the process."""

    def command() -> int:
        from reslab.cli import main

        return main()

    leave(guarded(command, until_exit=True))


if __name__ == "__main__":
    main()
