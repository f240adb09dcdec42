"""The search: its candidates, what becomes of each, the winner's proof, and held-out shapes."""

from dataclasses import replace

import pytest
import torch
from tuning import H200, TILES, AtOnce, Scripted, entry_of

from adapterkern.backends.triton import launch_config, tuned
from adapterkern.backends.triton.tuned import Entry, HeldOut
from adapterkern.bench import search, tune
from adapterkern.bench.cases import BenchCase
from adapterkern.bench.providers import PROVIDERS
from adapterkern.bench.results import LostDeviceError
from adapterkern.bench.timing import CALLS_IN_GRAPH


def problem(tokens, hidden=1024, bottleneck=64):
    return entry_of(tokens, hidden, bottleneck).problem


@pytest.mark.parametrize("kind", ["tokens", "weights"])
@pytest.mark.parametrize("tokens", [16, 2048, 16384])
def test_candidates_differ_from_the_formula_and_fit(kind, tokens):
    asked = problem(tokens)
    base = tune.formula(kind, asked, H200)
    found = tune.candidates(kind, asked, H200)
    assert len(found) == len(set(found)) > 20
    assert base not in found
    for entry in found:
        assert entry.kind == kind
        assert entry.problem == asked
        for kernel in entry.kernels:
            tiles = (kernel.block_t + kernel.block_r) * kernel.block_h * 2
            assert tiles * (kernel.num_stages - 1) <= H200.shared_memory
    if kind == "tokens":
        assert {entry.form for entry in found} == {"row_block", "split"}


@pytest.mark.parametrize("num_sms", [82, 128])
def test_small_gpus_try_both_forms_and_every_property_of_a_split(num_sms):
    """Where the formula's stages need more shared memory than there is, launches take fewer."""
    device = launch_config.Device(num_sms, 99 * 1024, 8)
    for tokens, hidden, bottleneck in ((2048, 1024, 64), (16384, 1024, 64), (2048, 4096, 128)):
        found = tune.candidates("tokens", problem(tokens, hidden, bottleneck), device)
        assert {entry.form for entry in found} == {"row_block", "split"}
        splits = [entry for entry in found if entry.form == "split"]
        assert len({entry.kernels[1] for entry in splits}) > 5
        assert len({entry.programs_per_sm for entry in splits}) == 3
        for entry in found:
            stages = launch_config.into_stages(entry.kernels[0], device, 2, 2)
            assert entry.kernels[0].num_stages == stages


def test_the_formula_comes_back_from_its_entries():
    for tokens, bottleneck in ((16, 64), (2048, 64), (16384, 64), (16384, 256)):
        asked = problem(tokens, bottleneck=bottleneck)
        entry = tune.formula("tokens", asked, H200)
        assert tuned.plan(entry, asked, H200) == launch_config.token_plan(asked, H200)
        entry = tune.formula("weights", asked, H200)
        assert tuned.plan(entry, asked, H200) == launch_config.weight_gradient_plan(asked, H200)


def test_a_new_entry_replaces_that_of_the_same_problem():
    old = [entry_of(1024), entry_of(2048)]
    new = [entry_of(2048, num_warps=4), entry_of(4096)]
    merged = tune.merge(old, new)
    assert [entry.problem.num_tokens for entry in merged] == [1024, 2048, 4096]
    assert [entry.kernels[0].num_warps for entry in merged] == [8, 4, 8]


def test_searches_come_in_the_given_order_and_leave_out_what_is_done():
    done = [entry_of(16), Entry(problem(16384), "weight_gradient", (TILES,))]
    asked = tune.asked_for([(1024, 64), (768, 48)], [16384, 16])
    found = tune.searches(asked, ["bf16"], True, done)
    assert [(entry.kind, str(entry.case)) for entry in found] == [
        ("tokens", "step-bf16-gelu-T16384-H1024-R64"),
        ("tokens", "step-bf16-gelu-T16384-H768-R48"),
        ("weights", "backward-bf16-gelu-T16384-H768-R48"),
        ("weights", "backward-bf16-gelu-T16-H1024-R64"),
        ("tokens", "forward-bf16-gelu-T16-H768-R48"),
        ("weights", "backward-bf16-gelu-T16-H768-R48"),
    ]


def test_a_bare_run_has_25_searches_with_training_and_decode_first():
    found = tune.searches(tune.asked_for(None, None), ["bf16"], True)
    assert len(found) == 25
    assert {entry.case.tokens for entry in found[:8]} == {16384, 16}
    # Nothing is trained with the tokens of a decode step.
    assert {entry.case.tokens for entry in found if entry.kind == "weights"} == {16384, 4096}
    assert len(tune.asked_for(None, [5])) == len(tune.SHAPES)
    assert len(tune.asked_for([(512, 8)], None)) == len(tune.TOKENS)


def test_a_bare_run_reaches_held_out_shapes_that_it_does_not_search():
    found = tune.searches(tune.WORTH, ["bf16"], True)
    entries = [tune.formula(one.kind, one.problem, H200) for one in found]
    reached = {
        str(case)
        for case in tune.HELD_OUT
        for kind in ("tokens", "weights")
        if tuned.nearest(entries, kind, tune.problem_of(case, True)) is not None
    }
    assert len(reached) == 4  # all but the float32 one, whose arithmetic is not searched
    assert not {case.shape for case in tune.HELD_OUT} & {one.case.shape for one in found}


CASE = BenchCase(64, 8, 16, "fp32", mode="forward")


class DoubledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


@pytest.fixture
def reference_as_triton(monkeypatch):
    """(a predicate) -> entries that it holds for compute y 1.5 times, or its gradient twice."""
    reference = PROVIDERS["reference"]

    def install(wrong_y=lambda _entry: False, wrong_gradient=lambda _entry: False):
        def build(case, inputs):
            built = reference.build(case, inputs)

            def forward(x):
                entries = tuned._forced.values()
                y = built.forward(x) * (1.5 if any(map(wrong_y, entries)) else 1.0)
                return DoubledGradient.apply(y) if any(map(wrong_gradient, entries)) else y

            return replace(built, forward=forward)

        monkeypatch.setitem(PROVIDERS, "triton", replace(reference, name="triton", build=build))

    install()
    return install


def searched(script, compilers=None, case=CASE, timer=None):
    compilers = compilers or AtOnce()
    timer = timer or Scripted(script)
    kind = "weights" if case.mode == "backward" else "tokens"
    one = tune.Search(kind, case, tune.problem_of(case, ieee=True))
    queued = search.enqueue(one, H200, compilers)
    ranked = search.rank(queued, timer, H200, compilers, seconds=0.0)
    return search.settle(ranked, H200, compilers, "Some GPU"), timer


def deep(entry):
    return entry.kernels[0].num_stages == 4


def fast_if_deep(entry):
    return 40.0 if deep(entry) else 100.0


def test_the_search_takes_the_fastest_entry_that_is_right(reference_as_triton):
    found, _ = searched(fast_if_deep)
    assert found.changed
    assert (found.before_us, found.after_us) == (100.0, 40.0)
    assert deep(found.entry)
    assert found.entry.evidence == tuned.Evidence(100.0, 40.0, "Some GPU")
    assert "100.0 us to 40.0 us" in str(found)
    # The same script, but four stages give a wrong result: nothing is left to gain.
    reference_as_triton(wrong_y=deep)
    found, _ = searched(fast_if_deep)
    assert not found.changed
    assert found.after_us == found.before_us == 100.0
    assert found.entry == tune.formula("tokens", found.entry.problem, H200)
    assert "kept" in str(found)


def test_the_last_entries_are_timed_in_a_graph_with_weights_of_their_own(
    reference_as_triton, monkeypatch
):
    """A first, short round times all entries in one call's memory; then come the fastest few."""
    rounds = []

    class Counting(Scripted):
        def measure(self, kind, subjects, seconds):
            rounds.append([(len(s.calls), s.least_calls) for s in subjects.values()])
            return super().measure(kind, subjects, seconds)

    def three_sets(case, inputs, timer):
        return [inputs, case.draw("cpu", seed=1), case.draw("cpu", seed=2)]

    monkeypatch.setattr(search, "headline", lambda *_: "graph")
    monkeypatch.setattr(search.rotation, "sets", three_sets)
    found, _ = searched(fast_if_deep, timer=Counting(fast_if_deep))
    assert found.changed
    short, final = rounds
    assert len(short) > len(final) > 1
    assert set(short) == {(1, CALLS_IN_GRAPH)}
    assert set(final) == {(3, search.rotation.least_calls(CASE))}


def test_an_entry_timed_in_a_forward_must_have_the_right_gradients(reference_as_triton):
    assert searched(fast_if_deep)[0].changed
    reference_as_triton(wrong_gradient=deep)
    found, timer = searched(fast_if_deep)
    assert not found.changed
    assert not any(map(deep, timer.timed))


def test_a_gain_within_the_noise_changes_nothing(reference_as_triton):
    case = replace(CASE, mode="backward")
    base = tune.formula("weights", tune.problem_of(case, True), H200)
    found, _ = searched(lambda entry: 100.0 if entry == base else 98.5, case=case)
    assert not found.changed
    assert found.entry == base


def test_what_does_not_compile_is_never_run(reference_as_triton):
    compilers = AtOnce(lambda work: "OutOfResources" if deep(work.entry) else None)
    found, timer = searched(fast_if_deep, compilers)
    assert not found.changed
    assert len(timer.timed) > 20
    assert not any(map(deep, timer.timed))


def test_candidates_must_not_spill_and_the_formula_may(reference_as_triton, small_held_out):
    compilers = AtOnce()
    searched(fast_if_deep, compilers)
    timed = [work for work in compilers.works if work.timed]
    assert [work.may_spill for work in timed] == [True] + [False] * (len(timed) - 1)
    compilers = AtOnce()
    search.trials([float32()], True, H200, compilers)
    assert [work.may_spill for work in compilers.works] == [True, True]


def test_what_does_not_compile_for_the_widest_mix_is_never_run(reference_as_triton):
    compilers = AtOnce(lambda work: "294912" if deep(work.entry) and not work.timed else None)
    found, timer = searched(fast_if_deep, compilers, replace(CASE, mode="backward"))
    assert not found.changed
    assert not any(map(deep, timer.timed))


def test_the_winner_must_compile_for_every_mix_of_its_problem(reference_as_triton):
    """The fastest, of three and four stages, cannot run odd sizes; those of two can."""

    def script(entry):
        first = entry.kernels[0]
        if entry.form == "split" or first.block_t != 16:
            return 100.0
        return {2: 60.0, 3: 50.0, 4: 40.0}[first.num_stages] + first.num_warps / 100

    def answer(work):
        shallow = work.entry.kernels[0].num_stages == 2
        return "OutOfResources: 294912" if work.mix.odd and not shallow else None

    compilers = AtOnce(answer)
    one = tune.Search("tokens", CASE, tune.problem_of(CASE, ieee=False))
    queued = search.enqueue(one, H200, compilers)
    count = len(compilers.works)
    ranked = search.rank(queued, Scripted(script), H200, compilers, seconds=0.0)
    faster = [entry for us, entry in ranked.faster if us < 60.0]
    found = search.settle(ranked, H200, compilers, "Some GPU")
    assert found.entry.kernels[0].num_stages == 2
    assert (found.before_us, found.after_us) == (100.0, 60.04)
    assert len(found.refused) == len(faster) == 6
    assert "refused: 40.0 us with" in str(found)
    assert "294912" in str(found)
    assert all(compilers.urgent[count:])
    # Only as many as it took: those that were refused, and the one that was found.
    proven = {work.entry for work in compilers.works[count:]}
    assert proven == {*faster, replace(found.entry, evidence=None)}


def test_a_formula_that_fails_ends_the_search(reference_as_triton):
    base = tune.formula("tokens", tune.problem_of(CASE, True), H200)
    with pytest.raises(RuntimeError, match=r"formula's plan cannot be timed .* no room"):
        searched(fast_if_deep, AtOnce(lambda work: "no room" if work.entry == base else None))
    reference_as_triton(wrong_y=lambda entry: entry == base)
    with pytest.raises(RuntimeError, match=r"formula's plan cannot be timed .* wrong in mode step"):
        searched(fast_if_deep)


def test_a_plan_that_does_not_repeat_its_bits_is_none(reference_as_triton, monkeypatch):
    reference_as_triton()
    monkeypatch.setattr(search, "repeats", lambda _outputs: False)
    with pytest.raises(RuntimeError, match=r"formula's plan cannot be timed .* other bits"):
        searched(fast_if_deep)


def test_a_candidate_that_costs_the_device_ends_the_search(reference_as_triton):
    class Lost(Scripted):
        def raise_if_lost(self, cause, name=""):
            raise LostDeviceError(str(cause), name) from cause

    def fail(entry):
        if deep(entry):
            raise RuntimeError("an illegal memory access")
        return False

    reference_as_triton(wrong_y=fail)
    with pytest.raises(LostDeviceError, match="an illegal memory access"):
        searched(fast_if_deep, timer=Lost(fast_if_deep))
    found, timer = searched(fast_if_deep)  # with the device alive it costs the candidate alone
    assert not found.changed
    assert not any(map(deep, timer.timed))


@pytest.fixture
def small_held_out(monkeypatch, reference_as_triton):
    monkeypatch.setattr(search, "HELD_OUT", (BenchCase(96, 12, 24, "fp32"),))
    return reference_as_triton


def judged(entry, script, answer=lambda _work: None):
    found = search.trials([entry], True, H200, AtOnce(answer))
    return [search.judge(trial, Scripted(script), seconds=0.0) for trial in found]


def float32(**changes):
    return entry_of(32, 64, 16, arithmetic=(True, True), **changes)


def test_held_out_shapes_are_compiled_before_searches_that_are_to_come(small_held_out):
    compilers = AtOnce()
    assert search.trials([float32(num_stages=4)], True, H200, compilers)
    assert compilers.urgent == [True, True]  # before and after


def test_a_class_of_entries_that_costs_a_held_out_shape_is_dropped(small_held_out):
    entry = float32(num_stages=4)
    tokens, weights = entry, replace(entry, form="weight_gradient")
    (row,) = judged(entry, lambda one: 103.0 if deep(one) else 100.0)
    assert (row.kind, row.ieee, row.wide) == ("tokens", True, True)
    assert row.case == "forward-fp32-gelu-T24-H96-R12"
    assert (row.before_us, row.after_us, row.problem) == (100.0, 103.0, "")
    assert search.loses(row)
    half = entry_of(32)
    assert search.without([tokens, weights, half], [row]) == [weights, half]
    (row,) = judged(entry, lambda one: 101.5 if deep(one) else 100.0)
    assert not search.loses(row)


def test_a_class_that_is_wrong_or_does_not_compile_on_a_held_out_shape_is_dropped(small_held_out):
    entry = float32(num_stages=4)
    (row,) = judged(entry, fast_if_deep, lambda work: "spills" if deep(work.entry) else None)
    assert (row.problem, search.loses(row)) == ("spills", True)
    small_held_out(wrong_gradient=deep)
    (row,) = judged(entry, fast_if_deep)
    assert row.problem.startswith("wrong in mode step")
    assert search.loses(row)
    assert not search.loses(HeldOut("tokens", True, True, "", 100.0, 40.0))


def test_a_held_out_shape_without_another_plan_is_not_timed(small_held_out):
    assert judged(entry_of(32, 64, 16), fast_if_deep) == []  # of another arithmetic
    far = entry_of(1024, 64, 16, arithmetic=(True, True))
    assert judged(far, fast_if_deep) == []
    same = tune.formula("tokens", tune.problem_of(BenchCase(96, 12, 24, "fp32"), True), H200)
    assert judged(same, fast_if_deep) == []
