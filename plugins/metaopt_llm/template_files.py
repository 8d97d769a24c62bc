"""The text files that prompts are made of, of which users may have their own."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from string import Template


class Templates:
    """The text files of prompts.

    Args:
        directory: of files that replace those of the package; one that is not there is the package's.

    Raises:
        ValueError: no directory.
    """

    def __init__(self, directory: Path | str | None = None) -> None:
        self._own = Path(directory) if directory is not None else None
        if self._own is not None and not self._own.is_dir():
            raise ValueError(f"templates must be a directory of text files, got {directory}")

    def find(self, name: str) -> str | None:
        """The file ``name``, if there is one."""
        own = None if self._own is None else self._own / name
        packaged = resources.files("metaopt_llm") / "templates" / name
        for file in (own, packaged):
            if file is not None and file.is_file():
                return file.read_text(encoding="utf-8")
        return None

    def text(self, name: str) -> str:
        """The file ``name``.

        Raises:
            ValueError: there is none.
        """
        text = self.find(name)
        if text is None:
            raise ValueError(f"there is no template {name} in {self._own or 'metaopt_llm'}; write it, or name another")
        return text

    def fill(self, name: str, **values: str) -> str:
        """The template ``name`` with what is asked after each ``$`` in it.

        Raises:
            ValueError: there is none, or it asks for something else.
        """
        template = Template(self.text(f"{name}.txt"))
        unknown = set(template.get_identifiers()) - values.keys()
        if unknown or not template.is_valid():
            raise ValueError(
                f"the template {name}.txt may use {', '.join(f'${field}' for field in sorted(values))}, and $$ for $, got "
                f"{', '.join(f'${field}' for field in sorted(unknown)) or 'a lone $'}"
            )
        return template.substitute(values)
