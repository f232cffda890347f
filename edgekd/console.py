"""The only place that prints: data to stdout, talk to stderr, progress bars with ETA, everything escaped."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from edgekd.report.text import clean

if TYPE_CHECKING:
    from rich.console import Console as RichConsole


class Bar(Protocol):
    """One task of unknown speed: `update` moves it and shows named figures."""

    def update(self, done: float, **figures: str) -> None: ...


class _NoBar:
    def update(self, done: float, **figures: str) -> None:
        """Shows nothing."""


class Console:
    """Talks to a person on stderr and to programs on stdout."""

    def __init__(self, *, json_mode: bool = False, quiet: bool = False):
        self.json_mode, self.quiet = json_mode, quiet
        self.warnings: list[str] = []

    @cached_property
    def _err(self) -> RichConsole:
        from rich.console import (
            Console as RichConsole,
        )  # not before something has to be styled: commands that answer at once do not wait for it

        return RichConsole(stderr=True, highlight=False, soft_wrap=False)

    # ------------------------------------------------------------------------------------------------ talk
    def say(self, text: str, style: str = "") -> None:
        """One line of talk."""
        if not self.quiet:
            self._talk(text, style)

    def warn(self, text: str) -> None:
        """A warning: shown once, kept for the report."""
        if text not in self.warnings:
            self.warnings.append(text)
            self._talk(f"warning: {text}", "yellow")

    def error(self, error: Any) -> None:
        """An EdgekdError: what, where, expected on one line each problem, then the hint."""
        if self.json_mode:
            self.json({"error": error.as_dict()})
        for line in str(error).splitlines():
            self._talk(f"error: {line}", "bold red")
        if error.hint:
            self._talk(f"hint: {error.hint}")

    def _talk(self, text: str, style: str = "") -> None:
        from rich.text import Text

        self._err.print(Text(clean(text), style=style), soft_wrap=True)

    # ------------------------------------------------------------------------------------------------ data
    def json(self, value: object) -> None:
        """One JSON document on stdout."""
        sys.stdout.write(json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def data(self, text: str) -> None:
        """Plain text on stdout."""
        sys.stdout.write((clean(text) if "\x1b" in text else text) + "\n")

    def show(self, renderable: Any) -> None:
        """A rich table or panel on stdout; its cells are Text, never markup."""
        from rich.console import Console as RichConsole

        RichConsole(highlight=False, soft_wrap=False).print(renderable)

    def table(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Rows as JSON, as a table that fits the terminal, or, in a pipe, as aligned text with one line a row for grep and awk."""
        if self.json_mode:
            self.json(rows)
            return
        cells = [[clean(_cell(row.get(c))) for c in columns] for row in rows]
        if sys.stdout.isatty():
            self._fitted(cells, columns)
            return
        widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
        for line in (columns, *cells):
            self.data("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())

    def _fitted(self, cells: list[list[str]], columns: Sequence[str]) -> None:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False, header_style="bold")
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in cells:
            table.add_row(*map(Text, row))
        self.show(table)

    # ------------------------------------------------------------------------------------------------ progress
    @contextmanager
    def bar(self, name: str, total: float) -> Iterator[Bar]:
        """A progress bar with ETA on a terminal; a line every ten seconds elsewhere."""
        if self.quiet:
            yield _NoBar()
        elif self._err.is_terminal:
            with _rich_bar(self._err, name, total) as bar:
                yield bar
        else:
            yield _LineBar(self, name, total)


def _cell(value: Any) -> str:
    return "" if value is None else ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


class _LineBar:
    """Progress for logs: a line after two seconds, then one every ten."""

    def __init__(self, console: Console, name: str, total: float):
        self.console, self.name, self.total = console, name, total
        self.start = time.monotonic()
        self.last = self.start - 8  # the first line comes after two seconds

    def update(self, done: float, **figures: str) -> None:
        now = time.monotonic()
        if now - self.last < 10 or not done:
            return
        self.last = now
        eta = (now - self.start) * (self.total - done) / done
        shown = " ".join(f"{k} {v}" for k, v in figures.items())
        self.console.say(f"  {self.name}: {100 * done / self.total:.0f} % {shown} ETA {eta:.0f} s")


@contextmanager
def _rich_bar(console: RichConsole, name: str, total: float) -> Iterator[Bar]:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.fields[label]}", markup=False),
        BarColumn(20),
        TextColumn("{task.percentage:>3.0f} %", markup=False),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, refresh_per_second=4) as progress:
        task = progress.add_task("", total=total, label=clean(name), figures="")

        class _Rich:
            def update(self, done: float, **figures: str) -> None:
                progress.update(task, completed=done, figures=clean(" ".join(f"{k} {v}" for k, v in figures.items())))

        yield _Rich()
