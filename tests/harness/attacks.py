"""The attacks of tests/attacks as a piece of the harness: every one of them, each in a process of its own."""

from __future__ import annotations

from attacks import run as attacking

from harness import report


def run(n: int, seed: int = 0) -> report.Result:
    """Carry out all attacks; `n` and `seed` change nothing, for the list is what it is."""
    result = report.Result("attacks", "one hostile store, run, corpus, config or argument: one of our errors, nothing executed")
    with report.timed(result):
        found = attacking.run()
    for name, outcome in found.items():
        if name.startswith("control"):
            result.controls[name] = {"n": 1, "bad": bool(outcome["complaints"])}
        else:
            result.n += 1
            result.bad += [f"{name}: {complaint}" for complaint in outcome["complaints"]]
    return result


if __name__ == "__main__":
    report.main(run, 1)
