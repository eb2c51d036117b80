"""`python -m actstore`: the command, for when its folder of scripts is not on PATH."""

from importlib import import_module

if __name__ == "__main__":
    import_module("actstore_cli.actstore").main()
