r"""By which names the columns of data frames are taken, whatever order they come in."""

from typing import Any, NamedTuple

from numpy.typing import ArrayLike
from torch import Tensor

from ..distributions.interpolant import AnyDistribution
from ..distributions.joint import Sites, own_sites, rows_by_name
from ..distributions.rows import check_same_order, columns_in_order, in_order, names_of


class Names(NamedTuple):
    """The names of the columns of rows and of contexts, in the order that a flow is trained on.

    Attributes:
        rows: Those of rows, or nothing; of named sites, which have names of their own, nothing.
        contexts: Those of contexts, or nothing.
        sites: These sites, or None where rows have none.
    """

    rows: tuple[str, ...] = ()
    contexts: tuple[str, ...] = ()
    sites: Sites | None = None

    @classmethod
    def of(cls, distribution: AnyDistribution) -> "Names":
        """Return the names that a distribution has."""
        return cls(distribution.columns, distribution.context_columns, own_sites(distribution))

    def give_to(self, distribution: AnyDistribution) -> None:
        """Make these the names that a distribution has; sites are its own."""
        distribution.columns, distribution.context_columns = self.rows, self.contexts

    @classmethod
    def for_training(
        cls, distribution: AnyDistribution, data: object, context: object, *, anew: bool
    ) -> "Names":
        """Return the names that a distribution has, or, where it has none, those of data frames.

        Args:
            distribution: What is trained.
            data: What it is trained on.
            context: Their contexts, or None.
            anew: Whether a new map is set from the data, so that the names of theirs go first, and
                those that an earlier run has left are forgotten.
        """
        known = cls.of(distribution)
        if not anew:
            return known.filled(data, context)
        new = cls(sites=known.sites).filled(data, context)
        if distribution.report is not None:
            return new
        return cls(new.rows or known.rows, new.contexts or known.contexts, known.sites)

    def filled(self, rows: object, context: object = None) -> "Names":
        """Return these names, and those of data frames where there were none yet."""
        new = names_of(rows) if self.sites is None else ()
        return Names(self.rows or new, self.contexts or names_of(context), self.sites)

    def if_named(self, rows: object, context: object = None) -> "Names":
        """Return these names for rows, and for contexts, that have names; none for the others."""
        known = self.rows if names_of(rows) else (), self.contexts if names_of(context) else ()
        return Names(*known, self.sites)

    def ordered(self, rows: Any, context: Any = None, *, name: str = "data") -> tuple[Any, Any]:
        """Return rows, and contexts or None, with the columns of data frames in this order.

        Args:
            rows: Rows, shape ``(N, *event_shape)``, a data frame, or named draws.
            context: Contexts, shape ``(N, C)``, a data frame of them, or None.
            name: What to call the rows in messages.

        Raises:
            TypeError: If they are no numbers.
            ValueError: If a data frame has columns of other names, or the labels of the rows in
                another order than the contexts.
        """
        check_same_order(**{name: rows}, context=context)
        rows = rows_by_name(rows, self.rows, self.sites, name)
        if context is None:
            return rows, None
        return rows, columns_in_order(context, self.contexts, "context")

    def at_base(self, rows: ArrayLike | None, name: str) -> Tensor | None:
        """Return rows at the base, or None, with the columns of a data frame in this order.

        Args:
            rows: Rows, shape ``(M, D)``, or None. Where the data have more columns than D, as in a
                simplex, they go by position.
            name: What to call them in messages.

        Raises:
            TypeError: If they are no numbers.
            ValueError: If a data frame has columns of other names.
        """
        if rows is None:
            return None
        names = self.rows if len(names_of(rows)) == len(self.rows) else ()
        return columns_in_order(rows, names, name)

    def partners(self, pairs: ArrayLike | None, data: object) -> Tensor | None:
        """Return the partners of rows at the base, shape ``(N, D)``, or None, in this order.

        Args:
            pairs: The partners, with names as in :meth:`at_base`, or in the order of the data.
            data: The rows as they were given.
        """
        found = self.at_base(pairs, "pairs")
        if found is None or names_of(pairs) or found.shape[-1:] != (len(self.rows),):
            return found
        return in_order(found, names_of(data), self.rows, "pairs")
