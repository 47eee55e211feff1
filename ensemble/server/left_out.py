"""Which served models a start leaves out: those whose processes die, or hang, whenever they load.

It knows names of models, and how often each has spoilt a start.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping

from deepseek_triton.ensemble.server.installation import ServerDiedError

MAX_DEATHS = 2  # in a row; one alone may be an accident
RETRY_S = 600.0  # a later start tries a model again that was left out so long ago


class LoadError(ServerDiedError):
    """Models of which a process died, or didn't get ready, while they loaded; another start may succeed."""

    def __init__(self, message: str, models: Collection[str]) -> None:
        super().__init__(message)
        self.models = models


class LeftOut:
    """Counts what spoils the starts of one server.

    Args:
        served: a served model → the models that are loaded for it, itself among them or not. A start may do without
            some of the served ones, as long as one is left.
    """

    def __init__(self, served: Mapping[str, Collection[str]], clock: Callable[[], float] = time.monotonic) -> None:
        self._served = served
        self._clock = clock
        self._deaths: Counter[str] = Counter()
        self._since: dict[str, float] = {}

    @property
    def served(self) -> list[str]:
        """The served models that aren't left out."""
        return [name for name in self._served if name not in self._since]

    @property
    def models(self) -> set[str]:
        """The models that aren't loaded, parts included."""
        return {model for name in self._since for model in self._served[name]}

    def forgive(self) -> None:
        """Before a start: try again what was left out long ago."""
        now = self._clock()
        self._since = {name: since for name, since in self._since.items() if now - since < RETRY_S}

    def has_started(self) -> None:
        """After a start that went well: what is loaded counts as well."""
        self._deaths.clear()

    def incomplete(self, loaded: Collection[str]) -> list[str]:
        """The served models of which a part isn't `loaded`; empty if that holds for all of them."""
        found = [name for name in self.served if not set(self._served[name]) - {name} <= set(loaded)]
        return [] if found == self.served else found

    def blame(self, models: Collection[str]) -> list[str]:
        """`models` have spoilt a start; returns the served models that the next one leaves out for it.

        Empty: the start may be tried again as it was, or there is nothing left without them.
        """
        at_fault = [name for name in self.served if not set(models).isdisjoint([name, *self._served[name]])]
        self._deaths.update(at_fault)
        hopeless = [name for name in at_fault if self._deaths[name] >= MAX_DEATHS]
        if set(hopeless) >= set(self.served):
            return []
        for name in hopeless:
            self._since[name] = self._clock()
            del self._deaths[name]
        return hopeless
