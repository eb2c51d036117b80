"""What TAB completes: digests, architectures, formats, hook points. From names in folders alone, as nobody waits for a TAB."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import click
from click.shell_completion import CompletionItem, get_completion_class

from . import output

Items = list[CompletionItem]
HEAD_BYTES = 65_536  # read of a key, a run's configuration or a model's: the fields wanted stand at the beginning
SHORT = 12  # digits of a digest, as the listings show it
KINDS = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out")  # of each layer of a model


def _field(file: Path, name: str) -> str:
    """Return a field of a JSON file as text, or ""."""
    with contextlib.suppress(OSError), file.open("rb") as opened:
        found = re.search(rf'"(?:{name})"\s*:\s*\[?"?([^"\\,\s\]}}]+)', opened.read(HEAD_BYTES).decode(errors="replace"))
        return found[1] if found else ""
    return ""


def _folders(ctx: click.Context, param: str) -> Iterator[Path]:
    """Yield the folders of stores, sealed or not, or of runs, in the folder that the command line or the environment names."""
    top = Path(ctx.params.get(param) or os.environ.get(f"ACTSTORE_{param.upper()}") or param)
    for folder in (top, top / ".staging"):
        with contextlib.suppress(OSError):
            yield from sorted(path for path in folder.iterdir() if re.fullmatch("[0-9a-f]{64}", path.name))


def _digests(param: str, file: str, *about: str) -> Callable[[click.Context, click.Parameter, str], Items]:
    def complete(ctx: click.Context, _: click.Parameter, incomplete: str) -> Items:
        found = [path for path in _folders(ctx, param) if path.name.startswith(incomplete)]
        digits = SHORT if len(incomplete) < SHORT and len({path.name[:SHORT] for path in found}) == len(found) else 64
        return [CompletionItem(p.name[:digits], help=" ".join(filter(None, (_field(p / file, a) for a in about)))) for p in found]

    return complete


stores = _digests("stores", "key.json", "hook", "dtype")
runs = _digests("runs", "config.json", "arch", "n_latents", "k")


def names_in(package: str) -> list[str]:
    """Return the names of a package's files, such as architectures, sorted; imports none of them."""
    top, _, rest = package.partition(".")
    spec = importlib.util.find_spec(top)
    return sorted(file.stem for file in (Path((spec and spec.origin) or "").parent / rest).glob("*.py") if file.name[0] != "_")


def files_of(package: str) -> Callable[[click.Context, click.Parameter, str], Items]:
    """Return what completes a comma list of the names of a package's files."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        before, comma, begun = incomplete.rpartition(",")
        return [CompletionItem(before + comma + name) for name in names_in(package) if name.startswith(begun)]

    return complete


def hooks(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Complete the hook points of the stores that are there, and the usual ones of a --model that is a folder."""
    layers = _field(Path(str(ctx.params.get("model") or "")) / "config.json", "num_hidden_layers|n_layer|num_layers") or "0"
    known = [_field(path / "key.json", "hook") for path in _folders(ctx, "stores")]
    usual = [f"blocks.{i}.{kind}" for i in range(min(int(layers), 1000) if layers.isdigit() else 0) for kind in KINDS]
    return [CompletionItem(name) for name in dict.fromkeys([*known, *usual]) if name and name.startswith(incomplete)]


def folder(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Leave it to the shell to complete a folder."""
    return [CompletionItem(incomplete, type="dir")]


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.option("--json", "as_json", is_flag=True, help="Print exactly one JSON object on stdout.")
@output.command
def completion_command(shell: str, as_json: bool) -> None:
    """Print what makes TAB complete commands, options, digests, architectures, formats and hook points.

    \b
    bash, in ~/.bashrc:   eval "$(actstore completion bash; trainer completion bash)"
    zsh, in ~/.zshrc:     autoload -Uz compinit && compinit; eval "$(actstore completion zsh; trainer completion zsh)"
    fish, once:           actstore completion fish > ~/.config/fish/completions/actstore.fish  (and trainer alike)
    """
    root = click.get_current_context().find_root().command
    kind = get_completion_class(shell)
    assert kind is not None and root.name is not None
    script = kind(root, {}, root.name, f"_{root.name.upper()}_COMPLETE").source()
    output.print_json({"shell": shell, "script": script}) if as_json else click.echo(script)
