"""The ledger of a search: every paid call is written down before it is made and again when it is answered.

So a search that was killed anywhere repeats no answered call, a spent budget stays spent, and the same file replays the search
where there is no server: with ``Budget(calls=0)`` only recorded answers are given.
"""

from __future__ import annotations

import dataclasses
import json
import os
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metaopt.search.keys import redact
from metaopt.search.proposal import BudgetSpent

_BEGINNING = b'{"ask": '


@dataclass(frozen=True)
class Charge:
    """What calls cost: their number, tokens of both directions, money in the currency of the declared prices."""

    calls: int = 0
    tokens: int = 0
    money: float = 0.0

    def __add__(self, other: Charge) -> Charge:
        return Charge(self.calls + other.calls, self.tokens + other.tokens, self.money + other.money)

    def __sub__(self, other: Charge) -> Charge:
        return Charge(self.calls - other.calls, self.tokens - other.tokens, self.money - other.money)


@dataclass(frozen=True)
class Budget:
    """Limits that are never passed; None: none.

    Attributes:
        calls: requests over the network, failed ones included.
        tokens: of both directions.
        money: in the currency of the declared prices.

    Raises:
        ValueError: a negative limit.
    """

    calls: int | None = None
    tokens: int | None = None
    money: float | None = None

    def __post_init__(self) -> None:
        for name, limit in dataclasses.asdict(self).items():
            if limit is not None and not limit >= 0:
                raise ValueError(f"budget {name} must be at least 0, got {limit}; None sets no limit")


class Ledger:
    """Calls, answers and charges of one search; safe to be used by several threads of one process.

    Args:
        path: a file of JSON lines; one that exists is gone on with. None: nothing is kept.
        budget: what all calls together may cost, those in the file included. A call that was under way when its process was
            killed counts as the most that it can have cost.

    Raises:
        ValueError: the file is no ledger, or in use by another process.
    """

    def __init__(self, path: Path | str | None = None, budget: Budget = Budget()) -> None:
        self.budget = budget
        self._lock = threading.Lock()
        self._replies: dict[str, Mapping[str, Any]] = {}
        self._under_way: dict[int, tuple[str, Charge]] = {}
        self._settled = Charge()
        self._failures: Counter[str] = Counter()
        self._next = 0
        self._file = None
        if path is not None:
            path = Path(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
            try:
                _own(self._file.fileno(), path)
                self._read(path)
            except ValueError:
                self._file.close()
                raise

    @property
    def spent(self) -> Charge:
        """All that was paid or may have been."""
        with self._lock:
            return self._spent()

    @property
    def replies(self) -> tuple[Mapping[str, Any], ...]:
        """All answers, in the order in which they came."""
        return tuple(self._replies.values())

    @property
    def failures(self) -> dict[str, int]:
        """Calls without an answer, by kind of failure, the most frequent first."""
        with self._lock:
            return dict(self._failures.most_common())

    def reply(self, key: str) -> Mapping[str, Any] | None:
        """The answer that the request of this key had before."""
        return self._replies.get(key)

    def ask(self, key: str, request: Mapping[str, Any], most: Charge) -> int:
        """Write down that a call is about to be made, and give it a number.

        Args:
            key: of who is asked and what: equal ones have one answer.
            request: what is asked, as JSON holds it.
            most: what the call can cost at most.

        Raises:
            BudgetSpent: that is more than is left; nothing was written.
        """
        with self._lock:
            spent = self._spent()
            for name, limit in dataclasses.asdict(self.budget).items():
                wanted = getattr(spent, name) + getattr(most, name)
                if limit is not None and wanted > limit:
                    raise BudgetSpent(
                        f"the budget is {limit:g} {name}, of which {getattr(spent, name):g} are used; the next call may take "
                        f"{getattr(most, name):g}; give more to go on"
                    )
            number, self._next = self._next, self._next + 1
            asked = {"ask": number, "key": key, "most": most, "request": request}
            self._write(asked)
            self._under_way[number] = (key, most)
            return number

    def answered(self, number: int, reply: Mapping[str, Any], charge: Charge) -> None:
        """Write down the answer of call ``number``, as JSON holds it, and what it cost."""
        with self._lock:
            self._write({"answer": number, "charge": charge, "reply": reply})
            self._settle(number, charge, reply)

    def failed(self, number: int, error: str, charge: Charge, kind: str) -> None:
        """Write down that call ``number`` had no answer, what it may have cost, and the kind of failure, in a word or two."""
        with self._lock:
            self._write({"fail": number, "charge": charge, "error": error, "kind": kind})
            self._settle(number, charge, None)
            self._failures[kind] += 1

    def close(self) -> None:
        """Let another process have the file."""
        with self._lock:  # a write that is under way would keep the file locked
            if self._file is not None:
                self._file.close()

    def _spent(self) -> Charge:
        return sum((most for _, most in self._under_way.values()), self._settled)

    def _settle(self, number: int, charge: Charge, reply: Mapping[str, Any] | None) -> None:
        key, _ = self._under_way.pop(number)
        self._settled += charge
        if reply is not None:
            self._replies[key] = reply

    def _write(self, entry: Mapping[str, Any]) -> None:
        if self._file is None:
            return
        self._file.write(redact(json.dumps(entry, default=dataclasses.asdict)).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def _read(self, path: Path) -> None:
        assert self._file is not None
        self._file.seek(0)
        whole = 0
        for line in self._file:
            try:
                if not line.endswith(b"\n") and (whole or _BEGINNING.startswith(line[: len(_BEGINNING)])):
                    self._file.truncate(whole)  # its writer was killed: a call not made, or an answer lost
                    break
                entry = json.loads(line)
                if "ask" in entry:
                    self._under_way[entry["ask"]] = (entry["key"], Charge(**entry["most"]))
                    self._next = entry["ask"] + 1
                elif "answer" in entry:
                    self._settle(entry["answer"], Charge(**entry["charge"]), entry["reply"])
                else:
                    self._settle(entry["fail"], Charge(**entry["charge"]), None)
                    self._failures[entry["kind"]] += 1
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(
                    f"{path} is no ledger of calls: byte {whole}: {error!r}; choose another file"
                ) from None
            whole += len(line)


def _own(handle: int, path: Path) -> None:
    with suppress(ImportError):  # Windows has no such locks
        import fcntl

        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path} is in use by another process; give each process a file of its own") from None
