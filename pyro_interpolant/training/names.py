r"""By which names the columns of data frames are taken, whatever order they come in."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from numpy.typing import ArrayLike
from torch import Tensor

from ..distributions.constraints import Sites
from ..distributions.interpolant import AnyDistribution
from ..distributions.joint import rows_by_name, site_columns
from ..distributions.rows import RowsLike, check_same_order, columns_in_order, in_order, names_of


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
        return cls(distribution.columns, distribution.context_columns, distribution.sites)

    def give_to(self, distribution: AnyDistribution) -> None:
        """Make these the names that a distribution has; sites are its own."""
        distribution.columns, distribution.context_columns = self.rows, self.contexts

    @classmethod
    def for_training(
        cls, distribution: AnyDistribution, rows: object, context: object, *, anew: bool
    ) -> "Names":
        """Return the names that a distribution has, or, where it has none, those of data frames.

        Args:
            distribution: What is trained.
            rows: Rows that it is trained on, a data frame or not.
            context: Their contexts, a data frame or not, or None.
            anew: Whether a new map is set from the data: other names of theirs then take the place
                of those known, and those that an earlier run has left are forgotten where the data
                have none. The same names stay in the order known, which supports and bases have.
        """
        known, forget = cls.of(distribution), distribution.report is not None
        if not anew:
            return known.filled(rows, context)

        def chosen(known: tuple[str, ...], new: tuple[str, ...]) -> tuple[str, ...]:
            if not new:
                return () if forget else known
            return known if sorted(known) == sorted(new) else new

        of_rows = names_of(rows) if known.sites is None else ()
        contexts = chosen(known.contexts, names_of(context))
        return cls(chosen(known.rows, of_rows), contexts, known.sites)

    def filled(self, rows: object, context: object = None) -> "Names":
        """Return these names, and those of data frames where there were none yet."""
        new = names_of(rows) if self.sites is None else ()
        return Names(self.rows or new, self.contexts or names_of(context), self.sites)

    def ordered(
        self,
        rows: RowsLike,
        context: ArrayLike | None = None,
        *,
        name: str = "data",
        beside: "Names | None" = None,
    ) -> tuple[Any, Any]:
        """Return rows, and contexts or None, with their columns in this order.

        Args:
            rows: Rows, shape ``(N, *event_shape)``, a data frame, or named draws.
            context: Contexts, shape ``(N, C)``, a data frame of them, or None.
            name: What to call the rows in messages.
            beside: The names of data as they are given, in whose order those without names are;
                or None, if these are the data.

        Raises:
            TypeError: If they are no numbers.
            ValueError: If a data frame has columns of other names, or the labels of the rows in
                another order than the contexts.
        """
        check_same_order(**{name: rows}, context=context)
        given = beside or Names()
        found = rows_by_name(rows, self.rows, self.sites, name)
        if not names_of(rows) and isinstance(found, Tensor):
            found = _as_given(found, given.rows, self.rows, name)
        if context is None:
            return found, None
        contexts = columns_in_order(context, self.contexts, "context")
        if not names_of(context):
            contexts = _as_given(contexts, given.contexts, self.contexts, "context")
        return found, contexts

    def at_base(
        self, rows: ArrayLike | None, name: str, given: Sequence[str] = ()
    ) -> Tensor | None:
        """Return rows at the base, or None, with their columns in this order.

        Args:
            rows: Rows, shape ``(M, D)``, or None. The columns of a frame have the names of the
                data, or those of the sites. Where these are more than D, as in a simplex, they go
                by position.
            name: What to call them in messages.
            given: The names of the columns of the data as they are given, in whose order rows
                without names are.

        Raises:
            TypeError: If they are no numbers.
            ValueError: If a data frame has columns of other names.
        """
        if rows is None:
            return None
        own = names_of(rows)
        known = self.rows if self.sites is None else site_columns(self.sites)
        found = columns_in_order(rows, known if len(own) == len(known) else (), name)
        return found if own else _as_given(found, given, self.rows, name)


def _as_given(rows: Tensor, given: Sequence[str], wanted: Sequence[str], name: str) -> Tensor:
    """Return rows without names, ``(M, D)``, in an order wanted, from that of D given columns."""
    if rows.shape[-1:] != (len(wanted),):
        return rows
    return in_order(rows, given, wanted, name)
