"""How large each wing of the package is, and how dense: `python tools/density.py [--files]`.

A line counts that holds code: no blank line, no comment, no docstring. Tokens a line tell whether
lines were squeezed to meet a limit of lines; names, numbers, strings and operators count. The means
are those of a wing, all its lines together. tests/house holds the limits.

As a scale (the same count): nanoGPT's model 10.9, CleanRL's PPO 9.6, a chapter of rasbt's 5.2.
"""

import sys
import tokenize
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "minirlhf"
COUNTED = {tokenize.OP, tokenize.NAME, tokenize.NUMBER, tokenize.STRING}
CORE = "core"


@dataclass(frozen=True)
class Limit:
    """What a wing is held to: a question (does this belong here?), and no reason to squeeze."""

    lines: int
    """lines of code"""
    tokens: float = 12.0
    """tokens a line of code, in the mean"""


DENSEST = 14.0  # tokens a line of any one file
LIMITS = {
    CORE: Limit(1600, 11.0),
    # 450 before its code was written out and all intervals came here
    "engine": Limit(590),
    "oracle": Limit(550),
    "desk": Limit(750),
    # 400 before the one table of measures, which lay in six places of other wings
    "audit": Limit(500),
    # 1150 before its code was written out: 13 tokens a line became 10
    "autopsy": Limit(1250),
    "drift": Limit(850),
    "remedies + sweeps": Limit(1500),
    "cli": Limit(650),
    "lab": Limit(3300),
}
TOGETHER = {"remedies": "remedies + sweeps", "sweeps": "remedies + sweeps"}


@dataclass(frozen=True)
class Size:
    """Lines of code and their tokens."""

    lines: int
    tokens: int

    @property
    def density(self) -> float:
        """Tokens a line."""
        return self.tokens / self.lines if self.lines else 0.0

    def __add__(self, other: "Size") -> "Size":
        return Size(self.lines + other.lines, self.tokens + other.tokens)


def size(source: str) -> Size:
    """Lines of code in a source, and the tokens on them. An f-string is one token on any Python."""
    lines: set[int] = set()
    tokens = 0
    inside = 0  # f-strings that are open: from Python 3.12 on what they hold comes in tokens too
    reader = iter(source.splitlines(keepends=True)).__next__
    for token in tokenize.generate_tokens(reader):
        kind = tokenize.tok_name[token.type]
        inside -= kind == "FSTRING_END"
        counted = token.type in COUNTED or kind == "FSTRING_START"
        if counted and not inside and not _is_docstring(token):
            lines.update(range(token.start[0], token.end[0] + 1))
            tokens += 1
        inside += kind == "FSTRING_START"
        if inside:
            lines.update(range(token.start[0], token.end[0] + 1))
    return Size(len(lines), tokens)


def _is_docstring(token: tokenize.TokenInfo) -> bool:
    """A string in triple quotes that begins its line: what a module, a function or a field is."""
    return token.string.startswith('"""') and token.line.strip().startswith('"""')


def wing(path: Path) -> str:
    """The wing of a file of the package; files at its top are the core."""
    parts = path.relative_to(PACKAGE).parts
    name = parts[0] if len(parts) > 1 else CORE
    return TOGETHER.get(name, name)


def files() -> dict[Path, Size]:
    """The size of every module of the package."""
    return {path: size(path.read_text(encoding="utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}


def wings() -> dict[str, Size]:
    """The size of every wing."""
    found: dict[str, Size] = {}
    for path, part in files().items():
        found[wing(path)] = found.get(wing(path), Size(0, 0)) + part
    return found


def main(arguments: list[str]) -> None:
    """Print a line a wing, or with --files a line a file, the densest last."""
    if "--files" in arguments:
        for path, part in sorted(files().items(), key=lambda item: item[1].density):
            name = path.relative_to(PACKAGE).as_posix()
            print(f"{name:40} {part.lines:5} lines  {part.density:5.1f} tokens a line")
        return
    found = wings()
    for name, limit in LIMITS.items():
        part = found.get(name, Size(0, 0))
        lines = f"{part.lines:5} lines of {limit.lines:5}"
        print(f"{name:20} {lines}  {part.density:5.1f} tokens a line of {limit.tokens:4.1f}")
    print(f"{'all':20} {sum(part.lines for part in found.values()):5} lines")


if __name__ == "__main__":
    main(sys.argv[1:])
