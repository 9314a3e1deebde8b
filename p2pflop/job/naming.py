"""How people see the parts of a job, wherever rows and results are shown."""

from __future__ import annotations

from collections import Counter

from p2pflop.job.file import Labels


def output_names(labels: Labels) -> tuple[tuple[str, ...], ...]:
    """The names by which rows and results call outputs, by phase.

    An output's own, with its phase's before it (``test.loss``) where two phases use the same; with
    its phase's number where these have one name too (``step.loss``, ``step#2.loss``).
    """
    seen: Counter[str] = Counter()
    phases = []
    for phase in labels.phases:
        seen[phase] += 1
        phases.append(phase if seen[phase] == 1 else f"{phase}#{seen[phase]}")
    uses = Counter(name for names in labels.outputs for name in names)
    return tuple(
        tuple(name if uses[name] == 1 else f"{phase}.{name}" for name in names)
        for phase, names in zip(phases, labels.outputs, strict=True)
    )
