"""What mkdocs does not do by itself: the recipes as pages, the notebook as a page, links between docs/ and the rest."""

import json
import re
from html import escape
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent.parent
NOTEBOOK = "notebook-tutorial.md"


def on_config(config):
    """Leave the command line's page out where it has not been generated."""
    if not (ROOT / "docs" / "cli.md").exists():
        for pages in (pages for section in config["nav"] for pages in section.values() if isinstance(pages, list)):
            pages[:] = [page for page in pages if page != "cli.md"]
    return config


def on_files(files, config):
    """Add recipes/ and the notebook."""
    for path in sorted((ROOT / "recipes").iterdir()):
        files.append(File.generated(config, f"recipes/{path.name}", abs_src_path=str(path)))
    files.append(File.generated(config, NOTEBOOK, content=notebook_page(json.loads((ROOT / "docs/tutorial.ipynb").read_text()))))
    return files


def on_page_markdown(markdown, page, config, files):
    """Recipes lie beside docs/ in the repository, and below it on the site, where the notebook is a page."""
    if page.file.src_uri.startswith("recipes/"):
        return markdown.replace("](../docs/", "](../")
    markdown = markdown.replace("](../README.md)", "](index.md)")
    if page.file.src_uri != NOTEBOOK:
        markdown = markdown.replace("tutorial.ipynb)", f"{NOTEBOOK})")
    return re.sub(r"\]\(((?:\.\./)*)\.\./recipes/", r"](\1recipes/", markdown)


def notebook_page(notebook):
    """Return a notebook's cells and outputs as Markdown."""
    parts = ["".join(notebook["cells"][0]["source"]), "The file: [tutorial.ipynb](tutorial.ipynb)."]
    for cell in notebook["cells"][1:]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {"text/plain": output.get("text", "")})
            if "text/html" in data:
                shown = re.sub(r"\n\s*\n", "\n", "".join(data["text/html"]))
            else:
                shown = f"<pre>{escape(''.join(data.get('text/plain', '')).rstrip())}</pre>"
            parts.append(f'<div class="output">{shown}</div>')
    return "\n\n".join(parts) + "\n"
