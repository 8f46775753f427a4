"""The ways of checking one kernel in one case and dtype: contents, layouts, gradients, updates, graphs, streams."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from kernbench.parity import compare, conditions, integrity, modes, mutants
from kernbench.parity.compare import Judged, Leaves
from kernbench.parity.finding import Finding
from kernbench.parity.layouts import LAYOUTS
from kernbench.parity.modes import Backward
from kernbench.parity.subject import Observed, Subject, Truth, is_noise, judge_all, judge_fairly, passes
from kernbench.spec import Inputs

Body = Callable[[], Finding]


class CaseCheck(Subject):
    """A subject with the ways of checking it; each gives a finding, or raises what the kernel raised."""

    def prepare(self) -> Finding:
        """Inputs and truth, without which nothing can be judged."""
        _ = self.truth
        return Finding()

    def plain(self) -> Finding:
        """The first call there is, so what tuning leaves behind shows: right, and the same again on equal inputs."""
        first = self.observe(compare.clone(self.inputs), self.inputs)
        again = self.observe(compare.clone(self.inputs), self.inputs, guard=False)
        judged = self.judge(first.leaves, self.truth, self.inputs)
        warmed = not passes(judged) and passes(self.judge(again.leaves, self.truth, self.inputs))
        survey = mutants.survey(
            self._mutants(), lambda changed: passes(judge_all(changed, self.truth, self.forward, part=True))
        )
        reasons = [
            first.reason or again.reason,
            self._apart(first.leaves, again.leaves),
            "the first call is wrong and the second is right" if warmed else "",
            survey.reason,
        ]
        bitwise = compare.ulps_apart(first.leaves, again.leaves) == 0.0
        return Finding(judged, _joined(reasons), None, (survey.killed, survey.total), bitwise)

    def _apart(self, first: Leaves, again: Leaves) -> str:
        """By how much two results for equal inputs differ, in words; empty if the declaration allows it."""
        ulps, allowed = compare.ulps_apart(first, again), self.spec.run_to_run_ulp
        if ulps <= allowed:
            return ""
        much = f" by {ulps:.3g} ulp" if math.isfinite(ulps) else ""
        return f"two calls on equal inputs differ{much}, the declaration allows {f'{allowed:g}' if allowed else 'none'}"

    def _mutants(self) -> Iterator[mutants.Mutant]:
        right = self.truth.eager
        signal = {
            item.name for item in judge_all(right, self.truth, self.forward) if not is_noise(item, right[item.name])
        }
        stale = self.call(self.spec.reference, self.others())
        initial = self.results((), self.inputs)
        given = {key: leaf for name, value in self.inputs.items() for key, leaf in compare.leaves(value, name).items()}
        for mutant in mutants.of_call(right, initial, given, stale):
            if signal & mutant.changed.keys():
                yield mutant

    def rewritten(self) -> Finding:
        """The same tensors with other contents: no answer is kept by address, and none given before is written over."""
        live: Leaves = {}

        def keeping(inputs: Inputs) -> Leaves:
            live.update(self.call(self.spec.optimized, inputs))
            return live

        inputs, others = compare.clone(self.inputs), self.others()
        first = self.observe(inputs, self.inputs, keeping)
        inputs = modes.rewritten(inputs, others)
        again = self.observe(inputs, others)
        truth = self.truth_of(others)
        judged = self.judge(again.leaves, truth, others)
        kept = not passes(judged) and passes(judge_all(again.leaves, self.truth, self.forward))
        outputs = live.keys() - self.results((), inputs).keys()
        reasons = [
            "gives the answer to what the same tensors held before: it keeps answers" if kept else "",
            self._overwritten({name: live[name] for name in outputs}, first.leaves, inputs),
            again.reason,
        ]
        return Finding(judged, _joined(reasons))

    def _overwritten(self, live: Leaves, taken: Leaves, inputs: Inputs) -> str:
        changed = [
            name
            for name, leaf in live.items()
            if isinstance(leaf, Tensor) and not compare.same_leaf(leaf.detach(), taken[name])
        ]
        if not changed:
            return ""
        name = changed[0]
        if not _shares_memory(live[name], inputs):
            return f"the next call overwrites {name} of an earlier one: each needs memory of its own"
        own = compare.clone(self.inputs)
        with torch.no_grad():
            eager = compare.leaves(self.spec.reference(**own), "output")
        if _shares_memory(eager.get(name), own):
            return ""
        return f"{name} shares memory with an input, which eager's does not"

    def offset(self) -> Finding:
        """Each tensor misaligned between guard bands: what is read or written past an end shows."""
        embedded = conditions.Embedded()
        observed = self.observe(embedded.embed(self.inputs), self.inputs, below_python=True)
        judged = self.judge(observed.leaves, self.truth, self.inputs)
        read = "" if passes(judged) else "it may read past an end of an input, or take its alignment for granted"
        return Finding(judged, _joined([embedded.reason, observed.reason, read]))

    def laid_out(self, layout: str) -> Body:
        """Inputs in a layout that a ValueError may refuse, but no kernel may get wrong; mutated ones contiguous."""

        def body() -> Finding:
            alike = layout != "expanded"
            contents = self.inputs if alike else compare.clone(self._lay(layout))
            truth = self.truth if alike else self.truth_of(contents)
            run = self._backward(truth) if self.spec.differentiable else None
            gradients = self.backward_truth(run, contents) if run else None
            try:
                observed = self.observe(self._lay(layout), contents, below_python=True)
                judged, reasons = self.judge(observed.leaves, truth, contents), [observed.reason]
                if run and gradients:
                    observed = self._observe_backward(run, self._lay(layout), contents)
                    judged += self.judge_backward(observed.leaves, gradients, run, contents)
                    reasons.append(observed.reason)
            except ValueError as error:
                return _refused(error)
            return Finding(judged, _joined(reasons))

        return body

    def _lay(self, layout: str) -> Inputs:
        seen: dict[int, Tensor] = {}
        mutated = {
            name: compare.map_tensors(self.inputs[name], LAYOUTS["contiguous"], seen) for name in self.spec.mutates
        }
        return {
            name: mutated[name] if name in mutated else compare.map_tensors(value, LAYOUTS[layout], seen)
            for name, value in self.inputs.items()
        }

    def _backward(self, truth: Truth, *, expanded: bool = False, layout: str = "contiguous") -> Backward:
        upstream = self.upstream(truth.eager, expanded=expanded)
        if not expanded:
            upstream = {name: LAYOUTS[layout](gradient) for name, gradient in upstream.items()}
        return Backward(modes.differentiable_names(self.inputs, self.spec.mutates), upstream)

    def _observe_backward(
        self, run: Backward, inputs: Inputs, unchanged: Inputs, function: Callable[..., Any] | None = None
    ) -> Observed:
        """As :meth:`observe` for a forward and backward pass; the incoming gradients must stay as they are too."""
        before = compare.clone(run.upstream)
        observed = self.observe(
            inputs, unchanged, lambda given: run(function or self.spec.optimized, given), guard=function is None
        )
        written = [name for name, leaf in run.upstream.items() if not compare.same_leaf(leaf, before[name])]
        reason = f"writes into the incoming gradient of {written[0]}" if written else ""
        return Observed(observed.leaves, _joined([reason, observed.reason]))

    def gradient(self) -> Finding:
        """Gradients to all inputs that require them, for a random upstream gradient, twice."""
        run = self._backward(self.truth)
        truth = self.backward_truth(run, self.inputs)
        first = self._observe_backward(run, compare.clone(self.inputs), self.inputs)
        again = self._observe_backward(run, compare.clone(self.inputs), self.inputs, self.spec.optimized)
        judged = self.judge_backward(first.leaves, truth, run, self.inputs)
        noise = {item.name for item in judged if is_noise(item, truth.eager[item.name])}
        right = {name: leaf for name, leaf in truth.eager.items() if isinstance(leaf, Tensor) and name not in noise}
        survey = mutants.survey(
            mutants.of_gradients(right), lambda changed: passes(judge_all(changed, truth, self.backward, part=True))
        )
        reasons = [first.reason or again.reason, self._apart(first.leaves, again.leaves), survey.reason]
        bitwise = compare.ulps_apart(first.leaves, again.leaves) == 0.0
        return Finding(judged, _joined(reasons), None, (survey.killed, survey.total), bitwise)

    def gradient_of_sum(self) -> Finding:
        """The same for the upstream gradient of ``sum()``, which is one number with strides of zero."""
        return self._gradient_for(self._backward(self.truth, expanded=True))

    def gradient_laid_out(self, layout: str) -> Body:
        """Gradients for an upstream gradient in a layout; a ValueError refuses it."""

        def body() -> Finding:
            return self._gradient_for(self._backward(self.truth, layout=layout))

        return body

    def _gradient_for(self, run: Backward) -> Finding:
        truth = self.backward_truth(run, self.inputs)
        try:
            observed = self._observe_backward(run, compare.clone(self.inputs), self.inputs)
        except ValueError as error:
            return _refused(error)
        return Finding(self.judge_backward(observed.leaves, truth, run, self.inputs), observed.reason)

    def gradient_offset(self) -> Finding:
        """Inputs and upstream gradients misaligned between guard bands; nothing to refuse."""
        embedded = conditions.Embedded()
        plain = self._backward(self.truth)
        truth = self.backward_truth(plain, self.inputs)
        given = embedded.embed({**self.inputs, "upstream": plain.upstream})
        run = Backward(plain.wanted, given.pop("upstream"))
        observed = self._observe_backward(run, given, self.inputs)
        judged = self.judge_backward(observed.leaves, truth, plain, self.inputs)
        return Finding(judged, _joined([embedded.reason, observed.reason]))

    def updates(self, count: int) -> Body:
        """All state after ``count`` updates from one start, each with fresh inputs, against float64 all the way."""

        def body() -> Finding:
            steps = modes.Updates(self.spec, self.inputs, self.seed)
            output, last = steps.run(self.spec.reference, compare.clone(self.inputs), count)
            eager = self.results(output, last)
            oracle = self.results(*steps.run(self.spec.reference, compare.upcast(self.inputs), count))
            observed = self.observe(
                compare.clone(self.inputs),
                last,
                lambda inputs: self.results(*steps.run(self.spec.optimized, inputs, count)),
                guard=False,
            )
            judged = judge_fairly(
                observed.leaves,
                Truth(eager, oracle),
                self.forward,
                lambda draw: self.results(
                    *steps.run(self.spec.reference, self.nudged(self.inputs, draw), count, moved=count * draw)
                ),
            )
            return Finding(judged, observed.reason)

        return body

    def compiled(self) -> Finding:
        """The kernel called from inside a graph of torch.compile."""
        graph = modes.compiled(self.spec.optimized)
        observed = self.observe(
            compare.clone(self.inputs), self.inputs, lambda inputs: self.call(graph, inputs), guard=False
        )
        return Finding(self.judge(observed.leaves, self.truth, self.inputs), observed.reason)

    def gradient_compiled(self) -> Finding:
        """Forward and backward of the kernel inside graphs of torch.compile."""
        run = self._backward(self.truth)
        truth = self.backward_truth(run, self.inputs)
        graph = modes.compiled(self.spec.optimized)
        observed = self._observe_backward(run, compare.clone(self.inputs), self.inputs, graph)
        return Finding(self.judge_backward(observed.leaves, truth, run, self.inputs), observed.reason)

    def graph(self) -> Finding:
        """The kernel captured in a CUDA graph, replayed on other inputs at the same addresses."""
        others = self.others()
        with integrity.watched() as watch:
            output, inputs = modes.replayed(self.spec.optimized, self.inputs, others)
        got = self.results(output, inputs)
        mixed = modes.with_tensors_of(self.inputs, others)
        del others
        touched = self.touched(inputs, mixed)
        return Finding(self.judge(got, self.truth_of(mixed), mixed), _joined([watch.reason, touched]))

    def gradient_graph(self) -> Finding:
        """Forward and backward captured in one CUDA graph, replayed on other inputs and upstream gradients."""
        mixed = modes.with_tensors_of(self.inputs, self.others())
        wanted = modes.differentiable_names(self.inputs, self.spec.mutates)
        captured = Backward(wanted, self.upstream(self.truth.eager))
        replayed = Backward(wanted, modes.upstream(self.truth.eager, self.seed + 1, expanded=False))
        truth = self.backward_truth(replayed, mixed)
        with integrity.watched() as watch:
            got, inputs = modes.replayed_backward(self.spec.optimized, captured, self.inputs, replayed, mixed)
        judged: list[Judged] = self.judge_backward(got, truth, replayed, mixed)
        return Finding(judged, _joined([watch.reason, self.touched(inputs, mixed)]))

    def stream(self) -> Finding:
        """Called on a side stream where the inputs arrive late and the result is read right behind the call."""
        observed = self.observe(
            compare.clone(self.inputs),
            self.inputs,
            lambda inputs: modes.on_side_stream(
                lambda given: self.call(self.spec.optimized, given), inputs, self.others()
            ),
            guard=False,
        )
        judged = self.judge(observed.leaves, self.truth, self.inputs)
        reason = "" if passes(judged) else "it works on another stream than the one it is called on, and does not wait"
        return Finding(judged, _joined([reason, observed.reason]))


def _joined(reasons: list[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, reasons)))


def _refused(error: ValueError) -> Finding:
    return Finding(reason=f"refused: {(str(error).splitlines() or [''])[0]}", passed=True)


def _shares_memory(leaf: Any, inputs: Inputs) -> bool:
    if not isinstance(leaf, Tensor):
        return False
    storages = {
        item.untyped_storage().data_ptr() for item in compare.leaves(inputs, "").values() if isinstance(item, Tensor)
    }
    return leaf.untyped_storage().data_ptr() in storages
