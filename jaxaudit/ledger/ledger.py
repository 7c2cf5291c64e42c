"""The whole ledger of one recording: hands each window to every part, in order."""

import collections
import functools

import jax
import numpy as np
import xarray as xr
from numpy.typing import NDArray

from jaxaudit.conformance import inexact_in_float64
from jaxaudit.ledger.clusters import Clusters
from jaxaudit.ledger.counterfactual import Counterfactual
from jaxaudit.ledger.lattice import Lattice
from jaxaudit.ledger.moments import Moments
from jaxaudit.ledger.subject import Aside, Errands, LedgerOptions, Seen, Subject
from jaxaudit.ledger.updates import Updates
from jaxaudit.recording import Window
from jaxaudit.replay import Recorded, SelfTestError
from jaxaudit.strips import Countable

#: The groups that a ledger adds to an audit's file.
GROUPS = ("updates", "moments", "lattice", "tokens", "counterfactual")


class Ledger(Countable):
    """Follows a recording under one arithmetic, strip by strip; a context manager.

    What the recording does not hold the tensors for is left out: without gradients there are `lattice` and
    `tokens` only.

    Args:
        subject: the recording, the arithmetic, the groups and the steps.
        options: what was asked for.

    Attributes:
        clusters: what is told of all rows at once, which takes its own reading (`Clusters.follow`).

    Raises:
        SelfTestError: the device's float64 is inexact.
    """

    MADE_OF = ("_lattice", "_updates", "_moments", "_counterfactual")

    def __init__(self, subject: Subject, options: LedgerOptions):
        _require_float64(subject)
        self._subject = subject
        #: Whether windows must be accounted for first: that settles scalars which are not known exactly, and runs
        #: freely, window after window, what was not recorded.
        self.waits = subject.chosen is not None and (
            not subject.bench.certain(subject.chosen) or bool(subject.bench.hidden(subject.chosen))
        )
        # What the device has to do is started beside the accounting, which then need not wait for a compiler.
        # What comes of it is counted while the device goes on, with the steps of the remedies above all.
        self._threads = tuple(Aside(subject.bench.device) for _ in range(3))
        self._starting, self._counting, self._stepping = self._threads
        self._behind: collections.deque[Errands] = collections.deque()
        self.clusters = Clusters(subject)
        self._lattice = Lattice(subject, per_token=options.per_token)
        known = subject.chosen is not None
        self._updates = Updates(subject) if known and Updates.possible(subject) else None
        self._moments = Moments(subject) if known and Moments.possible(subject) else None
        self._counterfactual = None
        if self._updates and Counterfactual.possible(subject):
            self._counterfactual = Counterfactual(subject, beta2=options.beta2, seed=options.seed)

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        for thread in self._threads:
            thread.__exit__()

    def take(self, window: Window, arrays: Recorded, members: list[NDArray[np.int64]]) -> None:
        """Start to take a window into account, which goes on until `finish`.

        Args:
            window: the window.
            arrays: its recorded patterns, on the devices.
            members: each group's own rows in it.
        """
        subject, errands = self._subject, Errands()
        arrays = subject.bench.put_together(subject.chosen, window, arrays)
        seen = Seen(window, arrays, members, functools.partial(errands.later, self._counting))
        errands.later(self._starting, lambda: self._start(seen, errands))
        self._behind.append(errands)

    def _start(self, seen: Seen, errands: Errands) -> None:
        lost: jax.Array | None = self._updates.take(seen) if self._updates else None
        remedies = self._counterfactual
        if remedies and lost is not None:  # the longest part
            errands.later(self._stepping, lambda: remedies.take(seen, lost))
        if self._moments:
            self._moments.take(seen)
        self._lattice.take(seen)

    def finish(self, behind: int = 0) -> None:
        """Wait until windows are done, whose arrays may then be filled anew: all but so many of the latest."""
        while len(self._behind) > behind:
            self._behind.popleft().finish()

    def datasets(self) -> dict[str, xr.Dataset]:
        """Return the dataset of each group, by its name."""
        found = {
            "updates": self._updates.dataset() if self._updates else None,
            "moments": self._moments.dataset() if self._moments else None,
            "lattice": self._lattice.lattice(),
            "tokens": self._lattice.tokens(self.clusters),
            "counterfactual": self._counterfactual.dataset() if self._counterfactual else None,
        }
        return {name: dataset for name, dataset in found.items() if dataset is not None}


def _require_float64(subject: Subject) -> None:
    """Make sure that the device's float64 is that of IEEE 754; exact updates are computed in it.

    Raises:
        SelfTestError: it is not.
    """
    device = subject.bench.device
    inexact = ", ".join(inexact_in_float64(device))
    subject.bench.replayer.note("the ledger's float64", inexact)
    if inexact:
        raise SelfTestError(
            f"self-test failed on {device.platform} ({device.device_kind}): the ledger needs float64, of which "
            f"inexact here: {inexact}. Use another backend, for example --backend cpu, or --only accounting."
        )
