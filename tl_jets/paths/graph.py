r"""The path graph: all paths of a residual network, counted, listed lazily and filtered without enumeration.

A path starts at a source, takes one step or none at each later stage, and ends in the decoder. The number of paths of a
source that starts before stage s is

.. math::
    \prod_{t \ge s} (1 + \text{writes of stage } t) .

With n the set of conditions (`through`) still to meet before stage t, the completions by number of writes are

.. math::
    C_t(n) = C_{t+1}(n) + z \sum_{\text{steps } a \text{ of } t} C_{t+1}(n \setminus \text{conditions that } a \text{ meets}),

a polynomial in z, stored as a tuple of exact integer coefficients. Prefixes without a completion are never listed.

Cost: a count takes stages^2 integer additions per set of conditions; a listed path, one look-up per stage.

Example:
    >>> graph = PathGraph(stages=(("0_attn",), ("0_mlp",), ("1_attn",)), sources=(Source("embed", 0),))
    >>> graph.count, graph.count_by_length
    (8, (1, 3, 3, 1))
    >>> for path in list(graph)[:3]:
    ...     print(path)
    embed > ln_final
    embed > 0_attn > ln_final
    embed > 0_mlp > ln_final
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest

from tl_jets.core.path import Path
from tl_jets.core.protocol import BIAS, DECODER_STEP, Stage, Step, frozen_biases, some

KINDS = ("attn", "mlp", "head", "neuron", "block", "bias")
# The state of a prefix that its completions depend on: conditions still to meet (as bits) and writes so far.
State = tuple[int, int]


@dataclass(frozen=True)
class Source:
    """A start of paths: an embedding, an edit, or a bias (a constant of the frozen network).

    `start` is the index of the first stage that reads it: the number of stages if only the decoder reads it, one more
    for the decoder's own constant.
    """

    label: str
    start: int
    is_bias: bool = False


@dataclass(frozen=True)
class PathGraph:
    """The paths through some stages from some sources. Iterate over it for the paths, short ones first.

    Attributes:
        stages: Labels of the allowed steps, by stage.
        through: Conditions: a path passes through at least one label of each set.
        max_length: Largest number of writes in a path; None for any number.
        absent: Constants that the model does not have: no sources, though filters may name them.
    """

    stages: tuple[tuple[str, ...], ...]
    sources: tuple[Source, ...]
    through: tuple[frozenset[str], ...] = ()
    max_length: int | None = None
    absent: frozenset[str] = frozenset()

    @property
    def count(self) -> int:
        """Number of paths: an exact integer."""
        return sum(self.count_by_length)

    @cached_property
    def count_by_length(self) -> tuple[int, ...]:
        """Number of paths with 0, 1, 2, ... writes."""
        total: tuple[int, ...] = ()
        for source in self.sources:
            total = _add(total, self.completions(source.start, self.state(source)[0]))
        return total if self.max_length is None else total[: self.max_length + 1]

    def starting_at(self, sources: Iterable[str]) -> PathGraph:
        """The paths that start at the given labels."""
        wanted = set(sources)
        return replace(self, sources=tuple(source for source in self.sources if source.label in wanted))

    def __iter__(self) -> Iterator[Path]:
        for length in range(len(self.count_by_length)):
            for source in self.sources:
                for steps in self._exactly(source.start, self.state(source)[0], length):
                    decoded = source.start <= len(self.stages)
                    yield Path(source.label, (*steps, DECODER_STEP) if decoded else steps)

    def __contains__(self, path: object) -> bool:
        wanted = Path.parse(str(path))
        source = next((source for source in self.sources if source.label == wanted.source), None)
        if source is None:
            return False
        (needs, _), place, steps = self.state(source), source.start, wanted.steps
        if place <= len(self.stages):
            if steps[-1:] != (DECODER_STEP,):
                return False
            steps = steps[:-1]
        for step in steps:
            stage = self._stage_of.get(step, -1)
            if stage < place:
                return False
            needs, place = self._after(needs, step), stage + 1
        return needs == 0 and (self.max_length is None or len(steps) <= self.max_length)

    def state(self, source: Source) -> State:
        """The state of a path at its source."""
        return self._after(2 ** len(self.through) - 1, source.label), 0

    def _after(self, needs: int, label: str) -> int:
        """The remaining conditions after a path has passed through a label."""
        return needs & ~self._meets.get(label, 0)

    def completions(self, stage: int, needs: int) -> tuple[int, ...]:
        """Number of completions from a stage that meet the conditions, by number of writes."""
        if stage >= len(self.stages):
            return () if needs else (1,)
        key = (stage, needs)
        if key not in self._completions:
            total = self.completions(stage + 1, needs)
            for left, n_steps in Counter(self._after(needs, step) for step in self.stages[stage]).items():
                taken = self.completions(stage + 1, left)
                total = _add(total, (0, *(n_steps * n for n in taken)) if taken else ())
            self._completions[key] = total
        return self._completions[key]

    def is_alive(self, stage: int, state: State) -> bool:
        """Whether a prefix before a stage can be completed."""
        needs, used = state
        ways = self.completions(stage, needs)
        return any(ways if self.max_length is None else ways[: max(0, self.max_length - used + 1)])

    def onward(self, stage: int, state: State) -> list[tuple[int, State]]:
        """The steps of a stage that a prefix can take, by index, and its state after each."""
        needs, used = state
        found = [(index, (self._after(needs, step), used + 1)) for index, step in enumerate(self.stages[stage])]
        return [(index, state) for index, state in found if self.is_alive(stage + 1, state)]

    def prefixes(self) -> list[tuple[int, int]]:
        """By stage, and for the decoder: the number of prefixes, and how many of them take a step of the stage."""
        found: list[tuple[int, int]] = []
        states: Counter[State] = Counter()
        for stage in range(len(self.stages) + 1):
            joining = (self.state(source) for source in self.sources if source.start == stage)
            states.update(state for state in joining if self.is_alive(stage, state))
            if stage == len(self.stages):
                return [*found, (states.total(), states.total())]
            following: Counter[State] = Counter()
            moving = 0
            for state, n in states.items():
                onward = [after for _, after in self.onward(stage, state)]
                moving += n if onward else 0
                for needs, used in [*([state] if self.is_alive(stage + 1, state) else []), *onward]:
                    # Without a limit, the number of writes does not matter.
                    following[needs, used if self.max_length is not None else 0] += n
            found.append((states.total(), moving))
            states = following
        return found

    def _exactly(self, stage: int, needs: int, length: int) -> Iterator[tuple[str, ...]]:
        """The completions from a stage with so many writes."""
        ways = self.completions(stage, needs)
        if length >= len(ways) or not ways[length]:
            return
        if length == 0:
            yield ()
            return
        for place in range(stage, len(self.stages)):
            for step in self.stages[place]:
                for rest in self._exactly(place + 1, self._after(needs, step), length - 1):
                    yield (step, *rest)

    @cached_property
    def _stage_of(self) -> dict[str, int]:
        return {step: index for index, steps in enumerate(self.stages) for step in steps}

    @cached_property
    def _meets(self) -> dict[str, int]:
        """The conditions that a label meets, as bits."""
        every = frozenset[str]().union(*self.through)
        return {label: sum(1 << i for i, labels in enumerate(self.through) if label in labels) for label in every}

    @cached_property
    def _completions(self) -> dict[tuple[int, int], tuple[int, ...]]:
        return {}


def path_graph(
    stages: Sequence[Stage], sources: Sequence[str], *, detached: bool, absent: Iterable[str] = ()
) -> PathGraph:
    """The path graph of a network; for detached paths, with a source for every bias but those that are `absent`."""
    starts = [Source(label, 0) for label in sources]
    if not detached:
        return PathGraph(tuple(tuple(step.label for step in stage.steps) for stage in stages), tuple(starts))
    # The bias of a layer's attention depends on no stream: it is a source alone.
    steps = tuple(tuple(step.label for step in stage.steps if step.kind != "attn_bias") for stage in stages)
    for index, labels in enumerate(frozen_biases(stages)):
        starts += [Source(label, index + 1, True) for label, _ in labels]
    starts.append(Source(DECODER_STEP + BIAS, len(stages) + 1, True))
    names = Counter([source.label for source in starts] + [step for labels in steps for step in labels])
    twice = sorted(name for name, n in names.items() if n > 1)
    if twice:
        raise ValueError(
            f"Sources, steps and the biases of steps must have different labels; got {twice} more than once."
        )
    absent = frozenset(absent)
    return PathGraph(steps, tuple(source for source in starts if source.label not in absent), absent=absent)


def narrowed(
    graph: PathGraph,
    stages: Sequence[Stage],
    *,
    through: str | Iterable[str] | None = None,
    avoiding: str | Iterable[str] | None = None,
    sources: str | Iterable[str] | None = None,
    max_length: int | None = None,
) -> PathGraph:
    """The paths through all of `through`, none of `avoiding`, from `sources`, with at most `max_length` writes."""
    if max_length is not None and (isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 0):
        raise ValueError(f"max_length must be None or an integer >= 0; got {max_length!r}.")
    taken = {step for labels in graph.stages for step in labels}
    steps = [step for stage in stages for step in stage.steps if step.label in taken]
    known = {source.label: source for source in graph.sources}
    absent = {*graph.absent, *(["bias"] if graph.absent else [])}
    conditions = tuple(_labels(name, steps, known, absent) for name in _names(through))
    avoided = frozenset[str]().union(*(_labels(name, steps, known, absent) for name in _names(avoiding)))
    wanted = frozenset[str]().union(*(_labels(name, [], known, absent) for name in _names(sources)))
    chosen = [s for s in graph.sources if s.label not in avoided and (sources is None or s.label in wanted)]
    kept = tuple(tuple(step for step in labels if step not in avoided) for labels in graph.stages)
    return replace(graph, stages=kept, sources=tuple(chosen), through=conditions, max_length=max_length)


def _names(names: str | Iterable[str] | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def _labels(name: str, steps: Sequence[Step], sources: Mapping[str, Source], absent: Collection[str]) -> frozenset[str]:
    """The labels that a name stands for: itself, those of a kind, or the heads of an attention layer."""
    found = {step.label for step in steps if step.label == name or _is_of(step, name)}
    found |= {label for label, source in sources.items() if label == name or (name == "bias" and source.is_bias)}
    if (
        not found and name not in absent and not name.startswith("edit:")
    ):  # edits by hooks are not known before a trace is
        if not steps:
            raise ValueError(
                f"Paths start at sources: these must be named, or all that are biases ('bias'); got {name!r}. Here the sources are "
                f"{some(sources)}."
            )
        raise ValueError(
            f"A filter must name steps, sources, or kinds of them; got {name!r}. Here the steps are "
            f"{some(step.label for step in steps)}, the sources {some(sources)}, and kinds are {KINDS}."
        )
    return frozenset(found or {name})


def _is_of(step: Step, name: str) -> bool:
    if step.is_feature:
        return step.label.startswith(f"{step.layer}_{name}_" if name in KINDS else f"{name}_")
    if name == "attn":
        return step.kind in ("attn", "head", "attn_bias") or step.label.endswith("_attn")
    if name == "mlp" and step.kind in ("neuron", "mlp_rest"):
        return True
    if name in KINDS:
        return step.kind == name or (step.kind == "callable" and step.label.endswith("_" + name))
    return step.kind in ("head", "attn_bias") and name == f"{step.layer}_attn"


def _add(left: tuple[int, ...], right: tuple[int, ...]) -> tuple[int, ...]:
    """The sum of two polynomials."""
    return tuple(a + b for a, b in zip_longest(left, right, fillvalue=0))


def count_text(count: int) -> str:
    """A count as text: 1,024, or 3.40e38."""
    digits = str(count)
    return f"{count:,}" if len(digits) <= 12 else f"{digits[0]}.{digits[1:3]}e{len(digits) - 1}"


def counts_of(graph: PathGraph, labels: list[str], by: str) -> list[int]:
    """Number of paths in each sum by `"component"` or `"source"`."""
    if by == "source":
        return [graph.starting_at([label]).count for label in labels]
    before = [n for n, _ in graph.prefixes()]
    after = [sum(graph.completions(stage + 1, 0)) for stage in range(len(graph.stages))]
    stage_of = {step: stage for stage, steps in enumerate(graph.stages) for step in steps}
    return [before[stage_of[label]] * after[stage_of[label]] for label in labels]
