"""`python -m checkpoint_tools`, and the `checkpoint-tools` script.

Worker processes import the main module again: nothing is imported here before it is needed.
"""


def main() -> None:
    """The command line."""
    from checkpoint_tools import cli

    cli.main()


if __name__ == "__main__":
    main()
