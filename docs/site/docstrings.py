"""Our docstrings for mkdocstrings: sections that begin in their own line, such as `Returns: the rows.`, as paragraphs.

The Google parser takes the rest of that line for a title and drops the section.
"""

import re

import griffe

SECTION = re.compile(r"^(Returns|Yields|Raises|Source): +(?=\S)", re.MULTILINE)
ERROR = re.compile(
    r"\b(\w+(?:Error|Damaged|Found|Sealed|Locked|Full|Failed|Lost|Mismatch|Diverged|NonFiniteActivation))\b(?=[:,.]| and )"
)


class OneLineSections(griffe.Extension):
    """Rewrites the docstring of each object that is loaded."""

    def on_object(self, *, obj, **kwargs):
        """Make a paragraph of each such section, the names of errors as code."""
        if obj.docstring is None:
            return
        lines, inside, out = obj.docstring.value.split("\n"), False, []
        for line in lines:
            if found := SECTION.match(line):
                inside = True
                line = f"**{found[1]}:** {line[found.end() :]}"
                out.append("")
            elif inside and line.startswith("    ") and ">>>" not in line:
                line = line.strip()
            else:
                inside = False
            out.append(ERROR.sub(r"`\1`", line) if inside else line)
        obj.docstring.value = "\n".join(out)
