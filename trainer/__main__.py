"""`python -m trainer`: the command, for when another tool's `trainer` executable comes first on PATH."""

from importlib import import_module

if __name__ == "__main__":
    import_module("actstore_cli.trainer").main()
