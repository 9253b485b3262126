"""The fenced code blocks of a Markdown page."""

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^(?P<indent> *)```(?P<info>.*)$")
_FILE_NAME = re.compile(r"^# (?P<name>[\w./-]+\.(?:py|toml))$")


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        language: The first word after the fence; empty if there is none.
        words: The other words after the fence.
        text: What stands between the fences.
        line: Number of the first line of ``text``, from 1.
    """

    language: str
    words: tuple[str, ...]
    text: str
    line: int

    @property
    def file_name(self) -> str | None:
        """The file that this block is, if its first line is a comment with nothing but a file's name."""
        match = _FILE_NAME.match(self.text.split("\n", 1)[0])
        return match["name"] if match else None


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order; a fence that is never closed is an error."""
    found: list[Block] = []
    opened: tuple[str, list[str], int] | None = None
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        match = _FENCE.match(line)
        if match and opened is None:
            opened = (match["info"], [], number + 1)
            assert not match["indent"], f"{page}:{number}: an indented fence is not checked"
        elif match and opened is not None:
            language, *words = opened[0].split() or [""]
            found.append(Block(language, tuple(words), "".join(f"{text}\n" for text in opened[1]), opened[2]))
            opened = None
        elif opened is not None:
            opened[1].append(line)
    assert opened is None, f"{page}:{opened and opened[2] - 1}: the block is never closed"
    return found
