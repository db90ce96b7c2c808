"""`python -m dapo_megatron`."""

from dapo_megatron.cli import main

if __name__ == "__main__":
    main()
