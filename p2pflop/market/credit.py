"""Credit: how much of what an account owes is covered by money it has paid, and what is not.

An account may owe as much as it has paid in all, less what it got back; a payment beyond the debt
makes the debt negative, and so is there already. What is owed beyond that is **uncovered**, and all
uncovered debts together draw on one pool. So whoever has never paid shares the pool with all others
who have not, however many accounts he makes, and what these owe does not end sales to those who
pay.
"""

from __future__ import annotations

from p2pflop.units import format_usd


def uncovered_nusd(owed_nusd: int, paid_nusd: int) -> int:
    """What is owed beyond the money paid in all, in nano-dollars; below zero what is still free."""
    return owed_nusd - paid_nusd


def to_pay_nusd(uncovered: int, free_nusd: int = 0) -> int:
    """The least payment that covers all of that but what the pool has free: a payment lessens the
    debt and raises the limit."""
    return max(0, -(-(uncovered - max(0, free_nusd)) // 2))


def credit_reason(uncovered: int, paid_nusd: int, pool_nusd: int, free_nusd: int) -> str:
    """What a buyer is told who would owe too much, and the least that it has to pay.

    ``free_nusd`` is what others leave of the pool; below zero where they owe more than that.
    """
    amount = format_usd(to_pay_nusd(uncovered, free_nusd))
    if paid_nusd:
        return (
            f"over your credit of {format_usd(paid_nusd)}, what you have paid in all: "
            f"pay {amount} to go on"
        )
    return (
        f"over the credit of {format_usd(pool_nusd)} for unknown buyers: "
        f"pay {amount} to have a limit of your own"
    )


def is_over_credit(reason: str) -> bool:
    """Whether a refusal is by ``credit_reason``."""
    return reason.startswith(("over your credit of ", "over the credit of "))


def job_risk(quote_nusd: int, prepaid_nusd: int = 0) -> str:
    """Who holds the risk of one job: DESIGN section 4, for people."""
    buyer = "one checkpoint interval"
    if prepaid_nusd > 0:
        buyer += f" and the {format_usd(prepaid_nusd)} that you have paid ahead"
    return (
        f"at risk: the provider until you countersign, up to {format_usd(quote_nusd)}; you, {buyer}"
    )


def ledger_risk(owed_nusd: int, owing_nusd: int) -> str:
    """Who holds the risk of what is owed both ways."""
    return (
        f"at risk: you, for the {format_usd(owed_nusd)} that others owe you or hold as your "
        f"prepayment; others, for the {format_usd(owing_nusd)} that you owe or hold of theirs; "
        "of a running job the provider until the buyer countersigns, the buyer one checkpoint "
        "interval"
    )
